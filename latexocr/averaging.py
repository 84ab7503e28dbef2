"""A moving average of the trained weights, which is validated and kept in their place.

Why: late in training the weights wander around a minimum that they do not reach; their average lies nearer to it, as
if the learning rate had been lowered already (Polyak averaging, https://doi.org/10.1137/0330046).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from latexocr.checkpoint import AVERAGE_WEIGHTS


class WeightAverage:
    """average <- d * average + (1 - d) * weights after every step, d = min(decay, (1 + step) / (10 + step)).

    The rising d, TensorFlow's, lets early steps forget the weights that training began with.

    Args:
        model: its trained parameters are averaged, in their own type on their device; they keep their addresses, which
            CUDA graphs know.
        decay: share of the average that stays after a step.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.decay, self._names, self._parameters = decay, list(named), list(named.values())
        self._averages = [weight.clone() for weight in self._weights]
        self._held: list[torch.Tensor] | None = None  # the weights, while the average is in their place

    @property
    def _weights(self) -> list[torch.Tensor]:
        return [parameter.data for parameter in self._parameters]

    def update(self, step: int) -> None:
        """Take in the weights after step `step`, from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)

    def apply(self) -> None:
        """Put the average in place of the weights, until `restore`."""
        self._held = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._averages)

    def restore(self) -> None:
        """Put the weights back, if the average is in their place."""
        if self._held is not None:
            torch._foreach_copy_(self._weights, self._held)
            self._held = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in place of the weights, until the end of the block."""
        self.apply()
        try:
            yield
        finally:
            self.restore()

    def save(self, folder: Path) -> None:
        """Write it beside a checkpoint's weights."""
        averages: dict[str, Any] = dict(zip(self._names, self._averages, strict=True))
        save_file(averages, folder / AVERAGE_WEIGHTS)

    def load(self, folder: Path | None) -> None:
        """As in a checkpoint; it begins with the weights as they are where there is none."""
        path = folder and folder / AVERAGE_WEIGHTS
        if path and path.is_file():
            saved = load_file(path, device=str(self._weights[0].device))
            torch._foreach_copy_(self._averages, [saved[name] for name in self._names])
        else:
            torch._foreach_copy_(self._averages, self._weights)
