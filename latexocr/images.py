"""The one image policy, shared by training and inference.

Why one: a model that was trained on 100 x 500 pictures and is asked about 500 x 100 ones reads nonsense while
its loss looks fine. The policy is a small frozen value; it is saved in `latexocr.json` with every checkpoint and
read back by everything that feeds the model.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from latexocr.errors import InputError
from latexocr.pictures import PictureError, check_size, flatten, load_picture, open_picture, orientation, png_size

if TYPE_CHECKING:
    import torch

ImageInput = "str | Path | bytes | Image.Image | np.ndarray"
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class ImagePolicy:
    """From a picture of any size to the picture that the vision tower gets.

    Args:
        cell: side in pixels of one visual token (patch size x merge size; 28 for Qwen2-VL, 32 for Qwen3-VL).
        mode: "fit" keeps the aspect ratio, scales, and pads with white at the right and bottom to whole cells;
            "fixed" stretches every picture to `height` x `width`, rounded to whole cells.
        min_visual_tokens: smaller pictures are enlarged until they cover at least this many cells.
        max_visual_tokens: larger pictures are shrunk until they cover at most this many cells.
        height: "fixed" only, pixels.
        width: "fixed" only, pixels.
    """

    cell: int = 28
    mode: Literal["fit", "fixed"] = "fit"
    min_visual_tokens: int = 64
    max_visual_tokens: int = 1024
    height: int = 100
    width: int = 500

    def __post_init__(self) -> None:
        if self.mode not in ("fit", "fixed"):
            raise InputError(f"image_mode is {self.mode!r}, needs 'fit' or 'fixed'")
        if not 1 <= self.min_visual_tokens <= self.max_visual_tokens:
            raise InputError(
                f"min_visual_tokens {self.min_visual_tokens} and max_visual_tokens {self.max_visual_tokens}: "
                "needs 1 <= min <= max"
            )
        if min(self.height, self.width) < 1:
            raise InputError(f"image_height {self.height} and image_width {self.width} must be positive")

    def layout(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Content width and height, then canvas width and height, in pixels, for a picture of this size.

        >>> ImagePolicy(min_visual_tokens=1).layout(200, 50)  # 8 x 2 cells of 28 pixels
        (200, 50, 224, 56)
        """
        if self.mode == "fixed":
            size = tuple(max(1, round(side / self.cell)) * self.cell for side in (self.width, self.height))
            return (*size, *size)
        scale = 1.0
        if self._cells(width, height, 1.0) < self.min_visual_tokens:
            scale = math.sqrt(self.min_visual_tokens * self.cell**2 / (width * height))
        # Rounding up to whole cells can pass the limit: shrink in steps of 2% (at most a few) until it holds.
        while self._cells(width, height, scale) > self.max_visual_tokens:
            scale *= min(0.98, math.sqrt(self.max_visual_tokens / self._cells(width, height, scale)))
        content = [max(1, round(side * scale)) for side in (width, height)]
        canvas = [math.ceil(side / self.cell) * self.cell for side in content]
        return (*content, *canvas)

    def _cells(self, width: int, height: int, scale: float) -> int:
        columns, rows = (math.ceil(max(1, round(side * scale)) / self.cell) for side in (width, height))
        return columns * rows

    def describe(self) -> str:
        """In words, for people.

        >>> ImagePolicy().describe()
        'fit: aspect ratio kept, 64 to 1024 visual tokens of 28 x 28 pixels'
        """
        cell = f"{self.cell} x {self.cell} pixels"
        if self.mode == "fixed":
            width, height, _, _ = self.layout(1, 1)
            return f"fixed: stretched to {width} x {height} pixels, visual tokens of {cell}"
        return f"fit: aspect ratio kept, {self.min_visual_tokens} to {self.max_visual_tokens} visual tokens of {cell}"

    def visual_tokens(self, width: int, height: int) -> int:
        """How many visual tokens a picture of this size becomes: known from its header alone."""
        _, _, canvas_width, canvas_height = self.layout(width, height)
        return canvas_width * canvas_height // self.cell**2

    def apply(self, image: Image.Image) -> Image.Image:
        """The picture that the model sees: RGB, both sides whole cells."""
        return self.canvas(image).convert("RGB")

    def canvas(self, image: Image.Image) -> Image.Image:
        """`apply` of a flattened picture (mode L or RGB) without the conversion: grey is a third of the work."""
        width, height, canvas_width, canvas_height = self.layout(*image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        if (width, height) == (canvas_width, canvas_height):
            return image
        canvas = Image.new(image.mode, (canvas_width, canvas_height), "white")
        canvas.paste(image, (0, 0))
        return canvas


def load_image(source: ImageInput, where: str | None = None) -> Image.Image:
    """A picture from a path, bytes, PIL image or array, upright and flattened on white, mode L or RGB.

    Args:
        source: path, encoded bytes, `PIL.Image`, or array of shape (height, width[, channels]) in uint8.
        where: how an error names it; the path by default.

    Raises:
        InputError: missing, empty, corrupt, or of an absurd size.
    """
    with _named_errors(where, str(source) if isinstance(source, str | Path) else f"image ({type(source).__name__})"):
        if isinstance(source, Image.Image):
            return flatten(_sized(source))
        if isinstance(source, bytes):
            return flatten(load_picture(io.BytesIO(source)))
        if isinstance(source, str | Path):
            return flatten(load_picture(Path(source)))
        try:
            return flatten(_sized(Image.fromarray(source)))
        except (TypeError, ValueError, AttributeError) as error:
            raise PictureError(f"no picture: needs (height, width[, channels]) in uint8 ({error})") from error


def image_size(source: Path | bytes, where: str | None = None) -> tuple[int, int]:
    """Width and height in pixels after EXIF rotation, read from the header without decoding.

    Raises:
        InputError: missing, empty, not an image, or of an absurd size.
    """
    with _named_errors(where, f"image ({len(source)} bytes)" if isinstance(source, bytes) else str(source)):
        size = None if isinstance(source, bytes) else png_size(source)
        if size is not None:
            return size
        with open_picture(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            return (height, width) if orientation(image) in TRANSPOSED else (width, height)


@dataclass(frozen=True)
class Patcher:
    """Picture -> patches: the work of `Qwen2VLImageProcessor` in two halves, bit for bit and without its overhead.

    Why: the checkpoint's own image processor validates at every call options that never change, and makes 24 bytes of
    each byte of a grey picture (three equal channels, twice the same picture, float32), all of which would have to
    travel from the worker to the GPU. `cut` runs in the worker, `normalise` on the GPU.

    Args:
        patch_size: side of a patch in pixels.
        merge_size: patches a side of a visual token.
        temporal_patch_size: how often a still picture is repeated in a patch.
        mean: of each channel's pixels, which go from 0 to 255; a float32 value.
        std: likewise.
        raster: patches stand row by row and are small pictures; else those of a visual token stand together, flat.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    raster: bool = False

    @classmethod
    def equal_to(cls, image_processor: Any) -> Patcher | None:
        """A patcher that gives what this image processor gives, or None if there is none.

        It is tried and not looked up: both get the same picture of noise, and every bit must be equal.
        """
        import numpy as np
        import torch

        names = ("image_mean", "image_std", "rescale_factor", "patch_size", "merge_size", "temporal_patch_size")
        mean, std, rescale_factor, *sizes = (getattr(image_processor, name, None) for name in names)
        if None in (mean, std, rescale_factor, *sizes):
            return None
        # in the processor's own order of operations: its rounding is part of its result
        mean, std = ((torch.tensor(values) * (1.0 / rescale_factor)).tolist() for values in (mean, std))
        patchers = [cls(*sizes, tuple(mean), tuple(std), raster) for raster in (False, True)]
        height, width = (cells * patchers[0].patch_size * patchers[0].merge_size for cells in (2, 3))
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        theirs = image_processor(images=[picture], do_resize=False, return_tensors="pt")
        for patcher in patchers:
            pixels, grid_thw = patcher.cut(picture)
            same = torch.equal(patcher.normalise(pixels), theirs["pixel_values"])
            if same and torch.equal(grid_thw, theirs["image_grid_thw"]):
                return patcher
        return None

    def cut(self, picture: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches as bytes, and their grid.

        Args:
            picture: mode L or RGB, both sides whole cells.

        Returns:
            pixels (patches, 1 or 3 planes, patch * patch) uint8, image_grid_thw (1, 3).
        """
        import numpy as np
        import torch

        patch, merge = self.patch_size, 1 if self.raster else self.merge_size
        grid_h, grid_w = picture.height // patch, picture.width // patch
        pixels = np.asarray(picture).reshape(grid_h // merge, merge, patch, grid_w // merge, merge, patch, -1)
        # rows of merge x merge blocks of patches; in a patch plane, row, column
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 4, 6, 2, 5))
        planes = torch.from_numpy(pixels).view(grid_h * grid_w, -1, patch * patch)
        return planes, torch.tensor([[1, grid_h, grid_w]])

    def normalise(self, pixels: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`pixel_values` from the bytes of `cut`, on their device.

        Args:
            pixels: (patches, planes, patch * patch); one plane stands for all channels.
            dtype: of the result; float32 by default. The arithmetic is float32 always.

        Returns:
            (patches, channels * temporal * patch * patch), `raster`: (patches, channels * temporal, patch, patch).
        """
        mean, std = (_column(values, pixels.device) for values in (self.mean, self.std))
        values = ((pixels.float()[:, :, None] - mean) / std).to(dtype)
        values = values.expand(-1, -1, self.temporal_patch_size, -1)
        return values.reshape(len(values), -1, self.patch_size, self.patch_size) if self.raster else values.flatten(1)


@lru_cache
def _column(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(1, channels, 1, 1), moved to the device once: a tensor, because CUDA divides by numbers inexactly."""
    import torch

    return torch.tensor(values, device=device)[None, :, None, None]


def unpatchify(pixel_values: torch.Tensor, grid_thw: torch.Tensor, image_processor: Any) -> Image.Image:
    """The picture back from the patches: proof of what the model really gets.

    Inverse of `Qwen2VLImageProcessor`'s patch order (rows of merge x merge blocks) or of PaddleOCR-VL's (row by row),
    and of the normalisation.

    Args:
        pixel_values: (patches, channels * temporal * patch * patch) of one image, or (patches, channels, patch, patch)
            row by row.
        grid_thw: (3,) patches in time, height, width.
        image_processor: the one that made them; gives sizes, mean and standard deviation.
    """
    import torch

    _, grid_h, grid_w = (int(size) for size in grid_thw)
    merge, patch = 1 if pixel_values.dim() == 4 else image_processor.merge_size, image_processor.patch_size
    blocks = pixel_values.reshape(
        grid_h // merge, grid_w // merge, merge, merge, 3, image_processor.temporal_patch_size, patch, patch
    )[:, :, :, :, :, 0]
    picture = blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(grid_h * patch, grid_w * patch, 3)
    mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    pixels = ((picture * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def _sized(image: Image.Image) -> Image.Image:
    reason = check_size(*image.size)
    if reason:
        raise PictureError(reason)
    return image


@contextlib.contextmanager
def _named_errors(where: str | None, name: str) -> Iterator[None]:
    """Errors name the image, or its record and where the file was looked for."""
    try:
        yield
    except FileNotFoundError as error:
        looked = "" if where is None else f" {error.filename}; relative paths begin at the data file's folder"
        raise InputError(f"{where or name}: no such image file{looked}") from error
    except IsADirectoryError as error:
        raise InputError(f"{where or name}: {error.filename} is a folder; name an image file") from error
    except PictureError as error:
        way_out = "give another image" if where is None else "delete the record or replace the image"
        raise InputError(f"{where or name}: {error}; {way_out}") from error
