"""Pictures compared by their boxes: what prints the same is the same, and what is structurally wrong is seen."""

from __future__ import annotations

import random
import re
import time

import numpy as np
import pytest
from conftest import requires_tex

from latexocr.dvi import Glyph, Rule
from latexocr.metrics.glyphs import boxes, glyph_f1, same_picture
from latexocr.render import Rendering, render

pytestmark = requires_tex

SAME = [
    ("x_i^2", "x^2_i"),
    (r"a \over b", r"\frac{a}{b}"),
    (r"\sqrt x", r"\sqrt{x}"),
    (r"f''", r"f^{\prime\prime}"),
    (r"{n \choose k}", r"\binom{n}{k}"),
    (r"\operatorname{sin}x", r"\sin x"),
    (r"\left(\frac{a}{b}\right)", r"\left(\frac{a}{b}\right)"),
]
SPACED = [
    ("ab", r"a\,b"),
    ("a=b", "a{=}b"),
    (r"\frac{ab}{cd}", r"\frac{a\quad b}{cd}"),
    (r"\sqrt{ab}c", r"\sqrt{a\;b}\,c"),
    (r"\overrightarrow{AB}", r"\overrightarrow{A\quad B}"),
    (r"\underbrace{ab}_n", r"\underbrace{a\quad b}_n"),
    (r"x_{i+j}^{2}", r"x_{i\,+\,j}^{2}"),
    (r"\sum_{i=1}^{n}x", r"\sum_{i\;=\;1}^{n}\;x"),
    (r"\begin{matrix}a&b\\c&d\end{matrix}", r"\begin{matrix}a\;&b\\c&\quad d\end{matrix}"),
    (r"\begin{array}{ll}a&b\\cc&d\end{array}", r"\begin{array}{cr}a&b\\cc&d\end{array}"),
    (
        r"\begin{matrix}\frac{a}{b}+c\\\frac{d}{e}\end{matrix}",
        r"\begin{matrix}\frac{a\quad}{b}\,+c\\\frac{d}{e}\end{matrix}",
    ),
    ("1 1", r"1\!1"),
]
STRUCTURALLY_WRONG = [
    ("T_r", "Tr"),
    ("p2-p", "p2^{-p}"),
    (r"t^{n}+\frac12", r"t^{n+\frac12}"),
    ("smpq", "s_{mpq}"),
    ("x^2", "x_2"),
    (r"\phi", r"\varphi"),
    (r"\frac{a}{b}", r"\frac{b}{a}"),
    ("x_i^2", "x_2^i"),
    ("x_i^2", "x_{i^2}"),
    ("a_1b", "ab_1"),
    (r"\frac{a}{b}c", r"\frac{a}{bc}"),
    (r"\sqrt{a}t", r"\sqrt{at}"),
    (r"\overline{a}b", r"\overline{ab}"),
    (r"\hat{a}b", r"a\hat{b}"),
    (r"\overbrace{ab}c", r"\overbrace{abc}"),
    (r"a\longrightarrow b", r"a\rightarrow b"),
    (r"\overrightarrow{AB}C", r"\overrightarrow{ABC}"),
    (r"\begin{matrix}a&b\\c&d\end{matrix}", r"\begin{matrix}a&c\\b&d\end{matrix}"),
    (r"\begin{pmatrix}a\end{pmatrix}", r"\begin{bmatrix}a\end{bmatrix}"),
    (r"\sum_{i}^{n}x", r"\sum\nolimits_{i}^{n}x"),
    (r"\mathbf{x}", "x"),
    ("a..b", r"a\ldots b"),
    ("a", "aa"),
    (r"\frac{\frac{a}{b}}{c}", r"\frac{a}{\frac{b}{c}}"),
]


def pair(one: str, other: str) -> list[Rendering]:
    rendered = render([one, other])
    assert [r.error for r in rendered] == [None, None]
    return rendered


def f1(prediction: str, reference: str) -> float:
    return glyph_f1(*pair(prediction, reference))


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_print(one, other):
    assert same_picture(*pair(one, other)) and same_picture(*pair(one, other), horizontal_space=False)
    assert f1(one, other) == 1.0


@pytest.mark.parametrize(("one", "other"), SPACED)
def test_the_same_up_to_horizontal_space(one, other):
    assert not same_picture(*pair(one, other))
    assert same_picture(*pair(one, other), horizontal_space=False)
    assert f1(one, other) == 1.0


@pytest.mark.parametrize(("one", "other"), STRUCTURALLY_WRONG)
def test_structure_is_seen(one, other):
    assert not same_picture(*pair(one, other), horizontal_space=False)
    assert f1(one, other) < 0.9
    assert f1(one, other) == f1(other, one)


def test_where_the_picture_stands_does_not_matter():
    assert same_picture(*pair("x+y", r"\quad x+y"))


def test_scores_that_can_be_reckoned_by_hand():
    """Twice the credit over the boxes of both sides; a wrong size costs a quarter box, a wrong place half."""
    assert f1("a+b+c+d", "a+b+c+e") == pytest.approx(12 / 14)
    assert f1("b+c+d", "a+b+c+d") == pytest.approx(2 * 5 / 12)  # "+": three to two
    assert f1("xyzw", "abcd") == 0.0
    assert f1("Tr", "T_r") == pytest.approx((1 + 1 - 0.25 - 0.5) * 2 / 4)
    assert f1("ab^2", "ab_2") == pytest.approx((2 + 1 - 0.5) * 2 / 6)
    assert f1(r"\mathbf{x}y", "xy") == pytest.approx((0.5 + 1) * 2 / 4)
    assert f1("ab", "ba") == pytest.approx((1 + 0.5) * 2 / 4)  # one of them in order, the other out of order


