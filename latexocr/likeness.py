"""Which pictures of formulas are the same, and which nearly: scaled, shifted, or compressed again.

Why not a perceptual hash alone: formulas are thin ink on white, and one symbol is a few pixels of a hash's 1,024. The
hash only proposes pairs; then the ink itself is compared, stroke by stroke.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

INK = 64  # of 255 levels between paper and strongest ink
NOISE = 32  # grey levels; what never differs more from the paper shows nothing
SIDE = 32  # pixels of the picture that is hashed
BITS = 64
BANDS = 8  # pairs are looked for among those with an equal band
DISTANCE = 14  # bits: nearly all pictures that were scaled by 0.7 to 1.4 stay below this
HEIGHT = 64  # pixels, at most, at which the ink of two pictures is compared
SAME_SHAPE = 0.08  # relative difference of the aspect ratios
MISSED = 1  # pixels of a 5 x 5 window that may be ink where the other picture has none


@dataclass(frozen=True, slots=True)
class Look:
    """What is kept of a picture.

    Args:
        digest: equal for equal pixels, whatever the file format.
        box: left, top, right, bottom of the ink in pixels; None where there is none.
        bits: 64 signs of the lowest frequencies of the ink, as one number.
    """

    digest: bytes
    box: tuple[int, int, int, int] | None
    bits: int


def look(image: Image.Image) -> Look:
    """What is kept of a flattened picture (mode L or RGB)."""
    digest = hashlib.blake2b(f"{image.mode}{image.size}".encode() + image.tobytes(), digest_size=16).digest()
    ink = _ink(image)
    box = _box(ink)
    return Look(digest, box, _bits(ink.crop(box)) if box else 0)


def has_ink(image: Image.Image) -> bool:
    """Whether a flattened picture (mode L or RGB) shows anything."""
    return _box(_ink(image)) is not None


def near_pairs(looks: Sequence[Look]) -> Iterator[tuple[int, int]]:
    """Pairs of pictures with other pixels but nearly the same hash; `alike` has to confirm them."""
    bands: dict[tuple[int, int], list[int]] = defaultdict(list)
    width = BITS // BANDS
    for number, one in enumerate(looks):
        for band in range(BANDS) if one.box else ():
            bands[band, one.bits >> (band * width) & (1 << width) - 1].append(number)
    seen = set()
    for numbers in bands.values():
        for pair in _close_pairs(numbers, looks):
            if pair not in seen:
                seen.add(pair)
                yield pair


def _close_pairs(numbers: list[int], looks: Sequence[Look]) -> Iterator[tuple[int, int]]:
    words = np.array([looks[number].bits for number in numbers], dtype=np.uint64)
    bits = np.unpackbits(words[:, None].view(np.uint8), axis=1)
    for place, number in enumerate(numbers):
        distances = (bits[place + 1 :] ^ bits[place]).sum(axis=1)
        for other in np.flatnonzero(distances <= DISTANCE):
            pair = number, numbers[place + 1 + other]
            if looks[pair[0]].digest != looks[pair[1]].digest and _same_shape(*(looks[row].box for row in pair)):
                yield pair


def alike(first: Image.Image, second: Image.Image) -> bool:
    """Whether two flattened pictures show the same ink, up to scale, place, a pixel's shift and compression."""
    inks = [ink.crop(box) for ink in (_ink(first), _ink(second)) if (box := _box(ink))]
    if len(inks) < 2 or not _same_shape(*(ink.getbbox() for ink in inks)):
        return False
    height = min(HEIGHT, *(ink.height for ink in inks))
    width = max(1, round(height * sum(ink.width / ink.height for ink in inks) / 2))
    scaled = [ink.resize((width, height), Image.Resampling.BOX) for ink in inks]
    return all(_missed(*pair) <= MISSED for pair in (scaled, scaled[::-1]))


def _missed(ink: Image.Image, other: Image.Image) -> int:
    """Most pixels of any 5 x 5 window that are one picture's ink and farther than a pixel from the other's."""
    strong = np.asarray(ink) >= 128
    near = np.asarray(other.filter(ImageFilter.MaxFilter(3))) >= 80
    missed = Image.fromarray(np.uint8(strong & ~near) * 25)
    return missed.filter(ImageFilter.BoxBlur(2)).getextrema()[1]


def _ink(image: Image.Image) -> Image.Image:
    """Distance of each pixel from the paper's grey, the strongest 255; the paper is the commonest grey."""
    grey = image.convert("L")
    histogram = grey.histogram()
    paper = histogram.index(max(histogram))
    most = max(abs(level - paper) for level, count in enumerate(histogram) if count)
    if most < NOISE:
        return Image.new("L", image.size)
    return grey.point([min(255, abs(level - paper) * 255 // most) for level in range(256)])


def _box(ink: Image.Image) -> tuple[int, int, int, int] | None:
    return ink.point(lambda level: 255 * (level >= INK)).getbbox()


def _same_shape(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> bool:
    sizes = [(right - left, bottom - top) for left, top, right, bottom in (first, second)]
    (width, height), (other_width, other_height) = sizes
    slack = SAME_SHAPE + 2 / min(height, other_height)  # two pixels of a low picture are much
    return abs(np.log(width * other_height / (height * other_width))) <= slack


def _bits(ink: Image.Image) -> int:
    """Signs of the 8 x 8 lowest frequencies against their median (Zauner 2010, "pHash")."""
    small = np.asarray(ink.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    low = (_cosines() @ small @ _cosines().T).ravel()
    low[0] = 0.0  # how much ink there is at all
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


@cache
def _cosines() -> np.ndarray:
    """(8, 32) discrete cosine transform of type II."""
    return np.cos(np.pi * np.outer(np.arange(8), np.arange(SIDE) + 0.5) / SIDE)
