"""Figures with 95% intervals, and differences between two models, from what every row adds to every metric.

Why: 0.83 on 200 formulas may be 0.77 or 0.88 on the next 200, and two models that differ by a point may be equals.
The bootstrap asks how far a figure moves when the rows are drawn again, with replacement, from themselves. A metric
is a function of sums over rows (see `latexocr.metrics.scores.Metric`), so a resample is a row of weights, all
resamples of all metrics are one matrix product, and corpus BLEU costs no more than a mean.

Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentile interval); Koehn 2004,
"Statistical Significance Tests for Machine Translation Evaluation" (paired: the same resamples for both systems).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from latexocr.metrics.scores import Metric, metrics_of

NUM_RESAMPLES = 1000
SEED = 0
_AT_ONCE = 50  # resamples whose weights are held in memory: 50 x rows x 8 bytes


class Estimate(NamedTuple):
    """A figure and the ends of its 95% interval."""

    value: float
    low: float
    high: float


class Table:
    """What every row adds to every metric, side by side.

    Args:
        pairs: predictions and references; they decide which metrics there are.
        metrics: others, of whatever `pairs` then is (`latexocr.metrics.fields`).
    """

    def __init__(self, pairs: Any, metrics: Sequence[Metric] | None = None) -> None:
        self.metrics = metrics_of(pairs) if metrics is None else list(metrics)
        parts = [metric.per_row(pairs) for metric in self.metrics]
        self.matrix = np.concatenate(parts, axis=1)  # (rows, columns of all metrics)
        stops = np.cumsum([part.shape[1] for part in parts])
        self._spans = [slice(stop - part.shape[1], stop) for stop, part in zip(stops, parts, strict=True)]

    def estimates(self, chosen: Sequence[int] | None = None) -> dict[str, Estimate]:
        """Every metric over all rows, or over the chosen ones, with its interval.

        A metric without a value there (no reference renders, say) is left out. An interval is of no width where all
        rows agree: the bootstrap knows nothing of errors that it has not seen.

        Args:
            chosen: row numbers.
        """
        matrix = self.matrix if chosen is None else self.matrix[chosen]
        values, resamples = self._values(matrix.sum(axis=0)), self._values(resampled_sums(matrix))
        names = [name for name, value in values.items() if not np.isnan(value)]
        lows, highs = interval(np.array([resamples[name] for name in names]))
        return {
            name: Estimate(float(values[name]), float(low), float(high))
            for name, low, high in zip(names, lows, highs, strict=True)
        }

    def row_values(self) -> dict[str, np.ndarray]:
        """Every metric of each row alone: (rows,), NaN where the row has none."""
        return {metric.name: metric.of_row(self.matrix[:, span]) for metric, span in self._columns()}

    def compare(self, baseline: Table) -> list[dict[str, float | str]]:
        """This table against another one of the same rows, see `Evaluation.comparison`."""
        width = self.matrix.shape[1]
        both = np.concatenate([self.matrix, baseline.matrix], axis=1)  # one resample draws the same rows of both
        sums, resamples = both.sum(axis=0), resampled_sums(both)
        rows, other_rows = self.row_values(), baseline.row_values()
        compared = []
        for metric, span in self._columns():
            a, b = metric.value(sums[:width][span]), metric.value(sums[width:][span])
            if np.isnan(a) or np.isnan(b):
                continue
            differences = metric.value(resamples[:, :width][:, span]) - metric.value(resamples[:, width:][:, span])
            low, high = interval(differences)
            gain = (rows[metric.name] - other_rows[metric.name]) * (1 if metric.better == "higher" else -1)
            compared.append({
                "metric": metric.name, "a": float(a), "b": float(b), "difference": float(a - b), "low": float(low),
                "high": float(high), "won": int((gain > _EQUAL).sum()), "lost": int((gain < -_EQUAL).sum()),
            })  # fmt: skip
        return compared

    def _values(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        return {metric.name: metric.value(sums[..., span]) for metric, span in self._columns()}

    def _columns(self) -> list[tuple[Metric, slice]]:
        return list(zip(self.metrics, self._spans, strict=True))


_EQUAL = 1e-9  # rows whose values differ by rounding only are neither won nor lost


def resampled_sums(matrix: np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Column sums over rows drawn with replacement: (rows, columns) -> (num_resamples, columns).

    The same seed and number of rows draw the same rows, so two models' tables are resampled alike.
    """
    num_rows = len(matrix)
    generator = np.random.default_rng(seed)
    sums = np.empty((num_resamples, matrix.shape[1]))
    for start in range(0, num_resamples, _AT_ONCE):
        size = min(_AT_ONCE, num_resamples - start)
        drawn = generator.integers(num_rows, size=(size, num_rows)) + num_rows * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * num_rows).reshape(size, num_rows)
        sums[start : start + size] = weights @ matrix
    return sums


def interval(resamples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the middle 95% of resampled values: (..., resamples) -> (...), (...); NaN, no value, is passed over."""
    low, high = np.nanquantile(resamples, (0.025, 0.975), axis=-1)
    return low, high
