"""Damage that pictures suffer in print, scanner, camera and on the board; the same for generator and training.

Why: a model that has seen one renderer's pixels reads no other's. Which damage a style suffers, how often and how
strongly stands in latexocr.styles; every effect here takes a grey picture (mode L, dark on light), an amount and a
random generator, and depends on nothing else.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from latexocr.styles import style_named

WHITE = 255


def augment(image: Image.Image, style: str, rng: np.random.Generator) -> Image.Image:
    """The picture with the damage of a style, as a grey picture (mode L); the same for the same state of `rng`.

    Args:
        image: any mode; dark on light.
        style: a name of `latexocr.styles.STYLES`.
        rng: chooses effects and amounts.

    Raises:
        InputError: no such style.
    """
    image = image if image.mode == "L" else image.convert("L")
    for effect in style_named(style).effects:
        if rng.random() < effect.probability:
            image = EFFECTS[effect.name](image, rng.uniform(effect.low, effect.high), rng)
    return image


def _shift(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Moved by up to `amount` pixels each way, without losing ink."""
    box = ImageChops.invert(image).getbbox() or (0, 0, *image.size)
    most = round(amount)
    x = int(rng.integers(-min(most, box[0]), min(most, image.width - box[2]) + 1))
    y = int(rng.integers(-min(most, box[1]), min(most, image.height - box[3]) + 1))
    moved = Image.new("L", image.size, WHITE)
    moved.paste(image, (x, y))
    return moved


def _scale(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    size = max(8, round(image.width * amount)), max(8, round(image.height * amount))
    return image.resize(size, Image.Resampling.BICUBIC)


def _weight(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Bolder by a part of a pixel, or thinner if negative: mixed with itself grown to the right and down."""
    join = ImageChops.darker if amount > 0 else ImageChops.lighter
    grown = join(image, ImageChops.offset(image, 1, 0))
    return Image.blend(image, join(grown, ImageChops.offset(grown, 0, 1)), abs(amount))


def _contrast(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Grey darker (amount above 1) or lighter; black and white stay."""
    return image.point([round(WHITE * (level / WHITE) ** amount) for level in range(256)])


def _fade(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Ink that has lost darkness: `amount` of it is left."""
    return image.point([round(WHITE - (WHITE - level) * amount) for level in range(256)])


def _blur(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(amount))


def _noise(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Grain of `amount` grey levels (standard deviation)."""
    grain = rng.standard_normal((image.height, image.width), np.float32) * np.float32(amount)
    return _grey(np.asarray(image) + grain)


def _jpeg(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(amount))
    return Image.open(file, formats=("JPEG",)).convert("L")


def _rotate(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Turned by `amount` degrees; the picture grows so that nothing is lost."""
    return image.rotate(amount, Image.Resampling.BICUBIC, expand=True, fillcolor=WHITE)


def _paper(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Grey paper, up to `amount` levels darker and lit unevenly."""
    shade = _field(image.size, 3, rng) * np.float32(amount)
    return _grey(np.asarray(image) * (1 - shade / WHITE))


def _speckle(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Dust: the share `amount` of the pixels becomes dark or light."""
    pixels = np.array(image)
    places = rng.integers(0, pixels.size, round(amount * pixels.size))
    pixels.flat[places] = rng.integers(0, 256, len(places))
    return Image.fromarray(pixels)


def _elastic(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """The sheet stretched here and there by up to `amount` pixels; the corners of a mesh of 24 pixels move."""
    columns, rows = max(2, image.width // 24 + 1), max(2, image.height // 24 + 1)
    xs, ys = np.linspace(0, image.width, columns), np.linspace(0, image.height, rows)
    moved = rng.uniform(-amount, amount, (rows, columns, 2)) + np.stack(np.meshgrid(xs, ys), -1)
    mesh = []
    for row in range(rows - 1):
        for column in range(columns - 1):
            target = (int(xs[column]), int(ys[row]), int(xs[column + 1]), int(ys[row + 1]))
            corners = ((row, column), (row + 1, column), (row + 1, column + 1), (row, column + 1))
            mesh.append((target, tuple(float(value) for corner in corners for value in moved[corner])))
    resample = Image.Resampling.BILINEAR
    return image.transform(image.size, Image.Transform.MESH, mesh, resample, fillcolor=WHITE)


def _rough(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Ink that did not take everywhere: up to `amount` of the grain of the ground stays bare."""
    bare = rng.random((image.height, image.width), np.float32) < amount * _field(image.size, 24, rng)
    return _grey(np.where(bare, WHITE - (WHITE - np.asarray(image, np.float32)) * 0.35, image))


def _board(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Light on a dark board of `amount` levels, wiped unevenly."""
    ground = amount + 30 * _field(image.size, 4, rng)
    stroke = np.float32(rng.uniform(200, 245))
    coverage = (WHITE - np.asarray(image, np.float32)) / WHITE
    return _grey(ground + (stroke - ground) * coverage)


def _field(size: tuple[int, int], cells: int, rng: np.random.Generator) -> np.ndarray:
    """Values in 0 to 1 that change slowly (height, width): a small random picture, enlarged."""
    small = Image.fromarray(rng.integers(0, 256, (cells, cells), np.uint8))
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC), np.float32) / 255


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


EFFECTS: dict[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "shift": _shift,
    "scale": _scale,
    "weight": _weight,
    "contrast": _contrast,
    "fade": _fade,
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
    "rotate": _rotate,
    "paper": _paper,
    "speckle": _speckle,
    "elastic": _elastic,
    "rough": _rough,
    "board": _board,
}
