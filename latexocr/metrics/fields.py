r"""Answers that are JSON objects, compared field by field.

Why: a number plate or a form is read into fields, and one wrong character in one field says little in an edit distance
and everything to whom the field matters. A field is right if its value is equal; strings may differ in blanks at both
ends. Fields of nested objects and of lists are named by their path: `owner.name`, `parts.0`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from latexocr.errors import InputError

FIELD_METRICS = {
    "exact_match": "all fields of the reference are right, and there are no others",
    "field_match": "fields of the references that are right, of all of them together",
    "json_rate": "answers that hold a JSON object",
}
_BRACED = re.compile(r"\{.*\}", re.DOTALL)


def parse_fields(text: str | None) -> dict[str, Any] | None:
    """Path -> value of the object in a text, which may stand in a fence or among words; None if there is none.

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


def score_fields(
    predictions: Sequence[str | None], references: Sequence[str]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures (`FIELD_METRICS`, `field_match.NAME` of each field, counts), and each row's own values.

    Raises:
        InputError: a reference that is no JSON object.

    >>> score_fields(['{"a": 1, "b": 2}'], ['{"a": 1, "b": 3}'])[0]["field_match"]
    0.5
    """
    rows, right = [], {}
    for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        wanted, given = check_fields(reference, f"reference {number}"), parse_fields(prediction)
        hits = {
            name: given is not None and name in given and _same(given[name], value) for name, value in wanted.items()
        }
        for name, hit in hits.items():
            right.setdefault(name, []).append(hit)
        rows.append({
            "exact_match": float(given is not None and given.keys() == wanted.keys() and all(hits.values())),
            "field_match": sum(hits.values()) / len(hits),
            "valid_json": float(given is not None),
            "wrong_fields": [name for name, hit in hits.items() if not hit],
        })  # fmt: skip
    every = [hit for hits in right.values() for hit in hits]
    figures = {
        "exact_match": _mean([row["exact_match"] for row in rows]),
        "field_match": _mean(every),
        **{f"field_match.{name}": _mean(hits) for name, hits in right.items()},
        "json_rate": _mean([row["valid_json"] for row in rows]),
        "num_rows": float(len(rows)),
        "invalid_json": float(sum(not row["valid_json"] for row in rows)),
    }
    return figures, rows


def _same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)  # true is not 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
