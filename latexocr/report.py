"""report.html: how good the model is, where it fails, and every formula from worst to best, to look at.

Why: a figure says how often a model is wrong, only the rows say how. The page holds everything itself
(`latexocr.page`): it can be copied, sent and kept. What is drawn is worked out here; the script only filters, sorts
and shows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from latexocr.evaluation import Evaluation
from latexocr.metrics.scores import METRICS
from latexocr.metrics.slices import members
from latexocr.page import PRINT_DPI, Pictures, stored_picture, write_page
from latexocr.pictures import PictureError

MAX_ROWS = 10_000  # in the gallery: the worst ones
MAX_TOKENS = 600  # of a text that are shown: a runaway answer has thousands
MAX_CONFUSIONS = 16  # pairs of tokens; half as many that were left out, and that were made up
BRACES = frozenset("{}")  # they come and go with the scripts and arguments that need them
PICTURE_BYTES = 16 << 20  # for all photographs together: with few rows each may be large
MOST_BYTES = 200_000  # for one of them


# The headline, in this order, as far as the evaluation has them; all metrics are in the table of all figures.
HEADLINE = {
    "exact_match": ("Exact match", "same tokens once normalised"),
    "exprate_1": ("At most 1 error", "one token wrong, or none"),
    "picture_match": ("Picture match", "prints the very same picture"),
    "glyph_f1": ("Glyph F1", "right symbols in their places"),
    "bleu": ("BLEU", "corpus BLEU-4 on tokens"),
    "edit_distance": ("Edit distance", "share of tokens to change"),
    "render_rate": ("Renders", "predictions that TeX accepts"),
    "runaway_rate": ("Runaway", "endless or repeating answers"),
}
# Figures that are no metrics of `latexocr.metrics.scores`.
OTHER_FIGURES = {
    "calibration_error": "distance of confidence and share right (level 2), mean over 10 bins of equally many answers",
    "min_confidence": "95% of the right answers are at least as sure: below it, a warning is in place",
    "wrong_found": "share of the wrong answers that are less sure than that",
    "confidence_exponent": "power of the confidences that would make them honest; 1 where they are",
}
# Row values that the gallery shows, filters and sorts by.
ROW_VALUES = ("exact_match", "token_errors", "edit_distance", "bleu_sentence", "glyph_f1", "picture_match", "renders",
              "runaway", "length", "num_tokens", "confidence", "gain")  # fmt: skip
ERROR_BUCKETS = ((1, 1), (2, 2), (3, 3), (4, 5), (6, 10), (11, 20), (21, math.inf))


class Difference(NamedTuple):
    """A prediction against its reference, in canonical tokens."""

    confused: list[tuple[str, str]]  # (reference's token, prediction's token), "" for none
    pieces: list[tuple[bool, list[str], list[str]]]  # (same, prediction's tokens, reference's tokens)


def write_report(evaluation: Evaluation, path: Path) -> None:
    """Write one HTML file that shows an evaluation and needs nothing else.

    The gallery holds the `MAX_ROWS` worst rows; figures and charts are of all rows. Formulas are drawn by
    `latexocr.render`; where the evaluation compared no pictures, there are the texts only.

    Args:
        evaluation: metrics, rows with their values, slices.
        path: the file, such as report.html.
    """
    texts = ("prediction", "baseline_prediction")  # None where one is missing
    answered = [{**row, **{key: row[key] or "" for key in texts if key in row}} for row in evaluation.rows]
    differences = [difference(row["prediction"], row["reference"]) for row in answered]
    order = evaluation.worst_first()[:MAX_ROWS]
    rows = [answered[number] for number in order]
    confusions = most_confused(found.confused for found in differences)
    slices = _slices(evaluation.slices)
    places_of_row = _slices_of_rows(evaluation.rows, list(slices))
    pictures = Pictures()
    data = {
        "engine": evaluation.engine,
        "num_rows": len(evaluation.rows),
        "headline": _headline(evaluation.metrics),
        "metrics": _all_figures(evaluation.metrics),
        "slices": list(slices.values()),
        "errors": _error_histogram(evaluation.rows),
        "confusions": [[*pair, count] for pair, count in confusions],
        "comparison": _comparison(evaluation.comparison),
        "confidence": _confidence(evaluation),
        "rows": {
            **_texts(rows, [differences[number] for number in order]),
            **_values(rows),
            "slices": [places_of_row[number] for number in order],
            "confusions": [_places(differences[number].confused, confusions) for number in order],
            **_photographs(rows, pictures),
            **(_drawings(rows, evaluation, pictures) if evaluation.engine else {}),
        },
    }  # fmt: skip
    title = evaluation.output_dir.resolve().name if evaluation.output_dir else "Evaluation"
    write_page(path, name="report", title=title, data=data, pictures=pictures)


# --- texts ------------------------------------------------------------------------------------------------


def difference(prediction: str, reference: str) -> Difference:
    r"""What differs, by Levenshtein's alignment of the canonical tokens (level 1).

    >>> difference(r"\phi^2", r"\varphi ^ 2").confused
    [('\\varphi', '\\phi')]
    """
    from rapidfuzz.distance import Levenshtein

    from latexocr.metrics.canonical import normalized_tokens

    ours, theirs = normalized_tokens(prediction), normalized_tokens(reference)
    operations = Levenshtein.editops(ours, theirs)
    confused = [
        ("" if step.tag == "delete" else theirs[step.dest_pos], "" if step.tag == "insert" else ours[step.src_pos])
        for step in operations
    ]
    pieces = [
        (step.tag == "equal", ours[step.src_start : step.src_end], theirs[step.dest_start : step.dest_end])
        for step in operations.as_opcodes()
    ]
    merged = []
    for same, group in groupby(pieces, key=itemgetter(0)):  # neighbouring differences are one to the eye
        _, left, right = zip(*group, strict=True)
        merged.append((same, [*chain(*left)], [*chain(*right)]))
    return Difference(confused, merged)


def most_confused(confused: Iterable[Sequence[tuple[str, str]]]) -> list[tuple[tuple[str, str], int]]:
    """The commonest pairs of tokens, and in how many rows: one runaway row counts once, not a thousand times.

    >>> most_confused([[("x", "y"), ("x", "y")], [("x", "y"), ("a", "")]])
    [(('x', 'y'), 2), (('a', ''), 1)]
    """
    counts = Counter(pair for pairs in confused for pair in dict.fromkeys(pairs) if not BRACES & {*pair})
    kept = []
    room = {(True, True): MAX_CONFUSIONS, (True, False): MAX_CONFUSIONS // 2, (False, True): MAX_CONFUSIONS // 2}
    for (reference, prediction), count in counts.most_common():
        kind = bool(reference), bool(prediction)
        if room[kind]:
            room[kind] -= 1
            kept.append(((reference, prediction), count))
    return kept


def _texts(rows: list[dict], differences: list[Difference]) -> dict[str, list]:
    """Per row: id, both texts as they came, and the pieces of their difference as [same, prediction, reference]."""
    return {
        "id": [str(row.get("id", number)) for number, row in enumerate(rows)],
        "prediction": [_cut(row["prediction"]) for row in rows],
        "reference": [_cut(row["reference"]) for row in rows],
        "pieces": [_cut_pieces(found.pieces) for found in differences],
        **({"baseline_prediction": [_cut(row["baseline_prediction"]) for row in rows]} if _has_baseline(rows) else {}),
    }


def _has_baseline(rows: list[dict]) -> bool:
    return any("baseline_prediction" in row for row in rows)


def _cut(text: str) -> str:
    most = 4 * MAX_TOKENS
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def _cut_pieces(pieces: list[tuple[bool, list[str], list[str]]]) -> list[list]:
    """The pieces as texts, at most `MAX_TOKENS` tokens on each side; what was left out is said."""
    shown, room = [], MAX_TOKENS
    for same, ours, theirs in pieces:
        if room <= 0:
            left = sum(max(len(ours), len(theirs)) for _, ours, theirs in pieces) - MAX_TOKENS
            return [*shown, [1, f"… ({left:,} more tokens)"]]
        ours, theirs = (_some(side, room) for side in (ours, theirs))
        shown.append([1, " ".join(ours)] if same else [0, " ".join(ours), " ".join(theirs)])
        room -= max(len(ours), len(theirs))
    return shown


def _some(tokens: list[str], room: int) -> list[str]:
    return tokens if len(tokens) <= room else [*tokens[:room], f"… ({len(tokens) - room:,} more tokens)"]


def _places(confused: list[tuple[str, str]], confusions: list[tuple[tuple[str, str], int]]) -> list[int]:
    return [number for number, (pair, _) in enumerate(confusions) if pair in confused]


# --- figures ----------------------------------------------------------------------------------------------


def _headline(metrics: dict[str, float]) -> list[dict]:
    return [
        {"name": name, "label": label, "what": what, **_figure(metrics, name)}
        for name, (label, what) in HEADLINE.items()
        if name in metrics
    ]


def _figure(metrics: dict[str, float], name: str) -> dict:
    """Value, interval, and how it is to be read; `share`: a fraction that is shown as a percentage."""
    metric = METRICS.get(name)
    ends = {"value": "", "from": "_low", "to": "_high"}
    return {
        **{key: _number(metrics.get(f"{name}{end}")) for key, end in ends.items()},
        "share": metric is not None and not name.startswith("bleu"),
        "better": metric and metric.better,
    }


def _all_figures(metrics: dict[str, float]) -> list[dict]:
    ends = {f"{name}{end}" for name in metrics for end in ("_low", "_high")}
    meanings = {**OTHER_FIGURES, **{name: metric.what for name, metric in METRICS.items()}}
    return [
        {"name": name, **_figure(metrics, name), "what": meanings.get(name, "")}
        for name in metrics
        if name not in ends
    ]


def _comparison(entries: list[dict] | None) -> list[dict] | None:
    return entries and [{**entry, "better": METRICS[entry["metric"]].better} for entry in entries]


def _confidence(evaluation: Evaluation) -> dict | None:
    """The reliability table, and its figures; None without confidences."""
    if not evaluation.reliability:
        return None
    bins = [{name: _number(value) for name, value in bin.items()} for bin in evaluation.reliability]
    return {"bins": bins, **{name: _number(evaluation.metrics.get(name)) for name in OTHER_FIGURES}}


def _slices(slices: list[dict]) -> dict[tuple[str, str], dict]:
    """One entry a slice, in order, with all its metrics as [value, low, high]."""
    found: dict[tuple[str, str], dict] = {}
    for row in slices:
        key = row["by"], row["slice"]
        entry = found.setdefault(key, {"by": key[0], "slice": key[1], "num_rows": row["num_rows"], "metrics": {}})
        entry["metrics"][row["metric"]] = [_number(row[name]) for name in ("value", "low", "high")]
    return found


def _slices_of_rows(rows: list[dict], slices: list[tuple[str, str]]) -> list[list[int]]:
    """For each row the places of the slices that it is in."""
    found: list[list[int]] = [[] for _ in rows]
    numbers = members(rows)
    for place, key in enumerate(slices):
        for number in numbers.get(key, ()):
            found[number].append(place)
    return found


def _error_histogram(rows: list[dict]) -> dict:
    """How many rows have how many token errors; the ones without are counted apart, they would hide the others."""
    errors = [row["token_errors"] for row in rows]
    buckets = [
        {
            "name": f"{low}" if low == high else f"{low}+" if high == math.inf else f"{low}–{high}",
            "from": low,
            "to": _number(high),
            "num_rows": sum(low <= error <= high for error in errors),
        }
        for low, high in ERROR_BUCKETS
    ]
    return {"without": errors.count(0), "buckets": buckets}


def _values(rows: list[dict]) -> dict[str, list]:
    """The columns of `ROW_VALUES` that some row has."""
    return {name: [_number(row.get(name)) for row in rows] for name in ROW_VALUES if any(name in row for row in rows)}


def _number(value: float | bool | None) -> float | int | None:
    """As JSON knows it, in few characters."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if value == int(value) else round(float(value), 4)


