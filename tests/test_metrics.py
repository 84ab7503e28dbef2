"""`latexocr.metrics`: tables of literal strings, and invariants on random token soup."""

from __future__ import annotations

import doctest
import importlib
import random
import subprocess
import sys
import time

import pytest

from latexocr.errors import InputError
from latexocr.metrics import normalize, tokenize
from latexocr.metrics.canonical import level1
from latexocr.metrics.tokens import level0

TOKENS = [
    ("", []),
    ("  \n\t", []),
    (r"\alpha\beta x1", [r"\alpha", r"\beta", "x", "1"]),
    (r"x^{2}_i&", ["x", "^", "{", "2", "}", "_", "i", "&"]),
    (r"a\,b\;\\\{\|", ["a", r"\,", "b", r"\;", r"\\", r"\{", r"\|"]),
    ("a\\ b", ["a", "\\ ", "b"]),
    ("a\\\nb", ["a", "\\ ", "b"]),
    ("a\\", ["a", "\\ "]),
    (r"\operatorname * { l i m }", [r"\operatorname*", "{", "l", "i", "m", "}"]),
    (r"\sigma*", [r"\sigma", "*"]),
    (r"\begin { p matrix * }a\end{pmatrix*}", [r"\begin{pmatrix*}", "a", r"\end{pmatrix*}"]),
    (r"\begin x", [r"\begin", "x"]),
    ("公式%", ["公", "式", "%"]),
]


@pytest.mark.parametrize(("latex", "tokens"), TOKENS)
def test_tokenize(latex, tokens):
    assert tokenize(latex) == tokens
    assert tokenize(" ".join(tokens)) == tokens


LEVEL0 = [
    (" x+y ", "x + y"),
    ("x % a comment\n+ y", "x + y"),
    (r"50\% % of", r"5 0 \%"),
    (r"a\\% next row", r"a \\"),
    (r"x+y \label{eq:1}", "x + y"),
    (r"x \label y", "x y"),
    (r"\operatorname\label{a}*{lim}", r"\operatorname* { l i m }"),
    ("$x$", "x"),
    ("$$ x $$", "x"),
    (r"\[ $x$ \]", "x"),
    (r"\begin{equation*}x\end{equation*}", "x"),
    ("```latex\nx^2\n```", "x ^ 2"),
    ("```\n$$\nx\n$$\n```\n", "x"),
    ("```x```", "x"),
    ("$a$ and $b$", "$ a $ a n d $ b $"),
    (r"\[a\]\[b\]", r"\[ a \] \[ b \]"),
    ("$x", "$ x"),
    ("$", "$"),
    ("$$", ""),
]


@pytest.mark.parametrize(("latex", "expected"), LEVEL0)
def test_level0_strips_what_is_not_formula(latex, expected):
    assert normalize(latex, level=0) == expected
    assert normalize(expected, level=0) == expected


LEVEL1 = [
    ("x^2", "x ^ { 2 }"),
    ("x^2_i", "x _ { i } ^ { 2 }"),
    ("x^{{2}}", "x ^ { 2 }"),
    ("{x}", "x"),
    (r"{\alpha}+{{\beta}}", r"\alpha + \beta"),
    ("a{}b", "a b"),
    (r"\frac12", r"\frac { 1 } { 2 }"),
    (r"\frac123", r"\frac { 1 } { 2 } 3"),
    (r"\frac\alpha{bc}", r"\frac { \alpha } { b c }"),
    (r"x^\frac12", r"x ^ { \frac { 1 } { 2 } }"),
    (r"\sqrt x", r"\sqrt { x }"),
    (r"\sqrt[3]x", r"\sqrt [ 3 ] { x }"),
    (r"\sqrt[{[a]}]x", r"\sqrt [ { [ a ] } ] { x }"),
    (r"\hat x", r"\hat { x }"),
    ("f'", r"f ^ { \prime }"),
    (r"f''_i^2", r"f _ { i } ^ { \prime \prime 2 }"),
    (r"f^{\prime\prime}", r"f ^ { \prime \prime }"),
    ("^2", "{ } ^ { 2 }"),
    ("{}_a^b", "{ } _ { a } ^ { b }"),
    ("a{^2}", "a { } ^ { 2 }"),
    ("{x}^2", "x ^ { 2 }"),
    (r"{\mathrm d}^2", r"\mathrm { d } ^ { 2 }"),
    # braces that print something, or may
    ("{ab}^2", "{ a b } ^ { 2 }"),
    ("{x_i}^2", "{ x _ { i } } ^ { 2 }"),
    (r"{\sum}_i", r"{ \sum } _ { i }"),
    (r"{\hat x}^2", r"{ \hat { x } } ^ { 2 }"),
    (r"a{\bf x}y", r"a { \bf x } y"),
    (r"a{{\bf x}}", r"a { \bf x }"),
    (r"1+{a \over b}", r"1 + { a \over b }"),
    (r"x^{{a\over b}}", r"x ^ { a \over b }"),
    (r"\foo{ab}{c}d", r"\foo { a b } { c } d"),
    (r"\foo*[2]{ab}", r"\foo * [ 2 ] { a b }"),
    (r"\begin{foo}{ab}c\end{foo}", r"\begin{foo} { a b } c \end{foo}"),
    (r"a \\ {[}2pt]", r"a \\ { [ } 2 p t ]"),
    (r"a \\ {} [2pt]", r"a \\ { } [ 2 p t ]"),
    # braces that do not
    (r"a \\ {x} & {y}", r"a \\ x & y"),
    (r"\begin{pmatrix}{a}&b\end{pmatrix}^T", r"\begin{pmatrix} a & b \end{pmatrix} ^ { T }"),
    (r"\begin{array}{l@{}r}{a}&b\end{array}", r"\begin{array} { l @ { } r } a & b \end{array}"),
    (r"\left({a}\right)^2", r"\left ( a \right ) ^ { 2 }"),
    (r"\big{(}x\bigr)", r"\big ( x \bigr )"),
    (r"\text{if x}", r"\text { i f x }"),
    (r"\sum\limits_x^{y}", r"\sum \limits _ { x } ^ { y }"),
    (r"a\,^2", r"a \, { } ^ { 2 }"),
]


