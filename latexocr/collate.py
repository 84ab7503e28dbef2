"""Samples -> batch: text keys padded, vision keys concatenated, logits asked for only where they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForSeq2Seq

from latexocr.attention import bucketed
from latexocr.families import Family
from latexocr.preprocess import joined
from latexocr.tower import Tower, boundaries


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

    Args:
        family: says which inputs are which.
        blank: `Preprocessor.blank`, which joins a batch that shows nothing; the batch's `num_samples` leaves it out.
        tower: what the vision tower has to be told (default: little enough for every tower).
    """

    family: Family | None = None
    blank: dict[str, torch.Tensor] | None = None
    tower: Tower | None = None

    def __post_init__(self) -> None:
        if self.tower is None:
            self.tower = Tower(raster=self.family.raster)

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        num_samples, features = len(features), self._with_picture(features)
        apart = [*(key for key, _ in self.family.padded), *self.family.concatenated, "frame_intervals"]
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
        if any("frame_intervals" in feature for feature in features):  # the model would not know them
            longest = batch["input_ids"].shape[1]
            positions = [self._positions(feature) for feature in features]
            batch["position_ids"] = torch.stack([pad(each, (longest - each.shape[1], 0)) for each in positions], dim=1)
        if len(features) > num_samples:
            batch["num_samples"] = num_samples
        if "labels" in text[0]:
            supervised = (batch["labels"][:, 1:] != self.label_pad_token_id).any(dim=0)
            batch["logits_to_keep"] = supervised.nonzero()[:, 0]
        else:
            del batch["labels"]  # the stock collator invents `labels: None`
        return batch

    def _with_picture(self, features: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With the blank where nothing is shown: every batch must enter the vision tower, on every rank."""
        if self.blank is None or any("image_grid_thw" in feature for feature in features):
            return features
        return [*features, {key: value for key, value in self.blank.items() if key != "labels" or key in features[0]}]

    def _joined(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        found = {key: [f[key] for f in features if key in f] for key in self.family.concatenated}
        return {key: joined(parts) for key, parts in found.items() if parts}

    def _positions(self, feature: dict[str, torch.Tensor]) -> torch.Tensor:
        grids = feature.get("image_grid_thw", torch.empty(0, 3, dtype=torch.long))
        return rope_positions(
            feature["mm_token_type_ids"], grids, self.tower.merge_size, intervals=feature.get("frame_intervals")
        )


@dataclass
class FlattenedCollator(FormulaCollator):
    """Samples -> one row without padding, for `latexocr.attention`: 20 to 30% fewer tokens, one attention call.

    Positions and boundaries are computed here, on the CPU in a worker, so that the step never waits for the GPU to
    say where an image begins. `text_cu_seqlens` (sequences + 1,) are boundaries in tokens; `position_ids`
    (3, 1, length) restart in every sample; what the vision tower is told, see `Tower.told`. `image_grid_thw` is a
    tuple where only its size is read, by the host; a tower that needs the grids gets them as a tensor.

    With `round_up` the row is filled up with one more sequence, unsupervised and without pictures, so that few shapes
    occur: a shape can be captured as a CUDA graph.

    A video is a picture with a time axis: each of its frames is a sequence of the vision tower.

    Args:
        round_up: fill up tokens, supervised columns and (where the family allows it) patches.
    """

    round_up: bool = False

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        num_samples, features = len(features), self._with_picture(features)
        labels = torch.cat([feature["labels"] for feature in features])
        input_ids = torch.cat([feature["input_ids"] for feature in features])
        positions = torch.cat([self._positions(feature) for feature in features], dim=1)
        kept = (labels[1:] != self.label_pad_token_id).nonzero()[:, 0]
        lengths = [len(feature["input_ids"]) for feature in features]
        batch = {"num_samples": num_samples, "num_tokens": len(labels)}
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
            "text_cu_seqlens": boundaries(lengths),
            "text_max_seqlen": bucketed(max(lengths)),
        }

    def _token_types(self, features: list[dict[str, Any]], length: int) -> dict[str, torch.Tensor]:
        """(1, length) each; a filler is text."""
        types = {key: torch.cat([feature[key] for feature in features]) for key in self.family.token_types}
        return {key: pad(values, (0, length - len(values)))[None] for key, values in types.items()}

    def _given(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Features in the place of pixels, as of one picture: only their number is read from the grid."""
        rows = torch.cat([feature["image_features"] for feature in features])
        if self.round_up:
            rows = pad(rows, (0, 0, 0, rounded(len(rows)) - len(rows)))
        return {"image_features": rows, "image_grid_thw": self._only_size(len(rows) * self.tower.merge_size**2)}

    def _images(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        shown = self._joined(features)
        grids, pixel_values, filler = shown["image_grid_thw"], shown["pixel_values"], None
        if self.round_up and not self.tower.needs_grids:
            filler = rounded(len(pixel_values)) - len(pixel_values)
            pixel_values = torch.cat([pixel_values, pixel_values.new_zeros(filler, *pixel_values.shape[1:])])
        return {
            "pixel_values": pixel_values,
            "image_grid_thw": grids if self.tower.needs_grids else self._only_size(len(pixel_values)),
            **self.tower.told(grids, filler=filler, round_up=rounded if self.round_up else int),
        }

    def _only_size(self, patches: int) -> tuple[tuple[int, int, int]]:
        return ((1, self.tower.merge_size, patches // self.tower.merge_size),)


def rope_positions(
    token_types: torch.Tensor, grids: torch.Tensor, merge_size: int, *, intervals: torch.Tensor | None = None
) -> torch.Tensor:
    """Positions in time, height and width of one sample's tokens: what the models' own `get_rope_index` gives.

    Text counts on by one in all three; an image's tokens share a start, count frames, rows and columns from it, and
    the text behind goes on after the longer side (Qwen2-VL, arXiv:2409.12191, section 2.1).

    Args:
        token_types: (length,) 0 for text, 1 for image tokens.
        grids: (images, 3) patches in time, height, width.
        merge_size: patches a side of a visual token.
        intervals: (images,) positions from one frame to the next; 1 by default.

    Returns:
        (3, length)

    >>> rope_positions(torch.tensor([0, 1, 1, 0]), torch.tensor([[1, 2, 4]]), 2).tolist()
    [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    """
    types = token_types.numpy()  # short arrays cost less in numpy than in torch
    positions, start, at = np.empty((3, len(types)), np.int64), 0, 0
    firsts = np.flatnonzero((types[1:] == 1) & (types[:-1] == 0)) + 1
    sides = (grids[:, 1:] // merge_size).tolist()
    for number, (first, frames, (height, width)) in enumerate(
        zip(firsts.tolist(), grids[:, 0].tolist(), sides, strict=True)
    ):
        positions[:, at:first] = np.arange(start, start + first - at)
        start += first - at
        at = first + frames * height * width
        positions[:, first:at] = start
        image = positions[:, first:at].reshape(3, frames, height, width)
        if frames > 1:
            step = np.float32(1 if intervals is None else intervals[number])  # rounded down as the models do it
            image[0] += (np.arange(frames) * step).astype(np.int64)[:, None, None]
        image[1] += np.arange(height)[:, None]
        image[2] += np.arange(width)
        positions[:, first:at] = image.reshape(3, -1)
        start += max(height, width)
    positions[:, at:] = np.arange(start, start + len(types) - at)
    return torch.from_numpy(positions)


def rounded(size: int, *, steps: int = 16) -> int:
    """`size` rounded up to one of `steps` sizes a power of two, a multiple of 64.

    >>> [rounded(size) for size in (1, 100, 2752, 11000)]
    [64, 128, 2816, 11264]
    """
    step = max(64, 2 ** (size.bit_length() - 1) // steps)
    return -(-size // step) * step
