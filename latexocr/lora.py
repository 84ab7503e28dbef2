"""LoRA layers whose dropout, adapter and frozen layer are computed together.

    y = x W' + s (m * x) A' B'        m: dropout mask over (1 - p), s: lora_alpha / r   (LoRA, arXiv:2106.09685)

Why: as separate layers the adapter's thin products and its dropout take half as long again as the frozen layer.
Here the frozen weight and B lie side by side, W|B (out, in + r), and so do the input and its projection, x|h
(rows, in + r): one product gives y, and in the backward pass one product gives the gradients of both x and h. Masks
come from a hash of seed and position (`keep_mask`), so they are computed where they are needed and never stored.

It is a transparent replacement: parameters, checkpoints and merging stay peft's. On a GPU Triton does the work; the
plain PyTorch below is the definition, and what runs elsewhere.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear

ADAPTER = "default"
BITS = 16  # of randomness that decide about one element
HALF = 64  # columns that far apart share one hash value: a kernel handles them together
GOLDEN, MASK32 = 0x9E3779B1, 0xFFFFFFFF


def keep_mask(num_rows: int, num_columns: int, seed: torch.Tensor, threshold: int) -> torch.Tensor:
    """(num_rows, num_columns) of bool: which elements dropout keeps.

    An integer hash with full avalanche (two multiplications, three shifts) of the position and the seed; its halves
    decide about two elements, 64 columns apart.

    Args:
        num_rows: rows of the input.
        num_columns: columns of the input.
        seed: (1,) int64; its low 32 bits count.
        threshold: elements whose 16 random bits are below it are dropped.
    """
    tiles = -(-num_columns // (2 * HALF))
    positions = torch.arange(num_rows * tiles * HALF, device=seed.device)
    bits = ((positions * GOLDEN) & MASK32) ^ (seed & MASK32)
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x7FEB352D) & MASK32
    bits = bits ^ (bits >> 15)
    bits = (bits * 0x846CA68B) & MASK32
    bits = (bits ^ (bits >> 16)).view(num_rows, tiles, HALF)
    halves = torch.stack([bits & 0xFFFF, bits >> BITS], dim=2)  # (rows, tiles, 2, 64)
    return halves.flatten(1)[:, :num_columns] >= threshold


def _dropped(x: torch.Tensor, seed: torch.Tensor, threshold: int) -> torch.Tensor:
    return x * keep_mask(*x.shape, seed, threshold) if threshold else x


def lora_down(x: torch.Tensor, a: torch.Tensor, seed: torch.Tensor, threshold: int, factor: float) -> torch.Tensor:
    """x|h (rows, in + r): the input and its projection through dropout and A, times `factor`."""
    if x.is_cuda:
        from latexocr import kernels

        return kernels.lora_down(x, a, seed, threshold, factor)
    down = _dropped(x, seed, threshold) @ a.to(x.dtype).T * factor
    return torch.cat([x, down], dim=1)


def lora_grad_a(
    x_and_down: torch.Tensor, grad_down: torch.Tensor, seed: torch.Tensor, threshold: int, factor: float
) -> torch.Tensor:
    """Gradient of A (r, in) in float32, from x|h and the gradient of h (rows, r)."""
    if x_and_down.is_cuda:
        from latexocr import kernels

        return kernels.lora_grad_a(x_and_down, grad_down, seed, threshold, factor)
    x = x_and_down[:, : -grad_down.shape[1]]
    return (grad_down.T @ _dropped(x, seed, threshold)).float() * factor


def lora_grad_x(
    grad: torch.Tensor, a: torch.Tensor, seed: torch.Tensor, threshold: int, factor: float
) -> torch.Tensor:
    """Gradient of x (rows, in), from that of x|h (rows, in + r)."""
    if grad.is_cuda:
        from latexocr import kernels

        return kernels.lora_grad_x(grad, a, seed, threshold, factor)
    num_columns = grad.shape[1] - a.shape[0]
    through = grad[:, num_columns:] @ a.to(grad.dtype) * factor
    return grad[:, :num_columns] + _dropped(through, seed, threshold)


@torch.library.custom_op("latexocr::lora_linear", mutates_args=())
def lora_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, a: torch.Tensor,
    b: torch.Tensor, seed: torch.Tensor, threshold: int, factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """A frozen linear layer and its adapter.

    Args:
        x: (rows, in).
        weight: W|B (out, in + r) in the type of `x`.
        bias: (out,) of the frozen layer.
        down: A (r, in) in the type of `x`.
        a: (r, in), the adapter's A: it gets the gradient, its values are those in `down`.
        b: (out, r), the adapter's B: it gets the gradient, its values are those in `weight`.
        seed: (1,) int64, one a layer and micro-batch.
        threshold: dropout probability times 2 ** 16.
        factor: scale of the adapter, over the share of kept elements.

    Returns:
        y (rows, out), and x|h (rows, in + r), which the backward pass needs.
    """
    x_and_down = lora_down(x, down, seed, threshold, factor)
    if bias is None:
        return x_and_down @ weight.T, x_and_down
    return torch.addmm(bias, x_and_down, weight.T), x_and_down


@lora_linear.register_fake
def _(x, weight, bias, down, a, b, seed, threshold, factor):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("latexocr::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    grad_y: torch.Tensor, x_and_down: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, seed: torch.Tensor,
    threshold: int, factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x (rows, in), A (r, in) and B (out, r); those of A and B in float32."""
    num_columns = down.shape[1]
    grad_y = grad_y.contiguous()
    grad = grad_y @ weight
    projected, grad_projected = x_and_down[:, num_columns:], grad[:, num_columns:]
    if grad_y.is_cuda and grad_y.dtype != torch.float32:
        grad_b = torch.mm(grad_y.T, projected, out_dtype=torch.float32)
    else:
        grad_b = (grad_y.T @ projected).float()
    grad_a = lora_grad_a(x_and_down, grad_projected, seed, threshold, factor)
    return lora_grad_x(grad, down, seed, threshold, factor), grad_a, grad_b


