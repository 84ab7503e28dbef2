"""Samples -> batch: text keys padded, vision keys concatenated, logits asked for only where they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForSeq2Seq
from transformers.vision_utils import get_vision_position_ids

from latexocr.attention import bucketed
from latexocr.families import Family


@dataclass
class FormulaCollator(DataCollatorForSeq2Seq):
    """`DataCollatorForSeq2Seq` for images and text.

    Rows are padded on the left (`load_processor` sets the tokenizer so): generation needs it, and in training it
    lines the answers up, so that fewer columns of logits are needed.

    The stock collator pads input_ids, attention_mask and labels, but fails on ragged per-token inputs that the
    tokenizer does not know (`mm_token_type_ids`) and cannot join `pixel_values`; the family says which are which.

    `logits_to_keep` (columns,) lists the columns from which any row predicts a supervised token. The vocabulary
    has 151,936 entries, so logits over prompt and image tokens would be most of a step's memory. It is found here,
    on the CPU, because finding it on the GPU would stall the step.
    """

    family: Family | None = None

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        apart = [*(key for key, _ in self.family.padded), *self.family.concatenated]
        # lists, because the stock collator pads labels as arrays and converts them one by one, slowly
        text = [{key: value.tolist() for key, value in feature.items() if key not in apart} for feature in features]
        batch = dict(super().__call__(text, return_tensors))
        for key, value in self.family.padded:
            padded = pad_sequence(
                [f[key] for f in features], batch_first=True, padding_value=value, padding_side="left"
            )
            extra = batch["input_ids"].shape[1] - padded.shape[1]  # pad_to_multiple_of
            batch[key] = pad(padded, (extra, 0), value=value)
        batch |= self._joined(features)
        if "labels" in text[0]:
            supervised = (batch["labels"][:, 1:] != self.label_pad_token_id).any(dim=0)
            batch["logits_to_keep"] = supervised.nonzero()[:, 0]
        else:
            del batch["labels"]  # the stock collator invents `labels: None`
        return batch

    def _joined(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        keys = [key for key in self.family.concatenated if key in features[0]]
        return {key: joined([feature[key] for feature in features]) for key in keys}


@dataclass
class FlattenedCollator(FormulaCollator):
    """Samples -> one row without padding, for `latexocr.attention`: 20 to 30% fewer tokens, one attention call.

    Positions and boundaries are computed here, on the CPU in a worker, so that the step never waits for the GPU to
    say where an image begins. `text_cu_seqlens` and `image_cu_seqlens` (sequences + 1,) are boundaries in tokens and
    patches; `position_ids` (3, 1, length) restart in every sample. `image_grid_thw` is a tuple
    where only its size is read, by the host; families whose vision tower reads the grids get them as a tensor.

    With `round_up` the row is filled up with one more sequence, unsupervised and without pictures, so that few shapes
    occur: a shape can be captured as a CUDA graph.

    Args:
        merge_size: patches a side of a visual token.
        round_up: fill up tokens, supervised columns and (where the family allows it) patches.
    """

    merge_size: int = 2
    round_up: bool = False

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        labels = torch.cat([feature["labels"] for feature in features])
        input_ids = torch.cat([feature["input_ids"] for feature in features])
        positions = torch.cat([self._positions(feature) for feature in features], dim=1)
        kept = (labels[1:] != self.label_pad_token_id).nonzero()[:, 0]
        lengths = [len(feature["input_ids"]) for feature in features]
        batch = {"num_samples": len(features), "num_tokens": len(labels)}
        if self.round_up:
            extra = rounded(len(labels) + 2) - len(labels)
            lengths.append(extra)
            labels = pad(labels, (0, extra), value=self.label_pad_token_id)
            input_ids = pad(input_ids, (0, extra), value=self.tokenizer.pad_token_id)
            positions = pad(positions, (0, extra))
            # coarser, because few shapes matter more here than a little work; the column predicts a filler
            kept = pad(kept, (0, rounded(len(kept), steps=4) - len(kept)), value=len(labels) - 2)
        return {
            **batch,
            **self._token_types(features, len(labels)),
            **(self._given(features) if "image_features" in features[0] else self._images(features)),
            "input_ids": input_ids[None],
            "labels": labels[None],
            "logits_to_keep": kept,
            "position_ids": positions[:, None],
            "text_cu_seqlens": _boundaries(lengths),
            "text_max_seqlen": bucketed(max(lengths)),
        }

    def _token_types(self, features: list[dict[str, Any]], length: int) -> dict[str, torch.Tensor]:
        """(1, length) each; a filler is text."""
        types = {key: torch.cat([feature[key] for feature in features]) for key in self.family.token_types}
        return {key: pad(values, (0, length - len(values)))[None] for key, values in types.items()}

    def _given(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Features in the place of pixels, as of one picture: only their number is read from the grid."""
        rows = torch.cat([feature["image_features"] for feature in features])
        if self.round_up and not self.family.deepstack:
            rows = pad(rows, (0, 0, 0, rounded(len(rows)) - len(rows)))
        return {"image_features": rows, "image_grid_thw": ((1, self.merge_size, self.merge_size * len(rows)),)}

    def _images(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        grids = torch.cat([feature["image_grid_thw"] for feature in features])
        pixel_values = joined([feature["pixel_values"] for feature in features])
        together = 1 if self.family.raster else self.merge_size
        positions = torch.cat([_patch_positions(tuple(row), together) for row in grids.tolist()])
        patches = (grids[:, 1] * grids[:, 2]).tolist()
        if self.round_up and self.family.grid_free:
            extra = rounded(len(pixel_values)) - len(pixel_values)
            patches.append(extra)
            pixel_values = torch.cat([pixel_values, pixel_values.new_zeros(extra, *pixel_values.shape[1:])])
            positions = pad(positions, (0, 0, 0, extra))
        only_size_is_read = ((1, self.merge_size, len(pixel_values) // self.merge_size),)
        return {
            "pixel_values": pixel_values,
            "image_grid_thw": only_size_is_read if self.family.grid_free else grids,
            "image_position_ids": positions,
            "image_cu_seqlens": _boundaries(patches),
            "image_max_seqlen": bucketed(max(patches)),
        }

    def _positions(self, feature: dict[str, torch.Tensor]) -> torch.Tensor:
        return rope_positions(feature["mm_token_type_ids"], feature["image_grid_thw"], self.merge_size)


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts along the first dimension; patches as bytes get three planes each where one picture has colours."""
    if parts[0].dtype == torch.uint8:
        planes = max(part.shape[1] for part in parts)
        parts = [part.expand(-1, planes, -1) for part in parts]
    return torch.cat(parts)


def rope_positions(token_types: torch.Tensor, grids: torch.Tensor, merge_size: int) -> torch.Tensor:
    """Positions in time, height and width of one sample's tokens: what the models' own `get_rope_index` gives.

    Text counts on by one in all three; an image's tokens share a start, count rows and columns from it, and the text
    behind goes on after the longer side (Qwen2-VL, arXiv:2409.12191, section 2.1).

    Args:
        token_types: (length,) 0 for text, 1 for image tokens.
        grids: (images, 3) patches in time, height, width.
        merge_size: patches a side of a visual token.

    Returns:
        (3, length)

    >>> rope_positions(torch.tensor([0, 1, 1, 0]), torch.tensor([[1, 2, 4]]), 2).tolist()
    [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    """
    types = token_types.numpy()  # short arrays cost less in numpy than in torch
    positions, start, at = np.empty((3, len(types)), np.int64), 0, 0
    firsts = np.flatnonzero((types[1:] == 1) & (types[:-1] == 0)) + 1
    for first, (_, height, width) in zip(firsts.tolist(), (grids // merge_size).tolist(), strict=True):
        positions[:, at:first] = np.arange(start, start + first - at)
        start += first - at
        at = first + height * width
        positions[:, first:at] = start
        image = positions[:, first:at].reshape(3, height, width)
        image[1] += np.arange(height)[:, None]
        image[2] += np.arange(width)
        positions[:, first:at] = image.reshape(3, -1)
        start += max(height, width)
    positions[:, at:] = np.arange(start, start + len(types) - at)
    return torch.from_numpy(positions)


@lru_cache(maxsize=4096)
def _patch_positions(grid_thw: tuple[int, int, int], merge_size: int) -> torch.Tensor:
    """(patches, 2) rows and columns of an image's patches, in blocks of `merge_size` a side.

    Most images of a data set share a few hundred grids.
    """
    return get_vision_position_ids(torch.tensor([grid_thw]), merge_size)


def rounded(size: int, *, steps: int = 16) -> int:
    """`size` rounded up to one of `steps` sizes a power of two, a multiple of 64.

    >>> [rounded(size) for size in (1, 100, 2752, 11000)]
    [64, 128, 2816, 11264]
    """
    step = max(64, 2 ** (size.bit_length() - 1) // steps)
    return -(-size // step) * step


def _boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
