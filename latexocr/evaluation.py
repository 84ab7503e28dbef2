"""What an evaluation found: figures with intervals, rows, slices, and the comparison with another model.

Why a module of its own: `evaluate` makes one, `report` draws it, and neither needs the other's imports for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """Everything that is known about a file of predictions.

    Args:
        metrics: figures by name (see `latexocr.metrics.METRICS`), each with the ends of its 95% interval as NAME_low
            and NAME_high; `calibration_error`, `min_confidence` and others (see `latexocr.metrics.calibration`) where
            answers have a confidence; and counts: `num_rows`, `missing_predictions`, `unparsed_predictions`, ...
        rows: the predictions in file order, each with its own values beside `id`, `reference` and `prediction`:
            `exact_match`, `runaway` (0 or 1), `edit_distance`, `token_errors`, `bleu_sentence`, `length` (canonical
            tokens of the reference), `script_depth`, `structure` (list of words), and with pictures `renders`,
            `picture_match` (0 or 1) and `glyph_f1`; the last two are None where the reference does not render. With a
            baseline also `baseline_prediction` and `gain`, the baseline's edit distance less this one. Of JSON answers
            `exact_match`, `field_match`, `valid_json` and `wrong_fields`.
        slices: one dictionary a slice and metric: `by` (length, structure, script_depth, source; of JSON answers
            field), `slice`, `metric`, `value`, `low`, `high`, `num_rows`.
        engine: what drew the pictures, "latex" or "mathtext"; None when pictures were not compared.
        comparison: with a baseline, one dictionary a metric: `metric`, `a` (these predictions), `b` (the baseline),
            `difference` (a - b), `low`, `high`, and the numbers of rows that these predictions have `won` and `lost`.
        output_dir: where it was written, or None.
        reliability: bins of answers by confidence, see `latexocr.metrics.calibration.Bin`; empty without confidences.
        renderings: `latexocr.render.Rendering` of each text that was typeset for it; the report only has to draw them.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    slices: list[dict[str, Any]]
    engine: str | None = None
    comparison: list[dict[str, Any]] | None = None
    output_dir: Path | None = None
    reliability: list[dict[str, float]] = field(default_factory=list)
    renderings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def worst_first(self) -> list[int]:
        """Numbers of the rows, the worst first: wrong before right, then by `glyph_f1`, then by `edit_distance`; of
        JSON answers by `field_match`.
        """
        return sorted(range(len(self.rows)), key=lambda number: _badness(self.rows[number]))

    def __str__(self) -> str:
        compared = {} if self.comparison is None else {row["metric"]: row for row in self.comparison}
        fields = {f"field_match.{row['slice']}": row for row in self.slices if row["by"] == "field"}
        ends = {name: (row["low"], row["high"]) for name, row in fields.items()}
        for name in self.metrics.keys() - fields.keys():
            if f"{name}_low" in self.metrics:
                ends[name] = self.metrics[f"{name}_low"], self.metrics[f"{name}_high"]
        lines = [
            _line(name, value, ends.get(name), compared.get(name))
            for name, value in self.metrics.items()
            if name in fields or not name.endswith(("_low", "_high"))
        ]
        if self.engine == "mathtext":  # other glyphs, fewer formulas: not to be put beside figures by LaTeX
            lines.append("pictures are matplotlib's mathtext: the programs latex and dvipng are not installed")
        return "\n".join([*lines, *([f"written to {self.output_dir}"] if self.output_dir else [])])


def _badness(row: dict[str, Any]) -> tuple[float, float, float]:
    if "field_match" in row:
        return row["exact_match"], row["field_match"], 0.0
    glyph_f1 = row.get("glyph_f1")
    return row["exact_match"], 1.0 if glyph_f1 is None else glyph_f1, -row["edit_distance"]


def _line(name: str, value: float, ends: tuple[float, float] | None, compared: dict[str, Any] | None) -> str:
    text = f"{name:<26}{_short(value)}"
    if ends:
        text += f"  [{_short(ends[0])}, {_short(ends[1])}]"
    if compared:
        low, high = _short(compared["low"]), _short(compared["high"])
        text += f"  baseline {_short(compared['b'])}  difference {compared['difference']:+.4f} [{low}, {high}]"
        text += f"  won {compared['won']} lost {compared['lost']}"
    return text


def _short(value: float) -> str:
    value = round(value, 4) + 0.0  # no -0
    return f"{value:.4f}" if value % 1 else f"{value:g}"


def tidy(metrics: dict[str, Sequence[float]], **labels: Any) -> list[dict[str, Any]]:
    """One dictionary a metric of (value, low, high), with the same labels."""
    return [
        {**labels, "metric": name, "value": value, "low": low, "high": high}
        for name, (value, low, high) in metrics.items()
    ]
