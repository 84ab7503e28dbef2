"""`latexocr.metrics.normalize`: tables of literal strings, random token soup, and what LaTeX prints."""

from __future__ import annotations

import doctest
import gzip
import importlib
import json
import random
import time
from pathlib import Path

import pytest
from conftest import SAMPLE, requires_tex

from latexocr.errors import InputError
from latexocr.metrics import normalize, symbols, tokenize
from latexocr.metrics.canonical import is_formula

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
    (r"x \label y z", "x z"),  # TeX takes the next token
    (r"x \label", "x"),
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
    (r"{\hat{\bar x}}^2", r"{ \hat { \bar { x } } } ^ { 2 }"),
    (r"{\underbrace x}_2", r"{ \underbrace { x } } _ { 2 }"),
    (r"{\dag}_2", r"{ \dagger } _ { 2 }"),
    (r"a{\color{red} x}y", r"a { \color { red } x } y".replace("red", "r e d")),
    (r"a{{\scriptstyle x}}", r"a { \scriptstyle x }"),
    (r"1+{a \atop b}", r"1 + { a \atop b }"),
    (r"x^{{a\atop b}}", r"x ^ { a \atop b }"),
    (r"\foo{ab}{c}d", r"\foo { a b } { c } d"),
    (r"\foo*[2]{ab}", r"\foo * [ 2 ] { a b }"),
    (r"\begin{foo}{ab}c\end{foo}", r"\begin{foo} { a b } c \end{foo}"),
    (r"a \\ {[}2pt]", r"a \\ { } [ 2 p t ]"),
    (r"a \\ {} [2pt]", r"a \\ { } [ 2 p t ]"),
    # braces that do not
    (r"a \\ {x} & {y}", r"a \\ x & y"),
    (r"{\frac ab}^2", r"\frac { a } { b } ^ { 2 }"),
    (r"{\hat x}^2", r"\hat { x } ^ { 2 }"),
    (r"\left({a}\right)^2", r"\left ( a \right ) ^ { 2 }"),
    (r"\left.a\right.", "a"),
    (r"\mathrel{=}", "="),
    # one spelling
    (r"a\le b\to c", r"a \leq b \to c"),
    (r"\big{<}x\bigr\rbrack", r"\big \langle x \big ]"),
    (r"\left\lbrace x\right\Vert", r"\left \{ x \right \|"),
    (r"x\not{=}y\not{\in}z", r"x \neq y \not \in z"),
    (r"x^\dag+\dag_1", r"x ^ { \dagger } + \dag _ { 1 }"),
    (r"a+\dots+b,\dots,c", r"a + \cdots + b , \ldots , c"),
    ("a~b\\ c", "a ~ b ~ c"),
    (r"\root 3 \of x", r"\sqrt [ 3 ] { x }"),
    (r"\operatorname{sin}x+\mathrm{Ext}+\text{if}", r"\sin x + \mathrm { E x t } + \mathrm { i f }"),
    (r"\operatorname*{lim}_x\operatorname{lim}_x", r"\lim _ { x } \mathrm { l i m } _ { x }"),
    (r"\mathop{\mathrm{Ext}}", r"\operatorname* { E x t }"),
    (r"\text{a-b}\mbox{a-b}", r"\text { a - b } \text { a - b }"),
    (r"\textbf{ab}x^{\mbox{a}}", r"\mathbf { a b } x ^ { \mbox { a } }"),  # \mbox does not shrink
    # infix fractions and switches
    (r"1+{a \over b}", r"1 + \frac { a } { b }"),
    (r"a+1 \over b", r"\frac { a + 1 } { b }"),
    (r"x^{a\over b}", r"x ^ { \frac { a } { b } }"),
    (r"{n \choose k}", r"\binom { n } { k }"),
    (r"{\bf a \over b}", r"\frac { \mathbf { a } } { \mathbf { b } }"),
    (r"\left(a \over b\right)", r"\left ( \frac { a } { b } \right )"),
    (r"a{\bf x}y", r"a \mathbf { x } y"),
    (r"{\bf x}^2", r"\mathbf { x } ^ { 2 }"),
    (r"{\rm d \bf x}{\cal L}", r"\mathrm { d } \mathbf { x } \mathcal { L }"),
    (r"a & {\rm b} \over c", r"a & \frac { \mathrm { b } } { c }"),
    # what is the default in its place
    (r"\displaystyle x", "x"),
    (r"\frac{\displaystyle x}{\textstyle y}", r"\frac { \displaystyle x } { \textstyle y }"),  # y would be cramped
    (r"\sum\limits_x^{y}", r"\sum _ { x } ^ { y }"),
    (r"\int\limits_x", r"\int \limits _ { x }"),
    (r"x^{\sum\nolimits_y\sum\limits_z}", r"x ^ { \sum _ { y } \sum \limits _ { z } }"),
    (r"\dfrac{\dfrac ab}c", r"\frac { \dfrac { a } { b } } { c }"),
    (r"x\nonumber\relax", "x"),
    # tables
    (r"\begin{pmatrix}{a}&b\end{pmatrix}^T", r"\left ( \begin{matrix} a & b \end{matrix} \right ) ^ { T }"),
    (r"\left(\begin{array}{cc}a&b\\\end{array}\right)", r"\left ( \begin{matrix} a & b \end{matrix} \right )"),
    (r"\begin{array}{c}a\end{array}_1", r"{ \begin{matrix} a \end{matrix} } _ { 1 }"),
    (r"\begin{matrix}a\end{matrix}_1", r"\begin{matrix} a \end{matrix} { } _ { 1 }"),  # it ends with a space
    (r"\begin{array}{l@{}r}{a}&b\end{array}", r"\begin{array} { l r } a & b \end{array}"),
    (r"\begin{array}{*{2}{c}|c}a&b&c\end{array}", r"\begin{array} { c c | c } a & b & c \end{array}"),
    (r"\begin{array}{c}a\\[2pt]b\end{array}", r"\begin{array} { c } a \\ [ 2 p t ] b \end{array}"),
    (r"\begin{array}{c}a\cr\hline\end{array}", r"\begin{matrix} a \\ \hline \end{matrix}"),
    (r"\begin{array}{c}a\\\\\end{array}", r"\begin{matrix} a \\ \\ \end{matrix}"),
    (r"\begin{pmatrix}* & *\\ * & *\end{pmatrix}",
     r"\left ( \begin{matrix} \ast & \ast \\ \ast & \ast \end{matrix} \right )"),
    (r"\begin{aligned}[t]a&=b\\\end{aligned}", r"\begin{aligned} [ t ] a & = b \end{aligned}"),
    (r"\begin{aligned}{[}t]\end{aligned}", r"\begin{aligned} { } [ t ] \end{aligned}"),
    (r"a\,^2", r"a \, { } ^ { 2 }"),
]  # fmt: skip


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
    (r"\begin{pmatrix}a&b\end{pmatrix}", r"\begin{bmatrix}a&b\end{bmatrix}"),
    (r"\begin{pmatrix}a&b\\c&d\end{pmatrix}", r"\begin{pmatrix}a&c\\b&d\end{pmatrix}"),
    (r"\begin{array}{c|c}a&b\end{array}", r"\begin{array}{cc}a&b\end{array}"),
    (r"\cdots", r"\ldots"),
    (r"\mathrm{d}x", "dx"),
    (r"\mathbf{x}", r"\mathbb{x}"),
    (r"\phi", r"\varphi"),
    (r"a \over b", "{a b}"),
    (r"n \choose k", r"n \over k"),
]


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_different_formulas_stay_apart(left, right, level):
    assert normalize(left, level) != normalize(right, level)


