"""`latexocr.metrics.score` and its parts, with figures to be checked by hand."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import pytest

from latexocr.errors import InputError
from latexocr.metrics import score
from latexocr.metrics.scores import bleu, edit_distance, edit_distance_chars, exact_match


def test_score_by_hand():
    predictions = [r"\frac12", "x _ i", "a + b", ""]
    references = [r"\frac{1}{2}", "x_{i}", "a + c", "z"]
    scores = score(predictions, references)
    assert list(scores) == [
        "exact_match", "exact_match_level0", "edit_distance", "edit_distance_chars", "bleu", "num_rows",
    ]  # fmt: skip
    assert scores["exact_match"] == 0.5  # the first two
    assert scores["exact_match_level0"] == 0.0
    assert scores["edit_distance"] == pytest.approx((0 + 0 + 1 / 3 + 1) / 4)
    assert scores["edit_distance_chars"] == pytest.approx((0 + 0 + 1 / 3 + 1) / 4)
    assert scores["num_rows"] == 4


def test_each_metric_alone_equals_score():
    predictions, references = ["a+b=c d", r"\alpha t"], ["a+b=c e", r"\alpha s"]
    scores = score(predictions, references)
    assert scores["exact_match"] == exact_match(predictions, references) == 0
    assert scores["exact_match_level0"] == exact_match(predictions, references, level=0)
    assert scores["edit_distance"] == edit_distance(predictions, references) == pytest.approx((1 / 6 + 1 / 2) / 2)
    # a blank counts between two letters only: "a+b=c d" has 7 characters, "\alpha t" 8
    assert edit_distance_chars(predictions, references) == pytest.approx((1 / 7 + 1 / 8) / 2)
    assert scores["bleu"] == bleu(predictions, references)


def test_bleu_is_sacrebleus_corpus_bleu_on_tokens():
    assert bleu(["a + b = c"], ["a+b=c"]) == pytest.approx(100)
    # 5 tokens, the last one wrong: precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty
    assert bleu(["a + b = d"], ["a + b = c"]) == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # without a 4-gram there is nothing to smooth
    assert bleu(["x"], ["x"]) == 0
    assert bleu([""], ["x"]) == 0


def test_two_empty_strings_are_equal():
    assert exact_match([""], [""]) == 1
    assert edit_distance([""], [""]) == 0


@pytest.mark.parametrize("metric", [score, exact_match, edit_distance, edit_distance_chars, bleu])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "0 rows"),
        (["x"], ["x", "y"], "1 predictions for 2 references"),
        (["x", None], ["x", "y"], "row 1: the prediction is NoneType, not a string"),
        (["x"], [2.0], "row 0: the reference is float, not a string"),
    ],
)
def test_bad_input(metric, predictions, references, message):
    with pytest.raises(InputError, match=message):
        metric(predictions, references)


def test_import_needs_neither_torch_nor_the_arithmetic():
    code = "import sys, latexocr.metrics; print([m for m in ('torch', 'sacrebleu', 'rapidfuzz') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize(("module", "num_examples"), [("scores", 5)])
def test_docstring_examples(module, num_examples):
    assert doctest.testmod(importlib.import_module(f"latexocr.metrics.{module}")) == (0, num_examples)
