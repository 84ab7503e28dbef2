"""Features of pictures go to the tokens that stand for them without waits for the GPU.

Why: transformers checks that both are equally many, and selects by masks whose sizes only the GPU knows; a step that
waits cannot be captured as a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from latexocr.modeling import inner_model


@contextlib.contextmanager
def trusted_placeholders(model: Any) -> Iterator[None]:
    """Features go to their tokens without waits for the GPU: transformers would check that both are equally many, and
    select the tokens to which Qwen3-VL's decoder adds features of the tower's middle layers.

    `latexocr.preprocess` writes the tokens from the same grid.
    """
    inner = inner_model(model).model
    videos = "video_features" in inspect.signature(inner.get_placeholder_mask).parameters  # PaddleOCR-VL reads none
    inner.get_placeholder_mask = functools.partial(_placeholder_masks if videos else _image_mask, inner.config)
    if hasattr(inner.language_model, "_deepstack_process"):
        inner.language_model._deepstack_process = _add_features
    resampler = getattr(inner, "resampler_model", None)  # ERNIE's, which merges each two frames of a video
    if resampler is not None:
        resampler._temporal_slicing = _picture_twice
    try:
        yield
    finally:
        del inner.get_placeholder_mask
        vars(inner.language_model).pop("_deepstack_process", None)
        if resampler is not None:
            del resampler._temporal_slicing


def _placeholder_masks(
    config: Any, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, length, 1) twice: where image features and where video features belong."""
    return _mask_of(config.image_token_id, input_ids), _mask_of(config.video_token_id, input_ids)


def _image_mask(config: Any, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
    """(batch, length, 1): where image features belong."""
    return _mask_of(config.image_token_id, input_ids)


def _mask_of(token: int, input_ids: torch.Tensor) -> torch.Tensor:
    return (input_ids == token)[..., None].as_subclass(PlaceholderMask)


def _add_features(hidden: torch.Tensor, mask: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Hidden states (batch, length, width) plus features (tokens, width) at the places of the mask (batch, length)."""
    return hidden + _Placed.apply(torch.zeros_like(hidden), mask[..., None], features.to(hidden.dtype))


def _picture_twice(features: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """(tokens, 2 * width): each picture is its own second frame. `latexocr.preprocess` lets no video through."""
    return torch.cat([features, features], dim=-1)


class PlaceholderMask(torch.Tensor):
    """A mask whose `embeddings.masked_scatter(mask, features)` can be differentiated without waiting for the GPU.

    PyTorch (2.15) selects the gradient of the features by the mask, and asks the GPU how many there are: a step that
    trains the vision tower could not be captured as a CUDA graph.
    """

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.Tensor.masked_scatter:
                return _Placed.apply(*args)
            return function(*args, **(kwargs or {}))


class _Placed(torch.autograd.Function):
    """`torch.Tensor.masked_scatter` for whole rows."""

    @staticmethod
    def forward(ctx: Any, embeddings: torch.Tensor, mask: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Embeddings (batch, length, width) with features (at least as many rows as places, width) in the places of
        the mask (batch, length, 1)."""
        ctx.save_for_backward(mask)
        ctx.num_features = len(features)
        return embeddings.masked_scatter(mask, features)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        (mask,) = ctx.saved_tensors
        numbers = torch.arange(1, ctx.num_features + 1, device=grad.device)
        places = torch.searchsorted(mask.flatten().cumsum(0), numbers)  # beyond the end for features without a place
        rows = torch.nn.functional.pad(grad.flatten(0, 1), (0, 0, 0, 1))
        return grad.masked_fill(mask, 0), None, rows[places]
