r"""Glyph and rule boxes without TeX, from matplotlib's own typesetter of formulas, and pictures of them.

Why: not every machine has TeX. mathtext knows about four fifths of real formulas (no environments, no `\left\{`
in older versions, no `\displaystyle`), sets them in its own fonts and takes 20 times as long; so its boxes are
compared with its own only.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from latexocr.dvi import POINTS_PER_BIG_POINT, POINTS_PER_INCH, Glyph, Page, Rule

FONT_SIZE = 10.0
MAX_CHARACTERS = 3_000  # its time grows with the text, and there is no process to stop
MAX_DEPTH = 20
_BLANKS_AROUND_SCRIPT = re.compile(r"(?<!\\)\s+(?=[_^'])|(?<=[_^])(?<!\\[_^])\s+")
_FRACTION_OR_BRACE = re.compile(r"(\\frac(?![A-Za-z])|\\.|[{}])")


def boxes(formula: str) -> Page:
    """Glyphs and rules of a formula, lengths in TeX points, y upwards from the baseline.

    Args:
        formula: one line of LaTeX without enclosing dollars.

    Raises:
        ValueError: mathtext cannot set it.
    """
    if len(formula) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS} characters")
    if _depth(formula) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser

    logging.getLogger("matplotlib.mathtext").setLevel(logging.ERROR)  # it tells of every accent that leaves room
    font = FontProperties(family="STIXGeneral", math_fontfamily="stix", size=FONT_SIZE)
    try:
        # The first letter tells where the baseline is: mathtext rounds the height that it counts from.
        page = MathTextParser("path").parse(rf"$\mathrm{{A}}{{{_spelled(formula)}}}$", dpi=72, prop=font)
    except Exception as error:  # whatever a parser of strangers' texts raises, the formula does not render
        raise ValueError(_reason(error)) from error
    baseline = page.glyphs[0][-1]
    scale = POINTS_PER_BIG_POINT
    glyphs = []
    # (font, size, character[, index], x, y): matplotlib 3.11 added the index
    for face, size, code, *_, x, y in page.glyphs[1:]:
        face.set_size(size, 72)
        width = face.load_char(code, flags=_no_hinting()).linearHoriAdvance / 65536
        name = Path(face.fname).stem
        glyphs.append(
            Glyph(name, round(size * scale, 3), code, float(x * scale), float((y - baseline) * scale), width * scale)
        )
    rules = [Rule(*(float(side * scale) for side in (x, y - baseline, w, h))) for x, y, w, h in page.rects]
    return tuple(glyphs), tuple(rules)


def _spelled(formula: str) -> str:
    r"""As mathtext wants it: no blanks around `_` and `^`, which it would take for the script; `\dfrac` for fractions
    outside of any group, because it has no display style.

    >>> print(_spelled(r"\sum _ { i } \frac { a } { b }"))
    \sum_{ i } \dfrac { a } { b }
    """
    depth, parts = 0, []
    for part in _FRACTION_OR_BRACE.split(_BLANKS_AROUND_SCRIPT.sub("", formula)):
        depth += (part == "{") - (part == "}")
        parts.append(r"\dfrac" if part == r"\frac" and not depth else part)
    return "".join(parts)


def _depth(formula: str) -> int:
    depth = deepest = 0
    for character in formula:
        depth += (character == "{") - (character == "}")
        deepest = max(deepest, depth)
    return deepest


@cache
def _no_hinting():
    from matplotlib.ft2font import LoadFlags

    return LoadFlags.NO_HINTING


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def draw(glyphs: Sequence[Glyph], rules: Sequence[Rule], *, dpi: int) -> bytes:
    """A grey PNG of boxes of `boxes`, cropped to what is printed."""
    from PIL import Image, ImageDraw, ImageOps

    scale = dpi / POINTS_PER_INCH
    margin = 2 * FONT_SIZE  # glyphs reach out of their boxes; cropped below
    left = min(item.x for item in (*glyphs, *rules)) - margin
    right = max(item.x + item.width for item in (*glyphs, *rules)) + margin
    top = max([glyph.y + 2 * glyph.size for glyph in glyphs] + [rule.y + rule.height for rule in rules]) + margin
    bottom = min([glyph.y - glyph.size for glyph in glyphs] + [rule.y for rule in rules]) - margin
    image = Image.new("L", (round((right - left) * scale), round((top - bottom) * scale)), 255)
    pen = ImageDraw.Draw(image)
    for glyph in glyphs:
        font = _font(glyph.font, glyph.size * scale)
        pen.text(((glyph.x - left) * scale, (top - glyph.y) * scale), chr(glyph.code), font=font, fill=0, anchor="ls")
    for rule in rules:
        x, y = (rule.x - left) * scale, (top - rule.y) * scale
        thick = max(1, round(rule.height * scale))
        pen.rectangle((round(x), round(y) - thick, round(x + rule.width * scale), round(y) - 1), fill=0)
    image = image.crop(ImageOps.invert(image).getbbox())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


@cache
def _font(name: str, size_px: float):
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), size_px)
