"""One self-contained HTML page from data and a script of ours: opens offline, years later, on any machine.

Why: the pages show what a model wrote and what lies in a data set, neither of which is to be trusted. Data goes into
the page as JSON only, scripts put it on the screen as text only, and the page's own policy (Content-Security-Policy)
lets no other script run and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from pathlib import Path

from PIL import Image

from latexocr.contract import write_text
from latexocr.pictures import flatten, load_picture

SOURCES = Path(__file__).with_name("html")
BLOCK = 256  # pictures that the page unpacks together, when the first of them is looked at
SCALES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)
READABLE = ("PNG", "JPEG", "WEBP", "GIF")  # by every browser
PRINT_DPI = 180  # of drawn formulas; page.js shows them at 1.3 times the size of print on paper
GREYS = 16  # as many as print needs
MAX_WIDTH = 3000  # pixels of print; what a runaway answer prints beyond is cut off

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src '{style_hash}'; \
script-src '{script_hash}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript>This page draws itself with JavaScript, which is switched off here.</noscript>
{data}
<script>{script}</script>
</body>
</html>
"""


class Pictures:
    """The pictures of a page, each kept once, in few bytes."""

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self._places: dict[bytes, int] = {}

    def add_print(self, png: bytes | None) -> int | None:
        """`add` for what `latexocr.render` drew; None where it drew nothing."""
        return None if png is None else self.add(print_picture(Image.open(io.BytesIO(png)).convert("L")))

    def add(self, data: bytes) -> int:
        """The place by which the page's script gets this picture (encoded, one of `READABLE`)."""
        place = self._places.setdefault(data, len(self.encoded))
        if place == len(self.encoded):
            self.encoded.append(base64.b64encode(data).decode("ascii"))
        return place


def write_page(path: Path, *, name: str, title: str, data: dict, pictures: Pictures) -> None:
    """Write the page `name` (html/NAME.js draws it) with its data, whole or not at all.

    Args:
        path: the file.
        name: which script of the folder `html` draws the data.
        title: of the window.
        data: what the script gets; JSON's own types.
        pictures: the script gets them by the places that `Pictures.add` returned.
    """
    style = (SOURCES / "page.css").read_text(encoding="utf-8")
    script = "".join((SOURCES / file).read_text(encoding="utf-8") for file in ("page.js", f"{name}.js"))
    encoded = pictures.encoded
    blocks = [encoded[start : start + BLOCK] for start in range(0, len(encoded), BLOCK)]
    parts = {"data": {**data, "title": title, "block": BLOCK}}
    parts |= {f"pictures-{number}": block for number, block in enumerate(blocks)}
    elements = (f'<script type="application/json" id="{key}">{_json(part)}</script>' for key, part in parts.items())
    page = _PAGE.format(
        title=html.escape(title.encode("utf-8", "replace").decode()),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data="\n".join(elements),
    )
    write_text(path, page)


def small_picture(image: Image.Image, max_bytes: int) -> bytes:
    """A flattened picture (mode L or RGB) in at most `max_bytes`, coarser or smaller where it has to be."""
    if image.mode == "L":
        data = print_picture(image)
        if len(data) <= max_bytes and image.width <= MAX_WIDTH:
            return data
    for scale in SCALES:
        size = [max(1, round(side * scale)) for side in image.size]
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.LANCZOS).save(buffer, "WEBP", quality=40)
        if buffer.tell() <= max_bytes:
            break
    return buffer.getvalue()


def print_picture(image: Image.Image) -> bytes:
    """A grey picture of print, cut at `MAX_WIDTH`, without loss but for the number of greys: half a PNG's bytes."""
    step = 255 // (GREYS - 1)
    few_greys = image.crop((0, 0, min(MAX_WIDTH, image.width), image.height)).point(
        [round(value / step) * step for value in range(256)]
    )
    buffer = io.BytesIO()
    few_greys.save(buffer, "WEBP", lossless=True, method=1)
    return buffer.getvalue()


def stored_picture(file: Path, max_bytes: int) -> bytes:
    """A picture as the page keeps it: its own bytes where they are few and every browser shows them.

    Raises:
        PictureError: as `latexocr.pictures.load_picture`.
        OSError: likewise.
    """
    data = file.read_bytes()
    image = load_picture(io.BytesIO(data))
    if len(data) <= max_bytes and image.format in READABLE:
        return data
    return small_picture(flatten(image), max_bytes)


def _json(value: object) -> str:
    # ASCII: half a surrogate pair is in no encoding. Without "<" there is no end of the script element.
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
