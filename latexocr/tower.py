"""What a vision tower has to be told about the pictures of a batch, found on the CPU.

Where each patch stands, which patches belong together, and so on: transformers' towers work it out from the grids,
with loops on the host and waits for the GPU on the way, unless they are given it (`transformers.vision_utils`). Given
it, the towers never look at the grids: steps do not wait, and can be captured as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from latexocr.attention import bucketed
from latexocr.families import Family

Grid = tuple[int, int, int]  # patches in time, height, width
CACHED = 4096  # most images of a data set share a few hundred grids


@dataclass(frozen=True)
class Tower:
    """The sizes of a checkpoint's vision tower that tell how it sees pictures.

    Args:
        merge_size: patches a side of a visual token.
        needs_grids: it asks for more than what is told here, so it must see the grids.
        raster: it takes patches row by row, not visual token by visual token.
        window: visual tokens a side of the windows in which most layers attend; 0 without.
        table: a side of the learned table of positions, stretched over every picture; 0 without.
    """

    merge_size: int = 2
    needs_grids: bool = True
    raster: bool = False
    window: int = 0
    table: int = 0

    @classmethod
    def of(cls, family: Family, config: Any) -> Tower:
        """That of a model with this `config`."""
        vision = config.vision_config
        merge_size = vision.spatial_merge_size
        return cls(
            merge_size,
            needs_grids=family.tower == "grids",
            raster=family.raster,
            window=vision.window_size // vision.patch_size // merge_size if family.tower == "windows" else 0,
            table=int(vision.num_position_embeddings**0.5) if family.tower == "table" else 0,
        )

    def told(
        self, grids: torch.Tensor, *, filler: int | None = None, round_up: Callable[[int], int] = int
    ) -> dict[str, Any]:
        """Everything about these pictures, under the names by which transformers hands it on to the tower.

        Args:
            grids: (pictures, 3) patches in time, height, width. Each frame of a video is a sequence of its own.
            filler: patches of one more picture, perhaps an empty one, which nobody sees.
            round_up: number of windows -> how many to fill them up to, with empty ones.

        Returns:
            `image_position_ids` (patches, 2), rows and columns; `image_cu_seqlens` (frames + 1,), int32, and
            `image_max_seqlen`; with windows `image_window_index` (visual tokens,), `image_cu_window_seqlens`
            (windows + 1,), int32, and `image_max_window_seqlen`; with a table `image_interp_indices` and
            `image_interp_weights` (patches, 4).
        """
        pictures: list[Grid] = [tuple(row) for row in grids.tolist()]
        frames = [height * width for time, height, width in pictures for _ in range(time)]
        frames += [] if filler is None else [filler]
        extra = filler or 0
        positions = torch.cat([_positions(each, 1 if self.raster else self.merge_size) for each in pictures])
        told = {
            "image_position_ids": pad(positions, (0, 0, 0, extra)),
            "image_cu_seqlens": boundaries(frames),
            "image_max_seqlen": bucketed(max(frames)),
        }
        if self.window:
            told |= self._windows(pictures, extra, round_up)
        if self.table:
            found = [_taps(each, self.table, self.merge_size) for each in pictures]
            indices, weights = (pad(torch.cat(part), (0, 0, 0, extra)) for part in zip(*found, strict=True))
            told |= {"image_interp_indices": indices, "image_interp_weights": weights}
        return told

    def _windows(self, pictures: list[Grid], extra: int, round_up: Callable[[int], int]) -> dict[str, Any]:
        orders, lengths, start, longest = [], [], 0, (self.window * self.merge_size) ** 2
        for picture in pictures:
            order, sizes = _windows(picture, self.window, self.merge_size)
            orders.append(order + start)
            lengths += sizes
            start += len(order)
        orders.append(torch.arange(start, start + extra // self.merge_size**2))
        lengths += [min(longest, extra - done) for done in range(0, extra, longest)]
        return {
            "image_window_index": torch.cat(orders),
            "image_cu_window_seqlens": boundaries(lengths + [0] * (round_up(len(lengths)) - len(lengths))),
            "image_max_window_seqlen": longest,
        }


def boundaries(lengths: list[int]) -> torch.Tensor:
    """(sequences + 1,), int32.

    >>> boundaries([3, 2]).tolist()
    [0, 3, 5]
    """
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@lru_cache(maxsize=CACHED)
def _positions(grid: Grid, merge_size: int) -> torch.Tensor:
    """(patches, 2) rows and columns of a picture's patches, in blocks of `merge_size` a side."""
    return get_vision_position_ids(torch.tensor([grid]), merge_size)


@lru_cache(maxsize=CACHED)
def _windows(grid: Grid, window: int, merge_size: int) -> tuple[torch.Tensor, list[int]]:
    """(visual tokens,) in the order of windows, and the patches of each window."""
    order, bounds = get_vision_window_index(torch.tensor([grid]), merge_size, window * merge_size, patch_size=1)
    return order, bounds.diff().tolist()


@lru_cache(maxsize=CACHED)
def _taps(grid: Grid, side: int, merge_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(patches, 4) places in the table of positions, and their weights."""
    return get_vision_interpolation_indices_and_weights(
        torch.tensor([grid]), side, "bilinear", align_corners=True, spatial_merge_size=merge_size
    )
