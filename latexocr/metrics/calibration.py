"""Whether a model knows when it is wrong: confidence against exact match, and from where on it should warn.

Why: a confidence of 0.9 is of use only if nine of ten such answers are right. Over bins of equally many answers,
sorted by confidence, the expected calibration error is the mean distance between what the answers claim (mean
confidence) and what they keep (share that is right).

A model trained to convergence is surer or less sure of a whole answer than it should be, always in the same
direction: one exponent, fitted on validation, mends it (`fitted_exponent`).

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks" (temperature scaling, here of the whole answer's
log probability); bins of equal mass: Nguyen & O'Connor 2015,
"Posterior calibration and exploratory analysis for natural language processing models".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from latexocr.errors import InputError

NUM_BINS = 10
SILENCED = 0.05  # share of the right answers that may be warned about
FEWEST_RIGHT = 20  # right answers; a 5% quantile of fewer says nothing, nor does an exponent fitted on them
EXPONENTS = np.geomspace(0.25, 4, 81)  # 1 is one of them; beyond, or finer, is noise


class Bin(NamedTuple):
    """Answers of similar confidence: how many, from where to where, the mean, and the share that is right."""

    num_rows: int
    low: float
    high: float
    confidence: float
    right: float


def reliability(confidences: Sequence[float], right: Sequence[bool], *, num_bins: int = NUM_BINS) -> list[Bin]:
    """The reliability table: answers sorted by confidence, in bins of equally many (up to one), the least sure first.

    No answers are no bins.

    Args:
        confidences: one an answer, 0 to 1.
        right: whether each answer is right.
        num_bins: as many at most: each has an answer at least.

    Raises:
        InputError: lists of different length.

    >>> [tuple(bin) for bin in reliability([0.5, 1.0, 0.25, 0.75], [False, True, False, True], num_bins=2)]
    [(2, 0.25, 0.5, 0.375, 0.0), (2, 0.75, 1.0, 0.875, 1.0)]
    """
    if len(confidences) != len(right):
        raise InputError(f"{len(confidences)} confidences for {len(right)} answers; give one for each")
    values, hits = np.asarray(confidences, dtype=float), np.asarray(right, dtype=float)
    order = np.argsort(values, kind="stable")
    parts = np.array_split(order, min(num_bins, len(order))) if len(order) else []
    return [
        Bin(len(rows), *map(float, (*values[rows[[0, -1]]], values[rows].mean(), hits[rows].mean()))) for rows in parts
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: mean over answers of |confidence - share right| of their bin; 0 is perfect.

    >>> calibration_error([Bin(3, 0.2, 0.4, 0.25, 0.5), Bin(1, 1.0, 1.0, 1.0, 1.0)])
    0.1875
    """
    return sum(bin.num_rows * abs(bin.confidence - bin.right) for bin in bins) / sum(bin.num_rows for bin in bins)


def calibration(confidences: Sequence[float], right: Sequence[bool]) -> dict[str, float]:
    """What stands in metrics.json; empty without answers.

    Returns:
        `calibration_error`; where so many answers are right that there is one, `min_confidence` (see
        `warning_threshold`); and where some are wrong too, `wrong_found`, the share of these that it finds, and
        `confidence_exponent` (see `fitted_exponent`). All but the exponent are of the confidences as given.
    """
    if not confidences:
        return {}
    found = {"calibration_error": calibration_error(reliability(confidences, right))}
    threshold = warning_threshold(confidences, right)
    if threshold is not None:
        found |= {"min_confidence": threshold}
        share = share_below(confidences, right, threshold)
        if share is not None:
            found |= {"wrong_found": share, "confidence_exponent": fitted_exponent(confidences, right)}
    return found


def warning_threshold(confidences: Sequence[float], right: Sequence[bool]) -> float | None:
    """The confidence that 95% of the right answers reach: what is below is worth a warning.

    One of twenty right answers is warned about for nothing; how many wrong ones are found is up to the model
    (`share_below`).

    Args:
        confidences: one an answer, 0 to 1.
        right: whether each answer is right.

    Returns:
        None where fewer than `FEWEST_RIGHT` answers are right.
    """
    found = [confidence for confidence, is_right in zip(confidences, right, strict=True) if is_right]
    return float(np.quantile(found, SILENCED)) if len(found) >= FEWEST_RIGHT else None


def fitted_exponent(confidences: Sequence[float], right: Sequence[bool]) -> float:
    """The power of the confidences that makes what happened likeliest: below 1 the model was less sure than it may be.

    One number cannot fit noise, and the order of the answers stays. Dividing by the length instead
    (confidence ** (1 / num_tokens)) made a model that reads print worse: calibration error 0.36 for 0.10.

    Args:
        confidences: one an answer, 0 to 1.
        right: whether each answer is right.

    >>> round(fitted_exponent([0.25] * 4, [True, True, False, False]), 2)  # 0.25 ** 0.5 is the half that is right
    0.5
    """
    powers = np.clip(confidences, 1e-9, 1 - 1e-9) ** EXPONENTS[:, None]  # certain and wrong is not beyond repair
    likelihoods = np.log(np.where(right, powers, 1 - powers)).sum(1)
    return float(EXPONENTS[likelihoods.argmax()])


def share_below(confidences: Sequence[float], right: Sequence[bool], threshold: float) -> float | None:
    """Share of the wrong answers whose confidence is below `threshold`; None where none is wrong.

    >>> share_below([0.1, 0.2, 0.9], [False, True, False], 0.5)
    0.5
    """
    wrong = [confidence for confidence, is_right in zip(confidences, right, strict=True) if not is_right]
    return float(np.mean([confidence < threshold for confidence in wrong])) if wrong else None
