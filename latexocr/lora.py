"""LoRA layers whose dropout, adapters and frozen weights are computed together.

    y = x W' + s (m * x) A' B'        m: dropout mask over (1 - p), s: lora_alpha / r   (LoRA, arXiv:2106.09685)

Why: as separate layers the adapter's thin products and its dropout take half as long again as the frozen layer.
Here the frozen weight and B lie side by side, W|B (out, in + r), and so do the input and its projection, x|h
(rows, in + r): one product gives y, and in the backward pass one product gives the gradients of both x and h. Layers
with the same input (query, key and value; gate and up) share x|h: their weights lie below each other and each has its
own columns for B and h. Masks come from a hash of seed and position (`keep_mask`), so they are computed where they are
needed and never stored.

Frozen weights in 4 bits become W|B layer by layer, for the forward and again for the backward pass.

It is a transparent replacement: parameters, checkpoints and merging stay peft's. On a GPU Triton does the work; the
plain PyTorch below is the definition, and what runs elsewhere.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.nn.functional import linear

from latexocr import quantization

ADAPTER = "default"
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
BITS = 16  # of randomness that decide about one element
HALF = 64  # columns that far apart share one hash value: a kernel handles them together
RANKS = (16, 32, 64, 128)  # powers of two; tiles of larger ones do not fit into a GPU's shared memory
GOLDEN, MASK32 = 0x9E3779B1, 0xFFFFFFFF
LOOSE_BYTES = 2**29  # that PyTorch may keep while layers are fused
Blocks = Callable[[], Iterable[torch.Tensor]]


def keep_mask(num_rows: int, num_columns: int, seed: torch.Tensor, threshold: int) -> torch.Tensor:
    """(num_rows, num_columns) of bool: which elements dropout keeps.

    An integer hash with full avalanche (two multiplications, three shifts) of the position and the seed; its halves
    decide about two elements, 64 columns apart.

    Args:
        num_rows: rows of the input.
        num_columns: columns of the input.
        seed: int64; its low 32 bits count.
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


def takes(x: torch.Tensor) -> bool:
    """Whether the kernels run where `x` is."""
    return x.is_cuda


def lora_down(x: torch.Tensor, a: torch.Tensor, seeds: torch.Tensor, threshold: int, factor: float) -> torch.Tensor:
    """x|h (rows, in + adapters * r): the input, and its projections through dropout and A, times `factor`."""
    if takes(x):
        from latexocr import kernels

        return kernels.lora_down(x, a, seeds, threshold, factor)
    pairs = zip(a.chunk(len(seeds)), seeds, strict=True)
    return torch.cat([x, *(_dropped(x, seed, threshold) @ part.T * factor for part, seed in pairs)], dim=1)


def lora_grad_a(
    x_and_down: torch.Tensor, grad_down: torch.Tensor, seeds: torch.Tensor, threshold: int, factor: float
) -> torch.Tensor:
    """Gradient of A (adapters * r, in) in float32, from x|h and the gradient of h (rows, adapters * r)."""
    if takes(x_and_down):
        from latexocr import kernels

        return kernels.lora_grad_a(x_and_down, grad_down, seeds, threshold, factor)
    x = x_and_down[:, : -grad_down.shape[1]]
    pairs = zip(grad_down.chunk(len(seeds), dim=1), seeds, strict=True)
    return torch.cat([part.T @ _dropped(x, seed, threshold) for part, seed in pairs]).float() * factor


def lora_grad_x(
    grad: torch.Tensor, a: torch.Tensor, seeds: torch.Tensor, threshold: int, factor: float
) -> torch.Tensor:
    """Gradient of x (rows, in), from that of x|h (rows, in + adapters * r)."""
    if takes(grad):
        from latexocr import kernels

        return kernels.lora_grad_x(grad, a, seeds, threshold, factor)
    total, parts = grad[:, : a.shape[1]], grad[:, a.shape[1] :].chunk(len(seeds), dim=1)
    for part, weights, seed in zip(parts, a.chunk(len(seeds)), seeds, strict=True):
        total = total + _dropped(part @ weights * factor, seed, threshold)
    return total


