"""A mixture of experts without waits for the GPU.

Why: transformers selects the tokens of text and those of images by masks, and gives each half to experts of its own:
sizes that only the GPU knows. Every layer of a step waits for them, and the step cannot be captured as a CUDA graph.
Here both kinds of experts are shown all tokens, and those that are not theirs have no expert: they are sorted behind
all others, where the grouped product (`torch.nn.functional.grouped_mm`) does not read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import grouped_mm

from latexocr import lora, quantization

Activate = Callable[[torch.Tensor], torch.Tensor]


def apply_experts(
    rows: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.nn.Parameter,
    down: torch.nn.Parameter,
    activate: Activate,
    num_experts: int,
) -> torch.Tensor:
    """sum_k weights_k * down_e(activate(gate_up_e(row))), e = index_k: (tokens, width), one for each row.

    Args:
        rows: (tokens, width).
        index: (tokens, k) experts of each row; as many as there are experts stands for none.
        weights: (tokens, k) what each expert's answer counts.
        gate_up: (experts, 2 * inner, width); in 4 bits each is made whole when it is needed, and let go of.
        down: (experts, width, inner), likewise.
        activate: (pairs, 2 * inner) -> (pairs, inner).
        num_experts: whose weights these are.
    """
    index = index.contiguous()
    chosen, order = index.flatten().sort(stable=True)
    count = partial(torch.arange, device=order.device)
    places = torch.empty_like(order).scatter_(0, order, count(len(order))).view_as(index)
    ends = torch.searchsorted(chosen, count(num_experts), right=True, out_int32=True)
    theirs = index < num_experts
    # one result at a time goes on: of 16 formulas a hundred megabytes each
    pairs = _Spread.apply(rows, order, places, theirs)
    pairs = _product(activate(_product(pairs, gate_up, ends)), down, ends)
    return _WeightedSum.apply(pairs, places, weights.to(pairs.dtype), theirs).to(rows.dtype)


def weighted_sum(rows: torch.Tensor, places: torch.Tensor, shares: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """(tokens, width): the sum of each token's rows, each times its share; rows that are nobody's may hold anything.

    Args:
        rows: (pairs, width).
        places: (tokens, k) numbers of rows.
        shares: (tokens, k).
        theirs: (tokens, k) of bool: which count.
    """
    if lora.takes(rows):
        from latexocr import kernels

        return kernels.weighted_sum(rows.contiguous(), places, shares.contiguous(), theirs)
    return (rows[places].masked_fill(~theirs[..., None], 0) * shares[..., None]).sum(1)


def weighted_sum_backward(
    grad: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, shares: torch.Tensor, theirs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of rows (those that are somebody's) and shares of `weighted_sum`."""
    if lora.takes(rows):
        from latexocr import kernels

        return kernels.weighted_sum_backward(grad.contiguous(), rows.contiguous(), places, shares.contiguous(), theirs)
    grad_rows = torch.empty_like(rows)
    grad_rows[places] = grad[:, None] * shares[..., None]
    return grad_rows, (rows[places].masked_fill(~theirs[..., None], 0) * grad[:, None]).sum(2)


def _product(rows: torch.Tensor, weights: torch.nn.Parameter, ends: torch.Tensor) -> torch.Tensor:
    """(pairs, out): the rows (pairs, in) up to each of `ends` (experts,) by that expert's weights (out, in)."""
    if quantization.is_rounded(weights):
        return _RoundedProduct.apply(rows, weights, ends)
    return grouped_mm(rows.to(weights.dtype), weights.transpose(1, 2), offs=ends)


class _RoundedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.nn.Parameter, ends: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ends)
        ctx.weights = weights
        whole = quantization.whole(weights)
        return grouped_mm(rows.to(whole.dtype), whole.transpose(1, 2), offs=ends).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        (ends,) = ctx.saved_tensors
        whole = quantization.whole(ctx.weights)
        return grouped_mm(grad.to(whole.dtype).contiguous(), whole, offs=ends).to(grad.dtype), None, None


class _Spread(torch.autograd.Function):
    """Each row once for each of its experts, in the order of experts."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, order: torch.Tensor, places: torch.Tensor, theirs: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(places, theirs)
        return rows[order // places.shape[1]]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        places, theirs = ctx.saved_tensors
        return weighted_sum(grad, places, theirs.to(grad.dtype), theirs), None, None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, places: torch.Tensor, shares: torch.Tensor, theirs: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, places, shares, theirs)
        return weighted_sum(rows, places, shares, theirs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        rows, places, shares, theirs = ctx.saved_tensors
        grad_rows, grad_shares = weighted_sum_backward(grad, rows, places, shares, theirs)
        return grad_rows, None, grad_shares, None
