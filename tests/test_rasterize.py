"""Pictures from boxes: rules and glyphs where they belong, the same as dvipng's, the im2latex look."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import requires_tex
from PIL import Image

from latexocr.dvi import POINTS_PER_INCH, Glyph, Rule
from latexocr.errors import InputError
from latexocr.rasterize import ink, picture
from latexocr.render import Rendering, render, render_pngs
from latexocr.styles import FONTS, STYLES, Style

PLAIN = Style()
POINTS_PER_PIXEL = POINTS_PER_INCH / 100  # at 100 dots an inch
LATEX_OCR = Path(__file__).resolve().parents[2] / "shared/data/latex_ocr/train.parquet"


def rule(x: float, y: float, width: float, height: float) -> Rendering:
    """A rendering of one rule, in pixels."""
    return Rendering((), (Rule(*(side * POINTS_PER_PIXEL for side in (x, y, width, height))),), None, "latex")


def test_a_rule_covers_its_pixels():
    assert ink(rule(0, 0, 3, 2), dpi=100, style=PLAIN).tolist() == [[255] * 3] * 2
    assert ink(rule(0.5, 0, 2, 1), dpi=100, style=PLAIN).tolist() == [[128, 255, 128]]
    assert ink(rule(0, 0, 2, 0.4), dpi=100, style=PLAIN).tolist() == [[102, 102]]


def test_touched_pixels_are_black():
    assert ink(rule(0.5, 0.2, 2, 0.4), dpi=100, style=Style(touched=True)).tolist() == [[255] * 3]


def test_weight_and_origin():
    assert ink(rule(0, 0, 2, 1), dpi=100, style=PLAIN, weight=8).tolist() == [[255] * 4] * 3  # a pixel on each side
    assert ink(rule(0, 0, 1, 1), dpi=100, style=PLAIN, origin=(0.25, 0)).tolist() == [[191, 64]]


def test_nothing_to_draw_or_too_much():
    with pytest.raises(InputError, match="blank: no ink"):
        ink(Rendering((), (), None, "latex"), dpi=100, style=PLAIN)
    with pytest.raises(InputError, match="too large: 30000 x 1 pixels"):
        ink(rule(0, 0, 30_000, 1), dpi=100, style=PLAIN)


def test_mathtext_glyphs_stand_where_the_boxes_say():
    (one,) = render(["1"], engine="mathtext")
    moved = one.glyphs[0]._replace(x=one.glyphs[0].x + 30 * POINTS_PER_PIXEL)
    alone = ink(one, dpi=100, style=PLAIN)
    both = ink(Rendering((one.glyphs[0], moved), (), None, "mathtext"), dpi=100, style=PLAIN)
    assert alone.shape[0] == both.shape[0] and both.shape[1] == alone.shape[1] + 30
    assert (both[:, : alone.shape[1]] == alone).all() and (both[:, 30:] == alone).all()
    twice = ink(one, dpi=200, style=PLAIN)
    assert abs(twice.shape[0] - 2 * alone.shape[0]) <= 2


def test_a_style_decides_size_margins_and_padding():
    style = Style(margins=(3, 3), sizes=((20, 10), (40, 40)))
    rng = np.random.default_rng(0)
    assert picture(rule(0, 0, 13, 3), style, rng).size == (20, 10)
    assert picture(rule(0, 0, 15, 3), style, rng).size == (40, 40)
    big = np.asarray(picture(rule(0, 0, 50, 3), style, rng))
    assert big.shape[1] in (56, 57) and (big[:3] == 255).all() and (big[:, :3] == 255).all() and big.min() == 0


def test_jitter_moves_glyphs():
    (one,) = render(["a + b"], engine="mathtext")
    pictures = [np.asarray(picture(one, Style(jitter=jitter), np.random.default_rng(0))) for jitter in (0.0, 1.0)]
    assert pictures[0].shape != pictures[1].shape or (pictures[0] != pictures[1]).any()


@requires_tex
def test_the_same_picture_as_dvipng():
    texts = [
        r"\frac{a}{\sqrt{b}} + x_i^2",
        r"\sum_{i=1}^{n} \hat{\alpha}_i \left(\frac{1}{2}\right)",
        r"\Omega\mathbb{R}",
    ]
    for one, png in zip(render(texts), render_pngs(texts, dpi=300), strict=True):
        theirs = 255 - np.asarray(Image.open(io.BytesIO(png)).convert("L")).astype(float)
        ours = ink(one, dpi=300, style=PLAIN).astype(float)
        assert abs(np.subtract(ours.shape, theirs.shape)).max() <= 2
        assert abs(ours.sum() / theirs.sum() - 1) < 0.05
        padded = np.pad(theirs, 4)  # dvipng rounds places: try all within two pixels
        tries = [padded[y : y + ours.shape[0], x : x + ours.shape[1]] for y in range(2, 7) for x in range(2, 7)]
        correlations = [np.corrcoef(one.ravel(), ours.ravel())[0, 1] for one in tries if one.shape == ours.shape]
        assert max(correlations) > 0.88


@requires_tex
def test_every_font_has_outlines_for_common_formulas():
    texts = [
        r"\Omega x + \beta_{12}^{*} = \sum_{i} \int f(x) \, \mathrm{d}x",
        r"\mathbf{A} \leq \mathcal{L} \to \sqrt{2}",
    ]
    shapes = set()
    for name, preamble in FONTS.items():
        for one in render(texts, preamble=preamble):
            assert one.error is None, name
            shapes.add(ink(one, dpi=200, style=PLAIN).tobytes())
    assert len(shapes) >= 2 * len(FONTS) - 2  # Computer Modern stands in for what is not installed


def test_a_font_without_outlines_is_an_error():
    glyph = Glyph("nofont10", 10.0, 65, 0.0, 0.0, 5.0)
    with pytest.raises(InputError, match="font nofont10 is not installed as outlines"):
        ink(Rendering((glyph,), (), None, "latex"), dpi=100, style=PLAIN)


@requires_tex
def test_im2latex_has_the_margin_and_a_size_of_the_originals():
    for one in render([r"x + \frac{1}{2}", r"\alpha", r"\sum_{i} " + " + ".join("abcdefghijk")]):
        image = picture(one, STYLES["im2latex"], np.random.default_rng(1))
        assert image.size in STYLES["im2latex"].sizes
        rows, columns = np.nonzero(np.asarray(image) < 128)
        assert (rows.min(), columns.min()) == (4, 4)


@requires_tex
@pytest.mark.skipif(
    not LATEX_OCR.is_file(), reason="the LaTeX_OCR originals are not beside this checkout (../shared/data/latex_ocr)"
)
def test_im2latex_looks_like_the_originals():
    """Against the best of 16 places of the page: half the pictures differ by less than 2.5 of 255 on average."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(LATEX_OCR).slice(0, 120).to_pylist()
    originals = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("L")).astype(float) for row in rows]
    ours, naive = [], []
    for original, one in zip(originals, render([row["text"] for row in rows]), strict=True):
        tries = [picture(one, STYLES["im2latex"], np.random.default_rng(seed)) for seed in range(16)]
        greys = [np.round(np.asarray(image) / 85) * 85 for image in tries if image.size == original.shape[::-1]]
        plain = picture(one, Style(sizes=STYLES["im2latex"].sizes), np.random.default_rng(0))
        if greys and plain.size == original.shape[::-1]:  # else the text lacks blanks that the picture has
            ours.append(min(abs(grey - original).mean() for grey in greys))
            naive.append(abs(np.asarray(plain) - original).mean())
    assert len(ours) > 60
    assert np.median(ours) < 2.5 and np.median(naive) > 5