class _LoraLinear(torch.autograd.Function):
    """Frozen linear layers with one input, and their adapters."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, blocks: Blocks, biases: list[torch.Tensor | None], down: torch.Tensor,
        seeds: torch.Tensor, threshold: int, factor: float, *adapters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """y (rows, out) of each layer.

        Args:
            ctx: keeps x|h.
            x: (rows, in).
            blocks: gives W|B of each layer, (out, in + adapters * r) in the type of `x`.
            biases: (out,) of each frozen layer.
            down: A (adapters * r, in) in the type of `x`.
            seeds: (adapters,) int64, others for every micro-batch.
            threshold: dropout probability times 2 ** 16.
            factor: scale of the adapter, over the share of kept elements.
            adapters: the parameters A (r, in) of all layers, then B (out, r): they get the gradients, their values
                are those in `down` and W|B.
        """
        x_and_down = lora_down(x, down, seeds, threshold, factor)
        ctx.save_for_backward(x_and_down, down, seeds)
        ctx.outs, ctx.dtype = [len(b) for b in adapters[len(seeds) :]], adapters[0].dtype
        ctx.blocks, ctx.threshold, ctx.factor = blocks, threshold, factor
        return tuple(map(partial(linear, x_and_down), blocks(), biases))

    @staticmethod
    def backward(ctx: Any, *grads_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_and_down, down, seeds = ctx.saved_tensors
        num_columns = down.shape[1]
        grad_b = down.new_empty(sum(ctx.outs), down.shape[0] // len(ctx.outs), dtype=torch.float32)
        grad = None
        projected = x_and_down[:, num_columns:].chunk(len(ctx.outs), dim=1)
        blocks = iter(ctx.blocks())  # not zipped: that would hold one block until the next is made
        for grad_y, h, out in zip(grads_y, projected, grad_b.split(ctx.outs), strict=True):
            grad_y = grad_y.contiguous()
            grad = grad_y @ next(blocks) if grad is None else grad.addmm_(grad_y, next(blocks))
            if grad_y.is_cuda and grad_y.dtype != torch.float32:
                torch.mm(grad_y.T, h, out_dtype=torch.float32, out=out)
            else:
                out.copy_(grad_y.T @ h)
        grad_a = lora_grad_a(x_and_down, grad[:, num_columns:], seeds, ctx.threshold, ctx.factor)
        grad_x = lora_grad_x(grad, down, seeds, ctx.threshold, ctx.factor) if ctx.needs_input_grad[0] else None
        grads_a, grads_b = grad_a.to(ctx.dtype).chunk(len(ctx.outs)), grad_b.to(ctx.dtype).split(ctx.outs)
        return grad_x, None, None, None, None, None, None, *grads_a, *grads_b


class LoraGroup(torch.nn.Module):
    """What LoRA layers with one input compute together. Their weights become views of its own.

    Args:
        layers: in the order in which the model calls them.
    """

    def __init__(self, layers: list[LoraLinear]) -> None:
        super().__init__()
        bases = [layer.base_layer for layer in layers]
        self.rank, self.outs = layers[0].r[ADAPTER], [base.out_features for base in bases]
        self.num_columns, width = bases[0].in_features, len(layers) * self.rank
        self.biases = [base.bias for base in bases]
        like = self._hold(bases, width)
        self.down = like.new_zeros(width, self.num_columns)
        self.a = [layer.lora_A[ADAPTER].weight for layer in layers]
        self.b = [layer.lora_B[ADAPTER].weight for layer in layers]
        dropout = getattr(layers[0].lora_dropout[ADAPTER], "p", 0.0)  # Identity without dropout
        self.threshold, self.factor = round(dropout * 2**BITS), layers[0].scaling[ADAPTER] / (1 - dropout)
        self.seeds = torch.zeros(len(layers), dtype=torch.long, device=like.device)
        self.outputs: list[torch.Tensor] = []

    def _hold(self, bases: list[torch.nn.Linear], width: int) -> torch.Tensor:
        """Make W|B of the frozen layers; returns a tensor of the type and on the device that they compute in."""
        like = bases[0].weight
        self.weight = like.new_zeros(sum(self.outs), self.num_columns + width)
        for base, rows in zip(bases, self.weight[:, : self.num_columns].split(self.outs), strict=True):
            rows.copy_(base.weight.data)
            base.weight.data = rows
        return like

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """One output a layer, from their input (..., in)."""
        x = x.to(self.down.dtype)  # autocast computes layer norms in float32
        outputs = _LoraLinear.apply(
            x.flatten(0, -2), self.blocks, self.biases, self.down, self.seeds,
            self.threshold, self.factor, *self.a, *self.b,
        )  # fmt: skip
        return [y.unflatten(0, x.shape[:-1]) for y in outputs]

    def blocks(self) -> Iterable[torch.Tensor]:
        """W|B (out, in + adapters * r) of each layer."""
        return self.weight.split(self.outs)

    def places(self) -> list[torch.Tensor]:
        """Where the values of A and then of B belong."""
        columns = self.weight[:, self.num_columns :].split(self.rank, dim=1)
        blocks = [part.split(self.outs)[number] for number, part in enumerate(columns)]
        return [*self.down.split(self.rank), *blocks]


class QuantizedLoraGroup(LoraGroup):
    """`LoraGroup` over layers in 4 bits, which keep their weights: W|B is made when it is needed, and let go of."""

    def _hold(self, bases: list[torch.nn.Linear], width: int) -> torch.Tensor:
        self.bases = tuple(bases)  # in a tuple: they are no part of this module
        like = bases[0].weight.new_empty(0, dtype=bases[0].compute_dtype)
        self.up = like.new_zeros(sum(self.outs), self.rank)
        return like

    def blocks(self) -> Iterator[torch.Tensor]:
        for place, (base, b) in enumerate(zip(self.bases, self.up.split(self.outs), strict=True)):
            behind = (len(self.bases) - 1 - place) * self.rank
            yield quantization.whole_beside(base, b, before=place * self.rank, behind=behind)

    def places(self) -> list[torch.Tensor]:
        return [*self.down.split(self.rank), *self.up.split(self.outs)]


class FusedLora:
    """peft's LoRA layers with another forward pass in training. Made by `FusedLoras`, never constructed."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.training:
            return super().forward(x, *args, **kwargs)
        (group,) = self.group  # in a tuple: it is no part of this module
        if self.place == 0:
            group.outputs = group(x)
        y = group.outputs[self.place]
        if self.place == len(group.outs) - 1:
            group.outputs = []
        return y


