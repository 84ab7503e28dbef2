"""The table of embeddings in the host's memory, where the GPU reads the rows that a batch needs by itself.

Why: in 16 bits the table of a 7B model is 1.09 GB of GPU memory, a quarter of what its decoder takes in 4 bits, and a
batch needs few of its rows. A GPU reads pinned memory over the bus at the address that the host knows it by (unified
addressing): there is no copy to wait for, and a CUDA graph replays it like any kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class HostEmbedding(torch.nn.Embedding):
    """A frozen table in pinned memory; made by `keep_on_host`, never constructed.

    The table is a buffer: it goes by its old name, but what asks a model's parameters for their device means the GPU.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> HostEmbedding:
        """`.to`, `.cuda`, `.half` and the like leave the table where and as it is."""
        return self

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) token ids -> (..., width) rows, on the device of `ids`."""
        if not ids.is_cuda:
            return super().forward(ids)
        from latexocr import kernels

        return kernels.take_rows(self.weight, ids)


def keep_on_host(model: Any) -> None:
    """Move the table of `model`, which is frozen from now on, to pinned memory.

    Args:
        model: of transformers, anywhere; its head must not be the same tensor, or it would be kept twice.
    """
    table = model.get_input_embeddings()
    weight = table.weight.data
    host = torch.empty_like(weight, device="cpu", pin_memory=torch.cuda.is_available()).copy_(weight)
    del table.weight
    table.__class__ = HostEmbedding
    table.register_buffer("weight", host)


def host_tables(model: torch.nn.Module) -> list[torch.Tensor]:
    """What `keep_on_host` has taken out of the parameters of `model`."""
    return [part.weight for part in model.modules() if isinstance(part, HostEmbedding)]
