"""Whole micro-batches, forward and backward, replayed as CUDA graphs.

Why: a step launches thousands of kernels. With 16 formulas the GPU finishes them faster than Python can launch them;
a graph is launched at once. The collator rounds batch shapes up (`latexocr.collate`), so that few graphs serve a run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)
ROOM = 0.9  # share of the memory that training may take, graphs included
MAX_GRAPHS = 64  # each holds some ten megabytes of launch parameters

Compute = Callable[[dict[str, Any], torch.Tensor], torch.Tensor]


class GradientBuffer:
    """All gradients in one tensor at a fixed address: for graphs, for one all-reduce and one zeroing.

    Args:
        parameters: the trained ones, all of one type.
        wholes: what the optimiser steps in their place, with the same elements in the same order.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], wholes: Sequence[torch.nn.Parameter] = ()) -> None:
        self.parameters = parameters
        self.flat = torch.zeros(
            sum(map(torch.numel, parameters)), dtype=parameters[0].dtype, device=parameters[0].device
        )
        self._owned = [*self._views(parameters), *(self._views(wholes) if wholes else ())]

    def _views(self, parameters: Sequence[torch.nn.Parameter]) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        parts = self.flat.split([parameter.numel() for parameter in parameters])
        return [(parameter, part.view_as(parameter)) for parameter, part in zip(parameters, parts, strict=True)]

    def attach(self) -> None:
        """Gradients point into the buffer again, zeroed, if the optimiser's `zero_grad` has let go of them."""
        if self.parameters[0].grad is None:
            self.flat.zero_()
            for parameter, view in self._owned:
                parameter.grad = view

    def clip(self, max_norm: float) -> torch.Tensor:
        """`torch.nn.utils.clip_grad_norm_` of all of them, in a few kernels instead of a few for each."""
        norm = torch.linalg.vector_norm(self.flat)
        self.flat.mul_((max_norm / (norm + 1e-6)).clamp(max=1))
        return norm


class StepGraphs:
    """Runs `compute` and its backward pass: the first micro-batch as it is, all others as graphs, one a shape.

    A shape that cannot be captured when it first comes (a kernel may not be loaded meanwhile) runs as it is once.

    Args:
        compute: (inputs, number of supervised tokens) -> loss; no synchronisation with the host, no random state.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._seen: set[tuple] = set()
        self._graphs: dict[tuple, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # All on one stream: nodes that accumulate gradients remember the stream they were made on, and checkpointing
        # can keep them from one micro-batch to the next; a capture must not meet those of another stream.
        self._stream = torch.cuda.Stream()
        self._works = True

    def __call__(self, inputs: dict[str, Any], num_items: torch.Tensor) -> torch.Tensor:
        """The loss, detached; gradients have been added to the parameters' own."""
        key = tuple(
            (name, tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else (name, value)
            for name, value in inputs.items()
        )
        if key not in self._graphs and self._works and self._seen and len(self._graphs) < MAX_GRAPHS:
            self._capture(key, inputs, num_items)
        self._seen.add(key)
        if key in self._graphs:
            return self._graphs[key].replay(inputs, num_items)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._compute(inputs, num_items)
            loss.backward()
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss.detach()

    def _capture(self, key: tuple, inputs: dict[str, Any], num_items: torch.Tensor) -> None:
        base, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if 2 * peak - base > ROOM * total:  # the graphs' memory is kept apart from that of other steps
            self._works = False
            logger.warning("no more steps are captured as CUDA graphs: memory is short")
            return
        try:
            self._graphs[key] = _Graph(self._compute, inputs, num_items, self._pool, self._stream)
        except RuntimeError as error:
            torch.cuda.synchronize()
            reason = str(error).split("\n")[0]
            if key not in self._seen:
                logger.debug(f"not captured at once: {reason}")
                return
            self._works = False
            logger.warning(f"steps are not captured as CUDA graphs ({reason}); small batches train slower")


class _Graph:
    """One captured shape."""

    def __init__(
        self, compute: Compute, inputs: dict[str, Any], num_items: torch.Tensor, pool: Any, stream: torch.cuda.Stream
    ) -> None:
        self._inputs = {
            name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
        }
        self._num_items = num_items.clone()
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's pinning thread goes on meanwhile
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            loss = compute(self._inputs, self._num_items)
            loss.backward()
            self._loss = loss.detach()

    def replay(self, inputs: dict[str, Any], num_items: torch.Tensor) -> torch.Tensor:
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                self._inputs[name].copy_(value, non_blocking=True)
        self._num_items.copy_(num_items)
        self._graph.replay()
        return self._loss.clone()