@pytest.mark.parametrize(("left", "right"), [(r"\\{}[2pt]", r"\\[2pt]"), (r"\left(a\right)", "(a)"), ("a b", r"a\,b")])
def test_only_level1_sees_vertical_space_sizes_and_explicit_space(left, right):
    assert normalize(left) != normalize(right)


LEVEL2 = [
    (r"\left(\frac12\right)^2", r"( \frac { 1 } { 2 } ) ^ { 2 }"),
    (r"\left. x \middle| y \right|_0", "x | y | _ { 0 }"),
    (r"\left\{ a \right.^2", r"{ \{ a } ^ { 2 }"),
    (r"\Bigl( x \Bigr)", "( x )"),
    (r"a\,\quad b \hspace{1em}\phantom{c}\hskip 2pt d", "a b d"),
    (r"\dfrac ab+\tfrac ab+\cfrac ab", r"\frac { a } { b } + \frac { a } { b } + \frac { a } { b }"),
    (r"\textstyle\int\limits_a {\scriptstyle x}", r"\int _ { a } x"),
    (r"\operatorname{max}+\mathrm{max}+\text{max}+\mathop{\rm max}", r"\max + \max + \max + \max"),
    (r"\operatorname*{Ext}_A+\text{ no ~ ne}", r"\mathrm { E x t } _ { A } + \mathrm { n o n e }"),
    (r"\stackrel{a}{=}\not\in", r"\overset { a } { = } \notin"),
    (r"\begin{aligned}a&=b\\[2pt]&=c\end{aligned}", r"\begin{matrix} a & = b \\ & = c \end{matrix}"),
    (r"\begin{align*}a&=b\end{align*}", "a = b"),
    (r"\begin{array}{lr}a&b\end{array}", r"\begin{matrix} a & b \end{matrix}"),
    (r"\begin{array}{l|p{1cm}}a&b\end{array}", r"\begin{array} { c | c } a & b \end{array}"),
    (r"\begin{array}{l}a+b\end{array}", "a + b"),
    (r"\begin{cases}a&b\\c&d\end{cases}", r"\{ \begin{matrix} a & b \\ c & d \end{matrix}"),
    (r"\begin{pmatrix}a&b\end{pmatrix}", r"( \begin{matrix} a & b \end{matrix} )"),
]


