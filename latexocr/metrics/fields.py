r"""Answers that are JSON objects, compared field by field.

Why: a number plate or a form is read into fields, and one wrong character in one field says little in an edit distance
and everything to whom the field matters. A field is right if its value is equal; strings may differ in blanks at both
ends. Fields of nested objects and of lists are named by their path: `owner.name`, `parts.0`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from latexocr.errors import InputError
from latexocr.metrics.scores import Metric, ratio

FIELD_METRICS = {
    "exact_match": "all fields of the reference are right, and there are no others",
    "field_match": "fields of the references that are right, of all of them together",
    "json_rate": "answers that hold a JSON object",
}
_BRACED = re.compile(r"\{.*\}", re.DOTALL)


def parse_fields(text: str | None) -> dict[str, Any] | None:
    r"""Path -> value of the object in a text, which may stand in a fence or among words; None if there is none.

    >>> parse_fields('```json\n{"plate": " AB 12 ", "parts": ["x"]}\n```')
    {'plate': 'AB 12', 'parts.0': 'x'}
    """
    found = _BRACED.search(text or "")
    try:
        value = json.loads(found[0]) if found else None
    except ValueError:
        return None
    return dict(_flat("", value)) if isinstance(value, dict) else None


def _flat(path: str, value: Any) -> list[tuple[str, Any]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = [pair for key, child in children for pair in _flat(f"{path}.{key}" if path else str(key), child)]
    return inner or [(path, value.strip() if isinstance(value, str) else value)]


def check_fields(text: str, where: str) -> dict[str, Any]:
    """The fields of a reference.

    Raises:
        InputError: it holds no JSON object.
    """
    fields = parse_fields(text)
    if fields is None:
        raise InputError(f"{where}: {text[:60]!r} is no JSON object; mend it, or set --answer_format latex")
    return fields


class Judged(NamedTuple):
    """One answer: whether it is JSON at all, all of it right, and each field of the reference."""

    is_json: bool
    exact: bool
    hits: dict[str, bool]

    def as_row(self) -> dict[str, Any]:
        """What stands beside the answer in rows.csv."""
        return {
            "exact_match": float(self.exact),
            "field_match": sum(self.hits.values()) / len(self.hits),
            "valid_json": float(self.is_json),
            "wrong_fields": [name for name, hit in self.hits.items() if not hit],
        }


def judge(predictions: Sequence[str | None], references: Sequence[str]) -> list[Judged]:
    """Every answer against its reference.

    Raises:
        InputError: a reference that is no JSON object.
    """
    judged = []
    for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        wanted, given = check_fields(reference, f"reference {number}"), parse_fields(prediction)
        known = given or {}
        hits = {name: name in known and _same(known[name], value) for name, value in wanted.items()}
        judged.append(Judged(given is not None, known.keys() == wanted.keys() and all(hits.values()), hits))
    return judged


def field_metrics(judged: Sequence[Judged]) -> list[Metric]:
    """`FIELD_METRICS` and `field_match.NAME` of each field of the references, as means over rows or over fields."""
    names = dict.fromkeys(name for one in judged for name in one.hits)
    found = {
        "exact_match": lambda one: (one.exact, 1),
        "field_match": lambda one: (sum(one.hits.values()), len(one.hits)),
        **{f"field_match.{name}": lambda one, name=name: (one.hits.get(name, 0), name in one.hits) for name in names},
        "json_rate": lambda one: (one.is_json, 1),
    }
    return [
        Metric(name, FIELD_METRICS[name.partition(".")[0]], "higher", partial(_columns, of_row=of_row), ratio)
        for name, of_row in found.items()
    ]


def _columns(judged: Sequence[Judged], *, of_row: Callable[[Judged], tuple[float, float]]) -> np.ndarray:
    return np.array([of_row(one) for one in judged], dtype=float)


def figures(judged: Sequence[Judged]) -> dict[str, float]:
    """All metrics and counts; see `score_fields`."""
    found = {metric.name: float(metric.value(metric.per_row(judged).sum(axis=0))) for metric in field_metrics(judged)}
    return found | counts(judged)


def counts(judged: Sequence[Judged]) -> dict[str, float]:
    """What the figures rest on."""
    return {"num_rows": float(len(judged)), "invalid_json": float(sum(not one.is_json for one in judged))}


def score_fields(
    predictions: Sequence[str | None], references: Sequence[str]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures (`FIELD_METRICS`, `field_match.NAME` of each field, counts), and each row's own values.

    Raises:
        InputError: a reference that is no JSON object.

    >>> score_fields(['{"a": 1, "b": 2}'], ['{"a": 1, "b": 3}'])[0]["field_match"]
    0.5
    """
    judged = judge(predictions, references)
    return figures(judged), [one.as_row() for one in judged]


def _same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)  # true is not 1