@cache
def _fused_class(kind: type) -> type:
    """`kind`, a LoRA layer of peft, as a `FusedLora`."""
    return type(f"Fused{kind.__name__}", (FusedLora, kind), {"__module__": __name__})


def _groups_of() -> dict[type, type[LoraGroup]]:
    """Which LoRA layers can be fused, and what computes them."""
    if quantization.PACKAGE not in sys.modules:  # nothing has been rounded
        return {LoraLinear: LoraGroup}
    from peft.tuners.lora.bnb import Linear4bit

    return {LoraLinear: LoraGroup, Linear4bit: QuantizedLoraGroup}


def _group(layers: list[LoraLinear]) -> LoraGroup:
    group = _groups_of()[type(layers[0])](layers)
    if torch.cuda.is_available() and torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > LOOSE_BYTES:
        torch.cuda.empty_cache()  # what W|B was made of is a little too small for the next one
    return group


class FusedLoras:
    """All LoRA layers of a model, turned into `FusedLora`.

    Args:
        model: with adapters on linear layers (`latexocr.adapters.add_lora`), on the device it trains on.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        fused = [module.group[0] for module in model.modules() if isinstance(module, FusedLora) and module.place == 0]
        new = _layers_by_input(model)
        self._groups = [*fused, *map(_group, new)]
        sizes = [len(group.seeds) for group in self._groups]
        self._seeds = torch.zeros(sum(sizes), dtype=torch.long, device=next(model.parameters()).device)
        for group, seeds in zip(self._groups, self._seeds.split(sizes), strict=True):
            group.seeds = seeds
        for layers, group in zip(new, self._groups[len(fused) :], strict=True):
            for place, layer in enumerate(layers):
                layer.group, layer.place, layer.__class__ = (group,), place, _fused_class(type(layer))
        self._copies: Any = None
        self._places = list(itertools.chain.from_iterable(group.places() for group in self._groups))
        self._values = list(itertools.chain.from_iterable([*group.a, *group.b] for group in self._groups))

    @torch.no_grad()
    def prepare(self) -> None:
        """Bring A and B as the optimiser left them to where the layers read them. Before every micro-batch."""
        if not self._values:  # adapters on stacked experts alone
            return
        if not takes(self._values[0]) or self._values[0].dtype != torch.float32:
            torch._foreach_copy_(self._places, self._values)
            return
        if self._copies is None or self._copies.addresses != [value.data_ptr() for value in self._values]:
            from latexocr import kernels

            self._copies = kernels.Copies(self._places, self._values)
        self._copies()

    def reseed(self, seed: int) -> None:
        """Other dropout masks: before every micro-batch, from a number that no other micro-batch of the run has."""
        seeds = torch.randint(2**32, self._seeds.shape, generator=torch.Generator().manual_seed(seed))
        if self._seeds.is_cuda:
            seeds = seeds.pin_memory()
        self._seeds.copy_(seeds, non_blocking=True)


def kernels_available() -> bool:
    """Whether there is a GPU that Triton writes kernels for."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def runs_kernels(rank: int) -> bool:
    """Whether the GPU kernels are to be had for adapters of this rank: their tiles are made for some."""
    return kernels_available() and rank in RANKS


def _layers_by_input(model: torch.nn.Module) -> list[list[LoraLinear]]:
    """The LoRA layers, those with the same input together."""
    found: list[list[LoraLinear]] = []
    kinds = _groups_of()
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if type(child) in kinds}
        for names in SAME_INPUT:
            if all(name in children for name in names):
                found.append([children.pop(name) for name in names])
        found += [[child] for child in children.values()]
    return found
