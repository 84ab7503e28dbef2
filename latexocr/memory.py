"""Device memory: how much there is, how much was used, and an error that names the batch that did not fit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from latexocr.errors import InputError

GIB = 2**30


class OutOfMemory(InputError):
    """A batch did not fit; the message names it and what to change."""


@contextmanager
def explain_out_of_memory(batch: dict[str, Any], *, by_budget: bool = False) -> Iterator[None]:
    """Turn torch's out-of-memory error, which speaks of allocators, into one line about the batch.

    Args:
        batch: what the collator made, padded or flattened.
        by_budget: micro-batches are filled up to a number of tokens or patches.

    Raises:
        OutOfMemory: torch ran out of memory inside.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"out of memory with {describe(batch)}{_used()}; {_remedy(len(lengths(batch)), by_budget)}"
        ) from error


def lengths(batch: dict[str, Any]) -> list[int]:
    """Language tokens of every record of a batch, padding not counted."""
    if "text_cu_seqlens" in batch:  # with a filler as its last sequence, perhaps
        return batch["text_cu_seqlens"].cpu().diff().tolist()[: batch["num_samples"]]
    return batch["attention_mask"].cpu().sum(dim=1).tolist()  # on the CPU: the GPU has no memory left for it


def describe(batch: dict[str, Any]) -> str:
    """A batch in numbers.

    >>> describe({"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]), "pixel_values": torch.zeros(8, 1176)})
    '2 samples (6 language tokens with padding, longest record 3, 8 patches)'
    """
    tokens, padding = (sum(lengths(batch)), "") if "text_cu_seqlens" in batch else (
        batch["attention_mask"].numel(), " with padding")  # fmt: skip
    images = "cached features" if "image_features" in batch else f"{len(batch['pixel_values']):,} patches"
    samples = f"{len(lengths(batch))} sample{'s' if len(lengths(batch)) > 1 else ''}"
    return f"{samples} ({tokens:,} language tokens{padding}, longest record {max(lengths(batch)):,}, {images})"


def _used() -> str:
    if not torch.cuda.is_available():
        return ""
    return f", {peak_gib(torch.device('cuda')):.1f} GiB of {total_gib(torch.device('cuda')):.1f} used"


def _remedy(num_samples: int, by_budget: bool) -> str:
    if num_samples > 1 and by_budget:
        return (
            "halve --max_tokens_per_batch and --max_patches_per_batch and double --gradient_accumulation_steps, or "
            "add --gradient_checkpointing true"
        )
    if num_samples > 1:
        return (
            "halve --per_device_train_batch_size and double --gradient_accumulation_steps (the same result), or add "
            "--gradient_checkpointing true; latexocr plan finds what fits"
        )
    return (
        "add --gradient_checkpointing true (the same result), else lower --max_visual_tokens or --max_length; "
        "latexocr plan finds what fits"
    )


def peak_gib(device: torch.device) -> float:
    """Most memory taken so far: on a GPU with what CUDA graphs and fragments hold, on a CPU by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    import resource  # not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def total_gib(device: torch.device) -> float:
    """Memory of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    import psutil  # comes with accelerate

    return psutil.virtual_memory().total / GIB
