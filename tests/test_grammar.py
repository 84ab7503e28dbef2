"""Formulas of the grammar are canonical, of every length, varied, and can be typeset."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from conftest import requires_tex

from latexocr.grammar import LENGTHS, formulas
from latexocr.metrics import normalize
from latexocr.render import render


def written(number: int, seed: int = 0, **options) -> list[str]:
    return list(islice(formulas(np.random.default_rng(seed), **options), number))


def test_the_seed_decides():
    assert written(20) == written(20)
    assert written(20) != written(20, seed=1)


def test_they_are_canonical():
    texts = written(500)
    assert [normalize(text) for text in texts] == texts


def test_lengths_are_as_announced():
    lengths = [len(text.split()) for text in written(2000)]
    assert min(lengths) >= 1 and max(lengths) <= 150
    for (shortest, longest), percent in LENGTHS.items():
        share = 100 * sum(shortest <= length <= longest for length in lengths) / 2000
        assert abs(share - percent) < 4, (shortest, longest, share)


@pytest.mark.parametrize("max_tokens", [1, 3, 20])
def test_max_tokens_holds(max_tokens):
    assert max(len(text.split()) for text in written(300, max_tokens=max_tokens)) <= max_tokens


def test_they_are_varied():
    texts = written(2000)
    assert len(set(texts)) > 1800
    tokens = {token for text in texts for token in text.split()}
    assert len(tokens) > 200
    assert {r"\begin{matrix}", r"\begin{cases}", r"\begin{aligned}", r"\frac", r"\sqrt", r"\int", r"\left"} <= tokens


def test_mathtext_sets_what_is_written_for_it():
    texts = written(100, tex=False)
    assert not any(r"\begin" in text for text in texts)
    assert [one.error for one in render(texts, engine="mathtext")] == [None] * 100


@requires_tex
def test_tex_sets_everything():
    assert [one.error for one in render(written(2000))] == [None] * 2000
