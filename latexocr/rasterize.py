"""Pictures composed from glyph bitmaps at the places that `latexocr.render` found; no drawing program.

Why: a million pictures. A glyph is drawn once by FreeType, from TeX's own Type 1 outlines or matplotlib's fonts,
four times as large as needed, and kept; a picture is then some copies of small arrays. It also gives what a program
for documents does not: glyphs a little bolder or out of place, and the exact look of a known data set.
"""

from __future__ import annotations

import math
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latexocr.dvi import POINTS_PER_INCH, Rule
from latexocr.errors import InputError
from latexocr.render import MAX_PIXELS, MAX_SIDE_PX, Engine, Rendering
from latexocr.styles import Style

OVERSAMPLING = 4
# A pixel counts as touched from this coverage (of 255) on: with it the share of black, dark, light and white pixels
# in 90 LaTeX_OCR originals is met within 0.0005 each.
TOUCHED = 12
_CUSTOM_ENCODING = "ADBC"  # FreeType's name of the encoding inside a Type 1 file, which TeX's codes refer to


def picture(rendering: Rendering, style: Style, rng: np.random.Generator) -> Image.Image:
    """A formula in a style, black on white (mode L), before any damage.

    Args:
        rendering: what `render` returned, without error.
        style: how it looks.
        rng: chooses among the style's values.

    Raises:
        InputError: nothing to draw, too large, or a font is not there as outlines.
    """
    dpi, weight = int(rng.choice(style.dpi)), int(rng.choice(style.weights))
    origin = rng.random(2)  # where a page puts a formula is no whole number of pixels
    shifts = rng.normal(0, style.jitter, (len(rendering.glyphs), 2)) if style.jitter else None
    grey = 255 - ink(rendering, dpi=dpi, weight=weight, style=style, origin=origin, shifts=shifts)
    left, top, right, bottom = rng.integers(style.margins[0], style.margins[1], size=4, endpoint=True)
    return _framed(grey, style, (left, top, right, bottom))


def _framed(grey: np.ndarray, style: Style, margins: tuple[int, int, int, int]) -> Image.Image:
    """Margins around (height, width) grey values; halved if the style says so; padded to one of its sizes."""
    factor = 2 if style.halved else 1
    left, top, right, bottom = (int(margin) * factor for margin in margins)
    width, height = grey.shape[1] + left + right, grey.shape[0] + top + bottom
    canvas = np.full((height + height % factor, width + width % factor), 255, np.uint8)
    canvas[top : top + grey.shape[0], left : left + grey.shape[1]] = grey
    image = Image.fromarray(canvas)
    if style.halved:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    for size in style.sizes:
        if image.width <= size[0] and image.height <= size[1]:
            padded = Image.new("L", size, 255)
            padded.paste(image)
            return padded
    return image


def ink(
    rendering: Rendering,
    *,
    dpi: int,
    style: Style,
    weight: int = 0,
    origin: tuple[float, float] = (0.0, 0.0),
    shifts: np.ndarray | None = None,
) -> np.ndarray:
    """Coverage (height, width), uint8, 255 where a stroke covers the pixel, cropped to the ink.

    Args:
        rendering: glyphs and rules.
        dpi: dots an inch.
        style: whether pixels are black or grey, and how finely glyphs are placed.
        weight: quarters of a pixel by which strokes grow.
        origin: pixels by which the whole is moved right and down.
        shifts: points by which each glyph is moved (glyphs, 2).

    Raises:
        InputError: nothing to draw, too large, or a font is not there as outlines.
    """
    scale = dpi / POINTS_PER_INCH
    pieces = []
    for number, glyph in enumerate(rendering.glyphs):
        x, y = glyph.x * scale + origin[0], origin[1] - glyph.y * scale
        if shifts is not None:
            x, y = x + shifts[number][0] * scale, y + shifts[number][1] * scale
        column, phase_x = divmod(round(x * style.phases), style.phases)
        row, phase_y = divmod(round(y * style.phases), style.phases)
        bitmap = _glyph(
            rendering.engine, glyph.font, glyph.size * scale, glyph.code, weight, style.touched,
            phase_x / style.phases, phase_y / style.phases,
        )  # fmt: skip
        if bitmap is not None:
            pieces.append((column + bitmap.left, row + bitmap.top, bitmap.coverage))
    pieces += [_rule(rule, scale, origin, weight, style.touched) for rule in rendering.rules]
    pieces = [piece for piece in pieces if piece[2].size]
    whole = _compose(pieces) if pieces else np.zeros((1, 1), np.uint8)
    box = Image.fromarray(whole).getbbox()
    if box is None:
        raise InputError("blank: no ink")
    return whole[box[1] : box[3], box[0] : box[2]]


def _compose(pieces: list[tuple[int, int, np.ndarray]]) -> np.ndarray:
    left, top = min(piece[0] for piece in pieces), min(piece[1] for piece in pieces)
    width = max(x + coverage.shape[1] for x, _, coverage in pieces) - left
    height = max(y + coverage.shape[0] for _, y, coverage in pieces) - top
    if max(width, height) > MAX_SIDE_PX or width * height > MAX_PIXELS:
        raise InputError(f"too large: {width} x {height} pixels")
    whole = np.zeros((height, width), np.uint8)
    for x, y, coverage in pieces:
        place = whole[y - top : y - top + coverage.shape[0], x - left : x - left + coverage.shape[1]]
        np.maximum(place, coverage, out=place)
    return whole


