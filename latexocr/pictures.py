"""What a usable formula picture is: limits read from the header, and flattening to plain grey or RGB.

Why its own module: stage 1 stores pictures and the image policy reads them; both must agree on what is too
small, too large, transparent or rotated. No limit here needs the pixels, so a 20,000 x 20,000 picture costs
no memory.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageChops

MIN_SIDE_PX = 4
MAX_PIXELS = 64_000_000
MAX_ASPECT = 200

# Raster formats only: PIL would hand an EPS to Ghostscript, which is a program inside a data set.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")

_EXIF_ORIENTATION = 0x0112
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
