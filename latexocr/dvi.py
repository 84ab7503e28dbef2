"""DVI files, TeX's output: read as glyph and rule boxes, and written from such boxes.

Why written: a picture is drawn by a program that obeys the commands in a DVI file (run PostScript, include a file).
A file made from boxes has none, and one file holds the boxes of formulas that came from many runs.

Source of the format: Donald E. Knuth and David R. Fuchs, "The format of DVI files", in DVItype, sections 13 to 19;
of font metrics: "TFM files" in TFtoPL, sections 8 to 10.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

POINT = 65536  # DVI units of TeX in a TeX point
POINTS_PER_INCH = 72.27
POINTS_PER_BIG_POINT = POINTS_PER_INCH / 72

_PUT_CHAR, _PUT_RULE, _RIGHT, _DOWN, _FONT, _DEFINE_FONT = 133, 137, 146, 160, 238, 246
_BEGIN_PAGE, _END_PAGE, _PREAMBLE, _POSTAMBLE, _AFTER_POSTAMBLE, _PADDING = 139, 140, 247, 248, 249, 223
_UNITS = (25_400_000, 473_628_672, 1000)  # numerator, denominator (in 1e-7 m) and magnification of TeX's own files


class Glyph(NamedTuple):
    """One printed character. Lengths in TeX points (72.27 an inch); x to the right, y upwards from the baseline."""

    font: str
    size: float
    code: int
    x: float
    y: float
    width: float


class Rule(NamedTuple):
    """A black rectangle: fraction bar, root, line of an array. (x, y) is its lower left corner, in TeX points."""

    x: float
    y: float
    width: float
    height: float


Page = tuple[tuple[Glyph, ...], tuple[Rule, ...]]


def read(path: Path) -> Iterator[Page]:
    """The pages of a DVI file, in TeX's order; the baseline is y = 0 of the file. A file cut off just ends earlier."""
    from matplotlib import dviread

    with dviread.Dvi(str(path), None) as reader:
        try:
            for page in reader:
                yield tuple(map(_glyph, page.text)), tuple(map(_rule, page.boxes))
        except (IndexError, ValueError, OSError) as error:
            logger.debug("%s ends early: %s", path.name, error)


def _glyph(text) -> Glyph:
    name = text.font.texname
    name = name.decode("ascii", "replace") if isinstance(name, bytes) else name  # bytes before matplotlib 3.11
    size = round(text.font.size * POINTS_PER_BIG_POINT, 3)
    return Glyph(name, size, text.glyph, text.x / POINT, -text.y / POINT, text.width / POINT)


def _rule(box) -> Rule:
    return Rule(box.x / POINT, -box.y / POINT, box.width / POINT, box.height / POINT)


def write(path: Path, pages: Sequence[Page]) -> None:
    """Write one page for each pair of glyphs and rules; `read` gives them back."""
    fonts: dict[tuple[str, float], tuple[int, bytes]] = {}
    body = bytearray(struct.pack(">BBIIIB", _PREAMBLE, 2, *_UNITS, 0))
    previous = -1
    for number, (glyphs, rules) in enumerate(pages, 1):
        start = len(body)
        body += struct.pack(">B11i", _BEGIN_PAGE, number, *[0] * 9, previous)
        previous = start
        body += _page(glyphs, rules, fonts)
        body.append(_END_PAGE)
    end = len(body)
    body += struct.pack(">BiIIIIIHH", _POSTAMBLE, previous, *_UNITS, 0, 0, 1, len(pages) % 65536)
    body += b"".join(definition for _, definition in fonts.values())
    body += struct.pack(">BiB", _AFTER_POSTAMBLE, end, 2)
    body += bytes([_PADDING]) * (4 + -len(body) % 4)
    path.write_bytes(body)


def _page(glyphs: Sequence[Glyph], rules: Sequence[Rule], fonts: dict[tuple[str, float], tuple[int, bytes]]) -> bytes:
    out = bytearray()
    at_x = at_y = 0

    def move(x: float, y: float) -> None:
        nonlocal at_x, at_y
        to_x, to_y = round(x * POINT), round(-y * POINT)
        out.extend(struct.pack(">BiBi", _RIGHT, to_x - at_x, _DOWN, to_y - at_y))
        at_x, at_y = to_x, to_y

    for glyph in glyphs:
        font = glyph[:2]
        if font not in fonts:
            fonts[font] = len(fonts), _definition(len(fonts), *font)
            out += fonts[font][1]
        move(glyph.x, glyph.y)
        out += struct.pack(">BiBB", _FONT, fonts[font][0], _PUT_CHAR, glyph.code)
    for rule in rules:
        move(rule.x, rule.y)
        out += struct.pack(">Bii", _PUT_RULE, round(rule.height * POINT), round(rule.width * POINT))
    return bytes(out)


def _definition(number: int, name: str, size: float) -> bytes:
    head = struct.pack(">BiIiiBB", _DEFINE_FONT, number, 0, round(size * POINT), _design_size(name), 0, len(name))
    return head + name.encode("ascii")


@cache
def _design_size(font: str) -> int:
    """Size for which the font was drawn, in DVI units: second word of the header of its metrics."""
    from matplotlib import dviread

    header = Path(dviread.find_tex_file(f"{font}.tfm")).read_bytes()[24:32]
    return struct.unpack(">Ii", header)[1] >> 4  # 20 binary places to 16