def test_one_missing_box_costs_one_box():
    """Left or right, first or last: everything else still matches. 12 boxes and 11."""
    text = "b+c+d+e+f+gh"
    assert f1(text, "a" + text) == pytest.approx(24 / 25)
    assert f1(text, text + "a") == pytest.approx(24 / 25)
    assert f1(text, "b+c+da+e+f+gh") == pytest.approx(24 / 25)


def test_a_missing_row_leaves_the_others_most_of_their_credit():
    three = r"\begin{matrix}a&b&c\\d&e&f\\g&h&i\end{matrix}"
    assert 0.6 <= f1(r"\begin{matrix}d&e&f\\g&h&i\end{matrix}", three) < 0.8


def test_a_bracket_is_one_box_however_tall():
    tall = r"\left\{\begin{matrix}a\\b\\c\\d\\e\\f\\g\end{matrix}\right."
    (rendering,) = render([tall])
    assert len(rendering.glyphs) > 8 and len(boxes(rendering)) == 8
    assert f1(r"\left(\frac12\right)", r"(\frac12)") > 0.7


def test_three_dots_are_one_box():
    assert f1(r"a+\cdots+b", r"a+\ldots+b") == pytest.approx(8 / 10)


def test_what_does_not_render():
    good, bad, blank = render(["x", r"\frac{1}", r"\quad"])
    assert glyph_f1(bad, good) == glyph_f1(good, bad) == glyph_f1(bad, bad) == 0.0
    assert not same_picture(bad, bad)
    assert glyph_f1(blank, good) == 0.0 and glyph_f1(blank, blank) == 1.0


def test_rounding_of_places_does_not_matter():
    (one,) = render([r"\frac{a+b}{\sqrt{c}}"])
    noise = random.Random(0)

    def shake(item):
        return item._replace(x=item.x + noise.uniform(0, 0.003), y=item.y + noise.uniform(0, 0.003))

    other = Rendering(tuple(map(shake, one.glyphs)), tuple(map(shake, one.rules)), None, "latex")
    assert same_picture(one, other)
    shifted = tuple(item._replace(y=item.y + 0.1 * (number == 0)) for number, item in enumerate(one.glyphs))
    assert not same_picture(one, Rendering(shifted, one.rules, None, "latex"), horizontal_space=False)


def test_rules_alone():
    one = Rendering((), (Rule(0, 0, 10, 1),), None, "latex")
    other = Rendering((), (Rule(0, 0, 20, 1),), None, "latex")
    assert same_picture(one, one) and not same_picture(one, other, horizontal_space=False)
    assert 0 < glyph_f1(one, other) < 1


def test_more_corruption_never_scores_higher():
    """Each step spoils one more letter of the formula, and none is spoiled twice."""
    formula = r"\frac{a+b}{\sqrt{c}}=\sum_{k=1}^{n}\left(x_{k}y^{m}-\hat{z}\right)\int_{p}^{q}f(t)\mathrm{d}t"
    noise = random.Random(1)
    for _ in range(10):
        letters = [match.start() for match in re.finditer(r"(?<![\\a-z])[abckxymzpqft](?![a-z])", formula)]
        noise.shuffle(letters)
        texts = [formula]
        for place in letters[:6]:
            texts.append(texts[-1][:place] + noise.choice("@JUW").replace("@", " ") + texts[-1][place + 1 :])
        rendered = render(texts)
        assert all(one.error is None for one in rendered)
        scores = [glyph_f1(one, rendered[0]) for one in rendered]
        assert scores == sorted(scores, reverse=True) and scores[0] == 1.0 and scores[1] < 1.0, scores


def test_mathtext_is_compared_with_mathtext():
    one, other, wrong = render(["x^{2}+1", "x^2+1", "x_2+1"], engine="mathtext")
    assert same_picture(one, other) and glyph_f1(one, other) == 1.0 and glyph_f1(one, wrong) < 0.95


def test_a_glyph_is_what_its_fields_say():
    glyph = Glyph("cmmi10", 10.0, ord("x"), 0.0, 0.0, 5.7)
    (box,) = boxes(Rendering((glyph,), (), None, "latex"))
    assert (box.font, box.size, box.code, box.width, box.above, box.below) == ("cmmi10", 10.0, 120, 5.7, (), ())
    assert np.isclose(glyph_f1(Rendering((glyph,), (), None, "latex"), Rendering((glyph,), (), None, "latex")), 1)


@pytest.mark.parametrize(
    "runaway", [r"\frac{a}{b}+x^{2}" * 450, r"\begin{matrix}" + r"\hline a \\" * 1000 + r"\end{matrix}"]
)
def test_a_runaway_prediction_takes_no_age(runaway):
    rendered = render([runaway, r"\frac{a}{b}"])
    assert rendered[0].error is None
    started = time.monotonic()
    assert 0 < glyph_f1(*rendered) < 0.01
    assert time.monotonic() - started < 20
