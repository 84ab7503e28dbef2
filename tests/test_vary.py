r"""Letters, digits and symbols are exchanged; what is not printed, and the structure, never is."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import requires_tex

from latexocr.grammar import formulas
from latexocr.metrics import tokenize
from latexocr.vary import vary


def results(text: str, probability: float = 1.0) -> set[str]:
    return {vary(text, probability, np.random.default_rng(seed)) for seed in range(40)}


@pytest.mark.parametrize(
    ("text", "constant"),
    [
        (r"\begin{array}{lcr} a & b & c \end{array}", [r"\begin{array}{lcr} ", r" \end{array}"]),
        (r"\begin{array}[t]{ l r } a & b \end{array}", [r"\begin{array}[t]{ l r } "]),
        (r"\begin{aligned} x & = 1 \\ [ 2 p t ] y & = 2 \end{aligned}", [r"\\ [ 2 p t ] ", r"\begin{aligned} "]),
        (r"a \hspace { 3 m m } b", [r" \hspace { 3 m m } "]),
        (r"\operatorname { t r } A", [r"\operatorname { t r } "]),
        (r"\unknown { a b } c", [r"\unknown { a b } "]),
        (r"\color { r e d } x", [r"\color { r e d } "]),
        (r"\left< x \right> + \big/ y", [r"\left< ", r" \right> ", r" \big/ "]),
        (r"\not = x", [r"\not = "]),
        (r"\frac { a } { b } _ { i } ^ { 2 }", [r"\frac { ", " } { ", " } _ { ", " } ^ { "]),
    ],
)
def test_what_is_not_printed_stays(text, constant):
    found = results(text)
    assert len(found) > 10
    for varied in found:
        assert all(part in varied for part in constant), varied


@pytest.mark.parametrize("text", [r"a \hskip 1 0 p t b", r"\raise 2 p t x", r"a \kern 3 p t b", r"\char 6 5 x"])
def test_a_formula_of_low_level_commands_stays_as_it_is(text):
    assert results(text) == {text}


def test_a_token_becomes_one_of_its_kind():
    assert results("7") <= set("0123456789") and len(results("7")) > 5
    assert results(r"\mathcal { L }") <= {rf"\mathcal {{ {letter} }}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    assert results(r"{ \cal L }") <= {rf"{{ \cal {letter} }}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    assert results(r"\lim") <= {rf"\{name}" for name in ("lim", "max", "min", "sup", "inf", "det", "gcd")}
    assert results(", ; . | ( ) [ ]") == {", ; . | ( ) [ ]"}


def test_a_letter_is_sometimes_of_another_alphabet():
    found = results("x") | results(r"\alpha")
    assert any(text.isupper() for text in found if len(text) == 1) and any(len(text) > 1 for text in found)


def test_a_letter_behind_a_new_command_is_kept_apart():
    for varied in results("ab"):
        assert len(tokenize(varied)) == 2
    assert any(" " in varied for varied in results("ab"))


def test_half_of_the_formulas_are_changed_consistently():
    same = [len(set(_seeded("q q q q", seed).split())) == 1 for seed in range(400)]
    assert 150 < sum(same) < 250


def _seeded(text: str, seed: int, probability: float = 1.0) -> str:
    return vary(text, probability, np.random.default_rng(seed))


def test_the_probability_is_that_of_an_exchange():
    digits = "1 " * 20_000
    changed = [
        sum(token != "1" for token in varied) / 20_000
        for varied in (_seeded(digits, seed, 0.3).split() for seed in range(6))
    ]
    place_by_place = [share for share in changed if 0 < share < 1]
    assert place_by_place and all(abs(share - 0.27) < 0.02 for share in place_by_place)  # a tenth falls on itself
    assert results(digits, 0.0) == {digits}


def test_the_same_state_gives_the_same_formula():
    assert _seeded(r"\frac { a } { b } + x _ { i }", 3) == _seeded(r"\frac { a } { b } + x _ { i }", 3)


@requires_tex
def test_a_varied_formula_can_be_typeset_and_keeps_its_structure():
    from latexocr.render import render

    written = formulas(np.random.default_rng(0))
    texts = [next(written) for _ in range(400)]
    varied = [_seeded(text, seed) for seed, text in enumerate(texts)]
    assert [len(tokenize(text)) for text in varied] == [len(tokenize(text)) for text in texts]
    assert [one.error for one in render(varied)] == [None] * 400