@pytest.mark.parametrize(("latex", "expected"), LEVEL2)
def test_level2_canonical_form(latex, expected):
    assert normalize(latex, level=2) == expected
    assert normalize(normalize(latex), level=2) == expected
    assert normalize(expected, level=2) == expected


MALFORMED = [
    "{", "}", "a}b", "$a$ and $b$", r"a \over b \over c", r"\left(a \over b", r"\root 3 x", r"\limits_a",
    r"a \middle| b", r"{\bf a \scriptstyle b \rm c}",
    r"\frac{1}", r"\sqrt[3", "x^", "x^2^3", "x_1_2", "x^2'", r"\left( a", r"a \right)",
    r"\begin{pmatrix} a", r"\begin{pmatrix} a \end{bmatrix}", r"\end{pmatrix}", r"\left", r"x^\foo{ab}",
    r"\text{a", "{" * 200 + "x" + "}" * 200,
]  # fmt: skip


@pytest.mark.parametrize("latex", MALFORMED)
def test_malformed_latex_falls_back_to_level_0(latex):
    assert not is_formula(latex)
    assert normalize(latex) == normalize(latex, level=0) != ""


def test_well_formed_latex_is_a_formula():
    assert is_formula("") and is_formula(r"$\frac12$") and is_formula("{" * 70 + "x" + "}" * 70)


GARBAGE = [
    "{" * 10**6, r"\hat" * 10**5, r"\label{" * 10**5, r"\foo[" * 10**5, "$" * 10**6, "'" * 10**6, r"\bf x" * 10**5,
    r"\left" * 10**5, r"\left(" * 10**5, r"{a \over" * 10**5, r"\\[1" * 10**5, r"\hskip" * 10**5, r"\root" * 10**5,
    r"\begin{matrix}" * 10**5, r"\begin{array}{*{99}{" + "c" * 10**6 + r"}}\end{array}",
]  # fmt: skip


@pytest.mark.parametrize("latex", GARBAGE, ids=lambda latex: latex[:12])
def test_long_garbage_takes_linear_time(latex):
    started = time.process_time()
    assert normalize(latex)
    normalize(latex, level=2)
    assert time.process_time() - started < 5  # well under one second; a quadratic pass would take hours


def test_random_token_soup_is_stable():
    pieces = r"""
        { } { } ^ _ ' [ ] * & $ % a 2 x = . | < \\ \cr ( ) \begin{pmatrix} \end{pmatrix} \begin{foo} \end{foo}
        \left( \right) \begin{array}{cc} \begin{array}{l|c} \end{array} \begin{aligned} \end{aligned}
        \begin{matrix} \end{matrix} \left. \right. \middle| \frac \dfrac \sqrt \foo \alpha \sum \limits \bf
        \rm \over \atop \big \text \mbox \operatorname \operatorname* \mathop \label \mathrm{lim} \mathrm
        \prime \, ~ \hskip 1pt \phantom \displaystyle \scriptstyle \color{red} \not \dots \dag \lbrack \hline
        \relax \root 3 \of \mathrel \hat \stackrel [2pt]
    """
    generator = random.Random(0)
    num_parsed = 0
    for _ in range(20_000):
        latex = " ".join(generator.choices(pieces.split(), k=generator.randint(0, 10)))
        for level in (0, 1, 2):
            once = normalize(latex, level)
            assert normalize(once, level) == once, latex
        num_parsed += is_formula(latex)
    assert num_parsed > 1000


def test_unknown_level():
    with pytest.raises(InputError, match=r"level 3 is unknown; use one of 0, 1, 2"):
        normalize("x", level=3)


REAL = Path(__file__).resolve().parents[2] / "shared/data"


def real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"the real formulas are not beside this checkout (../shared/data/{name})")
    return REAL / name


@pytest.mark.parametrize("level", [1, 2])
def test_pairs_made_by_hand(level):
    pairs = json.loads(real("metrics/normalisation_pairs.json").read_text(encoding="utf-8"))
    wrong = [
        (a, b, reason)
        for kind, rows in pairs.items()
        for a, b, reason in rows
        if (normalize(a, level) == normalize(b, level)) != (kind == "EQ")
    ]
    assert [len(rows) for rows in pairs.values()] == [35, 22]
    assert wrong == []