def _rule(rule: Rule, scale: float, origin, weight: int, touched: bool) -> tuple[int, int, np.ndarray]:
    grown = weight / OVERSAMPLING / 2
    x, y = rule.x * scale + origin[0], origin[1] - rule.y * scale
    left, columns = _span(x - grown, x + rule.width * scale + grown, touched)
    top, rows = _span(y - rule.height * scale - grown, y + grown, touched)
    return left, top, np.round(255 * np.outer(rows, columns)).astype(np.uint8)


def _span(start: float, end: float, touched: bool) -> tuple[int, np.ndarray]:
    """First pixel of an interval, and how much of each pixel it covers."""
    if end <= start:
        return 0, np.zeros(0)
    if touched:
        return math.floor(start), np.ones(math.ceil(end) - math.floor(start))
    edges = np.arange(math.floor(start), math.ceil(end) + 1)
    return int(edges[0]), np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)


# --- glyphs -------------------------------------------------------------------------------------------------------


class _Bitmap(NamedTuple):
    """Coverage (height, width); (left, top) is its corner from the glyph's origin, y down."""

    coverage: np.ndarray
    left: int
    top: int


@lru_cache(maxsize=40_000)  # about 30 MB
def _glyph(
    engine: Engine, font: str, size_px: float, code: int, weight: int, touched: bool, phase_x: float, phase_y: float
) -> _Bitmap | None:
    """A glyph at a fraction of a pixel right of and below its origin; None if it has no ink."""
    large = _large_glyph(engine, font, size_px, code, weight)
    if large is None:
        return None
    x, y = large.left + round(phase_x * OVERSAMPLING), large.top + round(phase_y * OVERSAMPLING)
    left, top = x // OVERSAMPLING, y // OVERSAMPLING
    height, width = large.coverage.shape
    rows = -(-(y % OVERSAMPLING + height) // OVERSAMPLING)
    columns = -(-(x % OVERSAMPLING + width) // OVERSAMPLING)
    cells = np.zeros((rows * OVERSAMPLING, columns * OVERSAMPLING), np.uint8)
    cells[y % OVERSAMPLING :, x % OVERSAMPLING :][:height, :width] = large.coverage
    sums = cells.reshape(rows, OVERSAMPLING, columns, OVERSAMPLING).sum((1, 3), dtype=np.uint16)
    coverage = (sums // OVERSAMPLING**2).astype(np.uint8)
    if touched:
        coverage = np.where(coverage >= TOUCHED, 255, 0).astype(np.uint8)
    return _Bitmap(coverage, left, top)


@lru_cache(maxsize=4_000)  # about 20 MB
def _large_glyph(engine: Engine, font: str, size_px: float, code: int, weight: int) -> _Bitmap | None:
    face, codes = _face(engine, font, size_px)
    character = chr(code) if codes is None else codes[code]
    left, top, right, bottom = face.getbbox(character, anchor="ls")
    if right <= left or bottom <= top:
        return None
    image = Image.new("L", (right - left, bottom - top))
    if character == "\n":  # TeX's code of Omega; text() would begin a line
        mask = face.getmask(character, "L", anchor="ls")
        image.paste(Image.fromarray(np.array(mask, np.uint8).reshape(mask.size[::-1])))
    else:
        ImageDraw.Draw(image).text((-left, -top), character, 255, face, anchor="ls")
    coverage = np.asarray(image)
    if weight:
        coverage = _bolder(coverage, weight)
        left, top = left - weight // 2, top - weight // 2
    return _Bitmap(coverage, left, top)


def _bolder(coverage: np.ndarray, weight: int) -> np.ndarray:
    """Each point becomes a square of weight + 1 points."""
    height, width = coverage.shape
    grown = np.zeros((height + weight, width + weight), np.uint8)
    for down in range(weight + 1):
        for right in range(weight + 1):
            place = grown[down : down + height, right : right + width]
            np.maximum(place, coverage, out=place)
    return grown


@lru_cache(maxsize=2_000)
def _face(engine: Engine, font: str, size_px: float) -> tuple[ImageFont.FreeTypeFont, list[str] | None]:
    """A font ready to draw, and the characters of its codes (None: the font's own encoding)."""
    path, names = _outlines(font) if engine == "latex" else (_matplotlib_font(font), None)
    encoding = "unic" if names or engine == "mathtext" else _CUSTOM_ENCODING
    face = ImageFont.truetype(path, size_px * OVERSAMPLING, layout_engine=ImageFont.Layout.BASIC, encoding=encoding)
    return face, names


def _matplotlib_font(font: str) -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf"))


@cache
def _outlines(font: str) -> tuple[str, list[str] | None]:
    """Type 1 file of a TeX font, and the characters of its codes if TeX gives it another encoding than its own."""
    from matplotlib import dviread

    try:
        found = dviread.PsfontsMap(dviread.find_tex_file("pdftex.map"))[font.encode("ascii")]
    except (LookupError, FileNotFoundError) as error:
        raise InputError(f"font {font} is not installed as outlines (Type 1)") from error
    if found.filename is None or not str(found.filename).endswith(".pfb"):
        raise InputError(f"font {font} is not installed as outlines (Type 1)")
    return str(found.filename), _characters(str(found.encoding)) if found.encoding else None


def _characters(encoding_file: str) -> list[str]:
    """The character of each of 256 codes; the file lists glyph names between brackets (dvips manual, 6.3.1.5)."""
    from fontTools.agl import toUnicode

    text = re.sub("%.*", "", Path(encoding_file).read_text(encoding="latin-1"))
    names = re.findall(r"/([^\s/\[\]]+)", text[text.index("[") : text.rindex("]")])
    return [toUnicode(name) for name in names]
