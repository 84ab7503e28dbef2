"""A mixture of experts without waits for the GPU.

Why: transformers selects the tokens of text and those of images by masks, and gives each half to experts of its own:
sizes that only the GPU knows. Every layer of a step waits for them, and the step cannot be captured as a CUDA graph.
Here both kinds of experts are shown all tokens, and those that are not theirs have no expert: they are sorted behind
all others, where the grouped product (`torch.nn.functional.grouped_mm`) does not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import grouped_mm

from latexocr import quantization

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
    top_k = index.shape[1]
    chosen, order = index.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(chosen, torch.arange(num_experts, device=chosen.device), right=True, out_int32=True)
    nobodys = (chosen == num_experts)[:, None]  # rows that the product neither reads nor writes
    pairs = _Spread.apply(rows, order, inverse, top_k).masked_fill(nobodys, 0)
    pairs = _product(activate(_product(pairs, gate_up, ends)), down, ends).masked_fill(nobodys, 0)
    answers = _Taken.apply(pairs, inverse, order).unflatten(0, (-1, top_k))
    return (answers * weights[..., None].to(answers.dtype)).sum(1).to(rows.dtype)


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
    """Each row `top_k` times, in the order of experts."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return rows[order // top_k]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Taken(torch.autograd.Function):
    """Rows in another order: the gradient takes them back, where PyTorch would sort and add."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return rows[places]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        (back,) = ctx.saved_tensors
        return grad[back], None, None