# --- pictures ---------------------------------------------------------------------------------------------


def _photographs(rows: list[dict], pictures: Pictures) -> dict[str, list]:
    """Each row's own picture; None where there is none, or not any more."""
    if not any(row.get("image_path") for row in rows):
        return {}
    max_bytes = min(MOST_BYTES, PICTURE_BYTES // len(rows))
    places: dict[str, int | None] = {}
    for row in rows:
        file = row.get("image_path")
        if file and file not in places:
            try:
                places[file] = pictures.add(stored_picture(Path(file), max_bytes))
            except (OSError, PictureError, ValueError):  # ValueError: a path with a NUL character
                places[file] = None
    return {"picture": [places.get(row.get("image_path")) for row in rows]}


def _drawings(rows: list[dict], evaluation: Evaluation, pictures: Pictures) -> dict[str, list]:
    """Prediction, reference and baseline as TeX prints them, each formula once; None where it does not."""
    from latexocr.render import draw, render

    keys = ("prediction", "reference", *(["baseline_prediction"] if _has_baseline(rows) else []))
    formulas = list(dict.fromkeys(row[key] for row in rows for key in keys))
    missing = [text for text in formulas if text not in evaluation.renderings]
    known = {**evaluation.renderings, **dict(zip(missing, render(missing, engine=evaluation.engine), strict=True))}
    drawn = draw([known[text] for text in formulas], dpi=PRINT_DPI)
    places = dict(zip(formulas, map(pictures.add_print, drawn), strict=True))
    return {f"{key}_drawn": [places[row[key]] for row in rows] for key in keys}