@pytest.mark.parametrize(("latex", "expected"), LEVEL1)
def test_level1_canonical_form(latex, expected):
    assert normalize(latex) == expected
    assert normalize(expected) == expected


DIFFERENT = [
    (r"\sqrt{a}t", r"\sqrt{at}"),
    ("a^{bc}", "a^bc"),
    ("x_i^2", "x_{i^2}"),
    (r"\frac{a}{b}c", r"\frac{a}{bc}"),
    (r"\frac123", r"\frac{12}{3}"),
    (r"{\bf x} y", r"{\bf x y}"),
    (r"{a \over b} c", r"{a \over b c}"),
    (r"\foo{ab}", r"\foo{a}b"),
    (r"\foo[2]{ab}", r"\foo[2]{a}b"),
    (r"{\sum}_i x", r"\sum_i x"),
    ("{x_i}^2", "x_i^2"),
    ("ab^2", "{ab}^2"),
    ("a{}^2", "a^2"),
    ("f'", "f''"),
    (r"f^{''}", "f''"),
    (r"\bar{x}", r"\overline{x}"),
    (r"\alpha t", r"\alphat"),
    (r"\\{}[2pt]", r"\\[2pt]"),
]


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_level1_keeps_different_formulas_apart(left, right):
    assert normalize(left) != normalize(right)


MALFORMED = [
    "{", "}", "a}b", r"\frac{1}", r"\sqrt[3", "x^", "x^2^3", "x_1_2", "x^2'", r"\left( a", r"a \right)",
    r"\begin{pmatrix} a", r"\begin{pmatrix} a \end{bmatrix}", r"\end{pmatrix}", r"\left", r"x^\foo{ab}",
    r"\text{a", "{" * 200 + "x" + "}" * 200,
]  # fmt: skip


@pytest.mark.parametrize("latex", MALFORMED)
def test_malformed_latex_falls_back_to_level_0(latex):
    assert level1(level0(latex)) is None
    assert normalize(latex) == normalize(latex, level=0) != ""


@pytest.mark.parametrize("latex", ["{" * 10**6, r"\hat" * 10**5, r"\label{" * 10**5, r"\foo[" * 10**5, "$" * 10**6])
def test_long_garbage_takes_linear_time(latex):
    started = time.process_time()
    assert normalize(latex)
    assert time.process_time() - started < 5  # well under one second; a quadratic pass would take hours


def test_random_token_soup_is_stable():
    pieces = (
        r"{ } { } ^ _ ' [ ] * & $ % a 2 \\ \begin{pmatrix} \end{pmatrix} \begin{foo} \end{foo} \left ( \right ) "
        r"\frac \sqrt \foo \alpha \sum \limits \bf \over \big \text \operatorname \label \mathrm \prime \[ \] \,"
    )
    generator = random.Random(0)
    num_parsed = 0
    for _ in range(20_000):
        latex = " ".join(generator.choices(pieces.split(), k=generator.randint(0, 10)))
        for level in (0, 1):
            once = normalize(latex, level)
            assert normalize(once, level) == once, latex
        num_parsed += level1(level0(latex)) is not None
    assert num_parsed > 1000


def test_unknown_level():
    with pytest.raises(InputError, match=r"level 2 is unknown; use one of 0, 1"):
        normalize("x", level=2)


def test_import_needs_neither_torch_nor_the_arithmetic():
    code = "import sys, latexocr.metrics; print([m for m in ('torch', 'sacrebleu', 'rapidfuzz') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize(("module", "num_examples"), [("canonical", 2), ("tokens", 1)])
def test_docstring_examples(module, num_examples):
    assert doctest.testmod(importlib.import_module(f"latexocr.metrics.{module}")) == (0, num_examples)
