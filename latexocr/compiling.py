"""Decoder layers and vision blocks compiled one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

LAYER_PATH = re.compile(r".*\.(?:language_model\.layers|visual\.blocks)\.\d+")


class CompiledLayers:
    """Decoder layers and vision blocks compiled one by one, on during training steps only.

    Why one by one: the layers are alike, so one compilation serves all of them, and it does not depend on how many
    there are. Why only then: generation grows its cache by a token at a time and would be compiled again and again.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        # Many layers share one compiled code object; the default limit of 8 variants would switch it off.
        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
        # Where nothing can be compiled (no C compiler, say) the layers run as they are, after a warning.
        torch._dynamo.config.suppress_errors = True
        # The first layer's input has no gradient, the first block's is a view: each would make a variant of its own.
        model.get_input_embeddings().register_forward_hook(_require_gradient)
        for name, module in model.named_modules():
            if name.endswith(".visual.patch_embed"):
                module.register_forward_hook(_copy)
        self._layers = [m for name, m in model.named_modules() if LAYER_PATH.fullmatch(name)]
        for layer in self._layers:
            layer.compile(dynamic=True)
        self._calls = [layer._compiled_call_impl for layer in self._layers]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run uncompiled inside."""
        for layer in self._layers:
            layer._compiled_call_impl = None
        try:
            yield
        finally:
            for layer, call in zip(self._layers, self._calls, strict=True):
                layer._compiled_call_impl = call


def _require_gradient(module: torch.nn.Module, arguments: tuple, output: torch.Tensor) -> None:
    if module.training:
        output.requires_grad_()


def _copy(module: torch.nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.clone() if module.training else output
