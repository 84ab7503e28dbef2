r"""How a synthetic picture looks, as data: fonts, sizes, margins and what happens to the picture afterwards.

Why data: a new kind of picture is one more entry here. Drawing (latexocr.rasterize) and damage (latexocr.augment)
know no style by name.

`im2latex` is the look of the LaTeX_OCR (im2latex-100k) images, found by comparing with the originals: Computer
Modern at 200 dots an inch, every pixel black that a stroke touches, glyphs at whole pixels, 8 pixels of margin,
halved with a Lanczos filter, four levels of grey, padded right and below to one of a few sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from latexocr.errors import InputError, nearest


class Effect(NamedTuple):
    """One kind of damage: a name of latexocr.augment.EFFECTS, how often, and between which amounts."""

    name: str
    probability: float
    low: float
    high: float


@dataclass(frozen=True)
class Style:
    """One kind of picture; where there are several values, each picture takes one at random.

    Attributes:
        fonts: names of `FONTS`, one for each run of TeX; a font named twice is taken twice as often.
        dpi: dots an inch of the drawing; a formula is set in 10 point type.
        weights: how much bolder the glyphs are, in quarters of a pixel of the drawing.
        touched: a pixel that a stroke touches is black, and no pixel is grey; else it is as grey as it is covered.
        phases: glyphs stand at multiples of 1 / phases pixel.
        halved: the drawing is reduced to half its size.
        jitter: how far glyphs are moved about at random, in points (standard deviation).
        margins: least and greatest width of the white around the ink, in pixels of the finished picture.
        sizes: (width, height) in pixels; a picture is padded right and below to the first that holds it.
        levels: number of grey levels that are stored: noise makes files large, and nobody sees one step in 16.
        effects: what `latexocr.augment.augment` does, in this order.
    """

    fonts: tuple[str, ...] = ("cm",)
    dpi: tuple[int, ...] = (100,)
    weights: tuple[int, ...] = (0,)
    touched: bool = False
    phases: int = 4
    halved: bool = False
    jitter: float = 0.0
    margins: tuple[int, int] = (4, 4)
    sizes: tuple[tuple[int, int], ...] = ()
    levels: int = 256
    effects: tuple[Effect, ...] = ()


def _packages(*names: str) -> str:
    """Packages that are loaded where they are installed: without them the formula is set in Computer Modern."""
    return "".join(rf"\IfFileExists{{{name}.sty}}{{\usepackage{{{name}}}}}{{}}" for name in names)


# Lines of a document's preamble.
FONTS = {
    "cm": "",
    "bold": r"\AtBeginDocument{\boldmath}",
    "times": _packages("mathptmx"),
    "palatino": _packages("mathpazo"),
    "txfonts": _packages("txfonts"),
    "pxfonts": _packages("pxfonts"),
    "euler": _packages("euler"),
    "sans": _packages("sansmath") + r"\AtBeginDocument{\ifdefined\sansmath\sansmath\fi}",
}

# The sizes of im2latex-100k's pictures after halving.
_IM2LATEX_SIZES = (
    (120, 50), (160, 40), (200, 40), (200, 50), (240, 40), (240, 50), (280, 40), (280, 50), (320, 40), (320, 50),
    (360, 40), (360, 50), (360, 60), (360, 100), (400, 50), (400, 160), (500, 100), (500, 200), (600, 100),
    (800, 100), (800, 800),
)  # fmt: skip

# Bent and rough strokes.
_BY_HAND = (
    Effect("elastic", 1.0, 1.5, 3.5),
    Effect("rotate", 0.7, -3.0, 3.0),
    Effect("rough", 1.0, 0.3, 0.6),
    Effect("blur", 1.0, 0.3, 0.6),
)

STYLES = {
    "im2latex": Style(
        dpi=(200,),
        touched=True,
        phases=1,
        halved=True,
        sizes=_IM2LATEX_SIZES,
        levels=4,
        effects=(
            Effect("shift", 0.3, 1, 3),
            Effect("scale", 0.2, 0.94, 1.06),
            Effect("weight", 0.25, -0.5, 0.4),
            Effect("contrast", 0.2, 0.7, 1.4),
            Effect("blur", 0.1, 0.3, 0.6),
            Effect("noise", 0.15, 2, 12),
        ),
    ),
    "print": Style(
        fonts=("cm", "cm", "cm", "cm", "bold", "times", "palatino", "txfonts", "pxfonts", "euler", "sans"),
        dpi=(80, 90, 100, 110, 120, 140, 160, 190, 220),
        phases=2,
        weights=(0, 0, 0, 1, 2),
        margins=(2, 14),
        levels=16,
        effects=(
            Effect("scale", 0.3, 0.9, 1.1),
            Effect("weight", 0.3, -0.5, 0.5),
            Effect("contrast", 0.4, 0.5, 1.8),
            Effect("fade", 0.2, 0.5, 1.0),
            Effect("blur", 0.3, 0.3, 0.9),
            Effect("noise", 0.3, 2, 16),
            Effect("jpeg", 0.25, 30, 90),
        ),
    ),
    "scan": Style(
        fonts=("cm", "cm", "bold", "times", "palatino"),
        dpi=(100, 120, 140, 170, 200),
        weights=(0, 1, 1, 2),
        margins=(6, 24),
        levels=16,
        effects=(
            Effect("rotate", 0.9, -2.0, 2.0),
            Effect("blur", 0.7, 0.3, 1.0),
            Effect("fade", 0.6, 0.55, 0.95),
            Effect("paper", 1.0, 10, 70),
            Effect("speckle", 0.7, 0.0005, 0.006),
            Effect("noise", 0.8, 3, 14),
            Effect("jpeg", 0.5, 30, 85),
        ),
    ),
    "pencil": Style(
        dpi=(110, 120, 130),
        weights=(1, 2, 3),
        jitter=0.2,
        margins=(8, 16),
        levels=16,
        effects=(
            *_BY_HAND,
            Effect("fade", 1.0, 0.5, 0.8),
            Effect("paper", 1.0, 20, 70),
            Effect("noise", 1.0, 3, 6),
        ),
    ),
    "chalk": Style(
        dpi=(140, 150, 160, 170),
        weights=(3, 4, 5, 6),
        jitter=0.2,
        margins=(12, 24),
        levels=16,
        effects=(
            *_BY_HAND,
            Effect("board", 1.0, 25, 75),
            Effect("noise", 1.0, 3, 6),
        ),
    ),
}


def style_named(name: str) -> Style:
    """The style of this name.

    Raises:
        InputError: there is none.
    """
    if name not in STYLES:
        raise InputError(f"style {name!r} is unknown{nearest(name, STYLES)}; use one of {', '.join(STYLES)}")
    return STYLES[name]
