"""Confidence against exact match: the reliability table, the calibration error, and where a warning begins."""

from __future__ import annotations

import pytest

from latexocr.errors import InputError
from latexocr.metrics.calibration import (
    Bin,
    calibration,
    calibration_error,
    fitted_exponent,
    reliability,
    warning_threshold,
)


def test_bins_hold_equally_many_answers_the_least_sure_first():
    confidences = [0.9, 0.1, 0.6, 0.2, 0.8]
    right = [True, False, False, True, True]
    assert reliability(confidences, right, num_bins=2) == [
        Bin(3, 0.1, 0.6, pytest.approx(0.3), pytest.approx(1 / 3)),
        Bin(2, 0.8, 0.9, pytest.approx(0.85), 1.0),
    ]
    assert [bin.num_rows for bin in reliability(confidences, right)] == [1] * 5  # never an empty one
    assert [bin.num_rows for bin in reliability([0.5] * 23, [True] * 23)] == [3] * 3 + [2] * 7
    assert reliability([], []) == []
    with pytest.raises(InputError, match="2 confidences for 1 answers"):
        reliability([0.1, 0.2], [True])


def test_the_error_is_weighted_by_the_number_of_answers():
    # |0.3 - 1/3| x 3/5 + |0.85 - 1| x 2/5
    bins = reliability([0.9, 0.1, 0.6, 0.2, 0.8], [True, False, False, True, True], num_bins=2)
    assert calibration_error(bins) == pytest.approx(0.02 + 0.06)


@pytest.mark.parametrize(
    ("claimed", "error"),
    [(0.75, 0.0), (1.0, 0.25), (0.25, 0.5)],  # right is three of four
)
def test_who_claims_what_he_keeps_has_no_error(claimed, error):
    right = [True, True, True, False] * 10
    assert calibration_error(reliability([claimed] * 40, right)) == pytest.approx(error)  # bins of four


def test_the_warning_spares_19_of_20_right_answers():
    # right answers are sure to 0.00, 0.01, ... 1.00: 95 of 100 steps lie above 0.05
    confidences = [number / 100 for number in range(101)]
    assert warning_threshold(confidences, [True] * 101) == pytest.approx(0.05)
    found = calibration([*confidences, 0.01, 0.03, 0.6, 0.9], [True] * 101 + [False] * 4)
    assert found["min_confidence"] == pytest.approx(0.05)
    assert found["wrong_found"] == 0.5


def test_the_exponent_makes_confidences_honest():
    half = [True, False] * 20
    assert fitted_exponent([0.25] * 40, half) == pytest.approx(0.5, rel=0.02)  # 0.25 ** 0.5 = 0.5
    assert fitted_exponent([0.5] * 40, half) == pytest.approx(1)
    assert fitted_exponent([0.9] * 40, half) == 4  # the greatest: 0.9 ** 6.6 would be needed
    assert calibration([0.25] * 40, half)["confidence_exponent"] == pytest.approx(0.5, rel=0.02)


def test_with_few_right_answers_there_is_no_threshold():
    assert warning_threshold([0.5] * 19, [True] * 19) is None
    assert warning_threshold([0.5] * 20, [True] * 20) == 0.5
    assert set(calibration([0.5] * 30, [True] * 19 + [False] * 11)) == {"calibration_error"}
    assert set(calibration([0.5] * 20, [True] * 20)) == {"calibration_error", "min_confidence"}  # none is wrong
    assert calibration([], []) == {}