@lora_linear_backward.register_fake
def _(grad_y, x_and_down, weight, a, seed, threshold, factor):
    rank, num_columns = a.shape
    return (
        grad_y.new_empty(grad_y.shape[0], num_columns),
        a.new_empty(rank, num_columns, dtype=torch.float32),
        a.new_empty(weight.shape[0], rank, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, weight, _, down, a, b, seed, ctx.threshold, ctx.factor = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], weight, down, seed)
    ctx.types = a.dtype, b.dtype


def _backward(ctx: Any, grad_y: torch.Tensor, _: torch.Tensor) -> tuple:
    x_and_down, weight, down, seed = ctx.saved_tensors
    grad_x, grad_a, grad_b = torch.ops.latexocr.lora_linear_backward(
        grad_y, x_and_down, weight, down, seed, ctx.threshold, ctx.factor
    )
    return grad_x, None, None, None, grad_a.to(ctx.types[0]), grad_b.to(ctx.types[1]), None, None, None


lora_linear.register_autograd(_backward, setup_context=_save)


class FusedLora(LoraLinear):
    """peft's LoRA layer with another forward pass in training. Made by `FusedLoras`, never constructed."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.training:
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        y, _ = torch.ops.latexocr.lora_linear(
            x.flatten(0, -2), self.joined_weight, self.base_layer.bias, self.down_weight, a, b, self.dropout_seed,
            self.dropout_threshold, self.adapter_factor,
        )  # fmt: skip
        return y.unflatten(0, x.shape[:-1])


class FusedLoras:
    """All LoRA layers of a model, turned into `FusedLora`.

    Args:
        model: with adapters on linear layers (`latexocr.modeling.add_lora`), on the device it trains on.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = [module for module in model.modules() if type(module) is LoraLinear]
        device = next(model.parameters()).device
        self._seeds = torch.zeros(len(self._layers), 1, dtype=torch.long, device=device)
        for layer, seed in zip(self._layers, self._seeds, strict=True):
            _join(layer, seed)
        self._a = [layer.lora_A[ADAPTER].weight for layer in self._layers]
        self._b = [layer.lora_B[ADAPTER].weight for layer in self._layers]
        self._down = [layer.down_weight for layer in self._layers]
        self._up = [layer.joined_weight[:, layer.base_layer.in_features :] for layer in self._layers]

    @torch.no_grad()
    def prepare(self) -> None:
        """Bring A and B as the optimiser left them to where the layers read them. Before every micro-batch."""
        torch._foreach_copy_(self._down, self._a)
        torch._foreach_copy_(self._up, self._b)

    def reseed(self, seed: int) -> None:
        """Other dropout masks: before every micro-batch, from a number that no other micro-batch of the run has."""
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**32, (len(self._layers), 1), generator=generator)
        if self._seeds.is_cuda:
            seeds = seeds.pin_memory()
        self._seeds.copy_(seeds, non_blocking=True)


def runs_kernels(rank: int) -> bool:
    """Whether the GPU kernels are to be had: Triton is there, and the rank is a power of two from 16 on."""
    return importlib.util.find_spec("triton") is not None and rank >= 16 and rank & (rank - 1) == 0


def _join(layer: LoraLinear, seed: torch.Tensor) -> None:
    """Let the frozen weight be a view of W|B, and give the layer what `FusedLora.forward` reads."""
    base, rank = layer.base_layer, layer.r[ADAPTER]
    joined = base.weight.new_zeros(base.out_features, base.in_features + rank)
    joined[:, : base.in_features] = base.weight.data
    base.weight.data = joined[:, : base.in_features]
    dropout = getattr(layer.lora_dropout[ADAPTER], "p", 0.0)  # Identity without dropout
    layer.joined_weight, layer.dropout_seed = joined, seed
    layer.down_weight = joined.new_empty(rank, base.in_features)
    layer.dropout_threshold = round(dropout * 2**BITS)
    layer.adapter_factor = layer.scaling[ADAPTER] / (1 - dropout)
    layer.__class__ = FusedLora
