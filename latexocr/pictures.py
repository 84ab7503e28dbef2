"""What a usable formula picture is: limits read from the header, and flattening to plain grey or RGB.

Why its own module: stage 1 stores pictures and the image policy reads them; both must agree on what is too
small, too large, transparent or rotated. No limit here needs the pixels, so a 20,000 x 20,000 picture costs
no memory.
"""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageChops

MIN_SIDE_PX = 4
MAX_PIXELS = 64_000_000
MAX_ASPECT = 200

# Raster formats only: PIL would hand an EPS to Ghostscript, which is a program inside a data set.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")

_EXIF_ORIENTATION = 0x0112
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
_PNG_PLAIN = (b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT", b"bKGD", b"tIME")  # cannot rotate
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """This picture cannot be used; the message is `category: detail` (or the category alone)."""


def check_size(width: int, height: int) -> str | None:
    """The reason why a picture of this size (pixels) is absurd, or None.

    >>> check_size(1, 1)
    'absurd size: 1x1 pixels, a side needs at least 4'
    >>> check_size(200, 50) is None
    True
    """
    size = f"absurd size: {width}x{height} pixels"
    if min(width, height) < MIN_SIDE_PX:
        return f"{size}, a side needs at least {MIN_SIDE_PX}"
    if width * height > MAX_PIXELS:
        return f"{size}, more than {MAX_PIXELS // 1_000_000} megapixels"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{size}, one side more than {MAX_ASPECT} times the other"
    return None


def open_picture(file: Path | BinaryIO) -> Image.Image:
    """Open a picture by its header and check its size; the pixels are not decoded yet.

    Args:
        file: path, or a binary file such as `io.BytesIO(data)`.

    Raises:
        PictureError: empty, not a picture that is read here, or of absurd size.
        OSError: no file at the path, or it may not be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's bomb warning: our own limit below is the stricter one
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        megapixels = f"{int(pixels.group(1)) // 1_000_000}" if pixels else "far too many"
        limit = MAX_PIXELS // 1_000_000
        raise PictureError(f"absurd size: {megapixels} megapixels, more than {limit}") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # broken headers raise anything: OSError, SyntaxError, struct.error, ...
        if isinstance(file, Path) and file.stat().st_size == 0:
            raise PictureError("empty file (0 bytes)") from error
        raise PictureError(f"undecodable image: {_what_was_wrong(error)}") from error
    reason = check_size(*image.size)
    if reason:
        raise PictureError(reason)
    return image


def png_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a plain, sound PNG; None for everything that `open_picture` has to judge.

    Why: PIL decodes a PNG's pixels before it says how it is rotated, because that may stand behind them; a training
    asks for the sizes of 100,000 files before it starts. Chunks: PNG specification (third edition), section 11.

    Raises:
        OSError: no file at the path, or it may not be read.
    """
    with path.open("rb") as file:
        head = file.read(33)
        if len(head) < 33 or not head.startswith(_PNG_START) or not _sound(head[12:]):
            return None
        width, height, depth, colour, *methods = struct.unpack(">IIBBBBB", head[16:29])
        if depth not in _PNG_DEPTHS.get(colour, ()) or methods not in ([0, 0, 0], [0, 0, 1]):
            return None
        kind, has_pixels = b"IHDR", False
        while kind != b"IEND":
            chunk = file.read(8)
            if len(chunk) < 8:
                return None
            length, kind = struct.unpack(">I4s", chunk)
            if kind == b"IDAT":
                has_pixels = True
                file.seek(length + 4, 1)
            elif kind not in (*_PNG_PLAIN, b"IEND") or not _sound(kind + file.read(length + 4)):
                return None
    return (width, height) if has_pixels and check_size(width, height) is None else None


def _sound(chunk: bytes) -> bool:
    """Whether a PNG chunk (type, data, checksum) is what was written."""
    return zlib.crc32(chunk[:-4]).to_bytes(4, "big") == chunk[-4:]


def load_picture(file: Path | BinaryIO) -> Image.Image:
    """`open_picture` with the pixels decoded, so that a truncated file is found here and not in training.

    Raises:
        PictureError: as in `open_picture`, or the pixel data is damaged.
        OSError: no file at the path, or it may not be read.
    """
    image = open_picture(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata of a picture whose pixels are fine
            image.load()
    except Exception as error:  # damaged pixel data raises anything too
        raise PictureError(f"undecodable image: {_what_was_wrong(error)}") from error
    return image


def flatten(image: Image.Image) -> Image.Image:
    """The picture as a person sees it on white paper: upright, without alpha or palette, mode L or RGB.

    EXIF rotation is applied; transparency becomes white; 16-bit and float samples become 8-bit; a palette of
    greys becomes L. Nothing is resized or sharpened.

    >>> flatten(Image.new("RGBA", (8, 8), (0, 0, 0, 0))).getpixel((0, 0))
    255
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        turn = _UPRIGHT.get(orientation(image))
        image = image.transpose(turn) if turn is not None else image
        if image.mode.startswith(("I", "F")):
            return _to_8_bit(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            paper = Image.new("RGBA", image.size, "white")
            return _grey_if_grey(Image.alpha_composite(paper, image).convert("RGB"))
        if image.mode == "1":
            return image.convert("L")
        if image.mode in ("L", "RGB"):
            return image
        return _grey_if_grey(image.convert("RGB"))  # P, CMYK, YCbCr, LAB, HSV, RGBX


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 when there is none or it cannot be read."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata says nothing about the pixels
        return 1


def is_blank(image: Image.Image) -> bool:
    """Whether a flattened picture (mode L or RGB) is one single colour."""
    extrema = image.getextrema()
    bands = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return all(low == high for low, high in bands)


def _grey_if_grey(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    same = not ImageChops.difference(red, green).getbbox() and not ImageChops.difference(red, blue).getbbox()
    return red if same else image


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit or float samples -> L, by the smallest full scale (1, 255, 65535) that holds them."""
    import numpy as np

    samples = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    top = samples.max()
    scales = ([1.0] if image.mode.startswith("F") else []) + [255.0, 65535.0, top]
    scale = next(scale for scale in scales if top <= scale)
    return Image.fromarray(np.rint(samples.clip(0, None) * (255 / scale)).astype(np.uint8))


def _what_was_wrong(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not one of the formats " + ", ".join(FORMATS)
    return " ".join(f"{error}".split()) or type(error).__name__