def test_real_formulas_parse_and_are_stable():
    with gzip.open(real("formulas.tsv.gz"), "rt", encoding="utf-8") as file:
        texts = [line.rstrip("\n").split("\t")[2] for line in file][::10]
    assert len(texts) > 7000
    assert sum(map(is_formula, texts)) / len(texts) > 0.999
    for level in (1, 2):
        canonical = [normalize(text, level) for text in texts]
        assert [normalize(text, level) for text in canonical] == canonical


# Where a synonym may print something else than in the open: scripts on it, smaller styles, beside a word.
CONTEXTS = [
    "u {} v",
    "u {}_1 v",
    "u {}^2 v",
    "u {}_1^2 v",
    "w^{{u {} v}}",
    r"\frac{{u {} v}}{{y}}",
    r"\textstyle u {}_1 v",
]
NOT_LATEX = {r"\lt", r"\gt"}  # names of MathJax


@requires_tex
def test_synonyms_print_the_same_with_latex():
    special = {r"\cr": r"\begin{{matrix}}a {} b\end{{matrix}}", r"\bm": "u {} v"}
    cases = [
        (context.format(name + " "), context.format(synonym + " "))
        for name, synonym in symbols.SYNONYMS.items()
        if name not in NOT_LATEX and not name.startswith((r"\big", r"\Big"))
        for context in ([special[name]] if name in special else CONTEXTS)
    ]
    cases += [(f"u {name} v^{{{name}}}", f"u {same} v^{{{same}}}") for name, same in symbols.BARE_SYNONYMS.items()]
    delimiters = {
        a: b for a, b in symbols.DELIMITERS.items() if b in (*"[]|", r"\{", r"\}", r"\|", r"\langle", r"\rangle")
    }
    delimiters = {a: b for a, b in delimiters.items() if a not in (r"\mid", r"\parallel")}  # no delimiters in LaTeX
    assert len(delimiters) > 10
    cases += [(rf"\left{a} x \big{a} \right.", rf"\left{b} x \big{b} \right.") for a, b in delimiters.items()]
    cases += [(rf"\{name} x", rf"\operatorname{{{name}}} x") for name in symbols.NAMES]
    cases += [(rf"\{name}_x^y", rf"\operatorname*{{{name}}}_x^y") for name in symbols.LIMIT_NAMES]
    cases += [(rf"{name}{{off}}_2 x^{{{name}{{ab}}}}", rf"{font}{{off}}_2 x^{{{font}{{ab}}}}")
              for name, font in symbols.TEXTS.items() if name not in (r"\mbox", r"\hbox")]  # fmt: skip
    assert len(cases) > 300
    assert different_prints(cases) == []


@requires_tex
def test_dots_stand_as_in_latex():
    known = [token for token in sorted(symbols.SYMBOLS) if token not in {"&", r"\\", *symbols.INFIX, *NOT_LATEX}]
    cases = [(rf"\dots {token} x", normalize(rf"\dots {token}").split()[0] + f"{token} x") for token in known]
    rendered = that_render(cases)
    assert len(rendered) > 300
    assert different_prints(rendered) == []


@requires_tex
@pytest.mark.parametrize("table", [LEVEL1, [(line, None) for pair in DIFFERENT for line in pair]])
def test_what_the_tables_say_prints_the_same(table):
    # The canonical form takes words apart as the data sets do: LaTeX knows no length `2 p t` and no colour `r e d`.
    words = (r"\foo", "{foo}", "red", "[2pt]", "[t]")
    cases = [(latex, normalize(latex)) for latex, _ in table if not any(word in latex for word in words)]
    cases = that_render(cases)
    assert len(cases) > 25
    assert different_prints(cases) == []


@requires_tex
def test_the_sample_prints_the_same_at_level_1():
    texts = [json.loads(line)["text"] for line in (SAMPLE / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert different_prints([(text, normalize(text)) for text in texts]) == []


def that_render(cases: list[tuple[str, str]]) -> list[tuple[str, str]]:
    from latexocr.render import render

    return [case for case, left in zip(cases, render([a for a, _ in cases]), strict=True) if left.error is None]


def different_prints(cases: list[tuple[str, str]]) -> list[tuple[str, str, str | None]]:
    from latexocr.metrics.glyphs import same_picture
    from latexocr.render import render

    left, right = map(list, zip(*cases, strict=True))
    return [
        (a, b, x.error or y.error)
        for a, b, x, y in zip(left, right, render(left), render(right), strict=True)
        if not same_picture(x, y, horizontal_space=False)
    ]


@pytest.mark.parametrize(("module", "num_examples"), [("canonical", 4), ("tokens", 1)])
def test_docstring_examples(module, num_examples):
    assert doctest.testmod(importlib.import_module(f"latexocr.metrics.{module}")) == (0, num_examples)
