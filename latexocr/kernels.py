"""Triton kernels of the training step: LoRA with its dropout, and cross-entropy over a large vocabulary.

Why our own: dropout before an adapter makes a copy of every layer's input, and the adapter's thin products read and
write it again; together that costs half as much time as the frozen layer itself. Here a mask is a function of seed and
position, so it is never stored, and each tensor is read once. Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HALF = 64  # columns a half tile; elements this far apart share 32 random bits, see `latexocr.lora.keep_mask`
PROGRAMS = 528  # that fill a GPU four times; with these heights and stages the fastest of 18 on an H200


@triton.jit
def _random16(rows, columns, seed):
    """Two times 16 random bits an element of a half tile: an integer hash with full avalanche."""
    bits = ((rows + columns).to(tl.uint32) * 0x9E3779B1) ^ seed.to(tl.uint32)
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    bits ^= bits >> 16
    return bits & 0xFFFF, bits >> 16


@triton.jit
def _keep(tile, bits, threshold):
    return tl.where(bits >= threshold, tile, 0.0).to(tile.dtype)


@triton.jit
def _down_kernel(
    x, x_stride, a, seeds, out, sums, num_rows, num_columns, columns_a_part, threshold, ADAPTERS: tl.constexpr,
    RANK: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BM
    part, adapter = tl.program_id(1), tl.program_id(2)
    rows, ranks, lane = tl.arange(0, BM)[:, None], tl.arange(0, RANK), tl.arange(0, HALF)[None, :]
    inside = first + rows < num_rows
    out_stride = num_columns + ADAPTERS * RANK
    x += first.to(tl.int64) * x_stride
    out += first.to(tl.int64) * out_stride
    hash_rows = (first + rows) * (tl.cdiv(num_columns, 2 * HALF) * HALF)
    key = tl.load(seeds + adapter)
    total = tl.zeros((BM, RANK), dtype=tl.float32)
    end = tl.minimum(num_columns, (part + 1) * columns_a_part)
    for start in range(part * columns_a_part, end, 2 * HALF):
        left, right = start + lane, start + HALF + lane
        in_left, in_right = inside & (left < num_columns), inside & (right < num_columns)
        tile_left = tl.load(x + rows * x_stride + left, mask=in_left, other=0.0)
        tile_right = tl.load(x + rows * x_stride + right, mask=in_right, other=0.0)
        along = start + tl.arange(0, HALF)[:, None]
        weights = a + (adapter * RANK + ranks[None, :]) * num_columns + along
        a_left = tl.load(weights, mask=along < num_columns, other=0.0)
        a_right = tl.load(weights + HALF, mask=along + HALF < num_columns, other=0.0)
        if adapter == 0:
            tl.store(out + rows * out_stride + left, tile_left, mask=in_left)
            tl.store(out + rows * out_stride + right, tile_right, mask=in_right)
        if DROPOUT:
            bits_left, bits_right = _random16(hash_rows, start // 2 + lane, key)
            tile_left, tile_right = _keep(tile_left, bits_left, threshold), _keep(tile_right, bits_right, threshold)
        total = tl.dot(tile_left, a_left, total)
        total = tl.dot(tile_right, a_right, total)
    target = ((part * num_rows + first + rows) * ADAPTERS + adapter) * RANK + ranks[None, :]
    tl.store(sums + target, total, mask=inside)


@triton.jit
def _sum_kernel(sums, out, num_rows, num_columns, num_parts, factor, WIDTH: tl.constexpr, BM: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    lane = tl.arange(0, 64)[None, :]
    for start in tl.static_range(0, WIDTH, 64):
        valid = (rows < num_rows) & (start + lane < WIDTH)
        total = tl.zeros((BM, 64), dtype=tl.float32)
        for part in range(num_parts):
            total += tl.load(sums + (part * num_rows + rows) * WIDTH + start + lane, mask=valid, other=0.0)
        target = out + rows.to(tl.int64) * (num_columns + WIDTH) + num_columns + start + lane
        tl.store(target, (total * factor).to(out.dtype.element_ty), mask=valid)


@triton.jit
def _grad_a_kernel(
    x, grad_down, seeds, out, num_rows, num_columns, rows_a_part, threshold, factor, ADAPTERS: tl.constexpr,
    RANK: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * 2 * HALF
    part, adapter = tl.program_id(1), tl.program_id(2)
    ranks, lane = tl.arange(0, RANK)[:, None], tl.arange(0, HALF)[None, :]
    left, right = start + lane, start + HALF + lane
    stride = num_columns + ADAPTERS * RANK
    hash_stride = tl.cdiv(num_columns, 2 * HALF) * HALF
    key = tl.load(seeds + adapter)
    sum_left = tl.zeros((RANK, HALF), dtype=tl.float32)
    sum_right = tl.zeros((RANK, HALF), dtype=tl.float32)
    end = tl.minimum(num_rows, (part + 1) * rows_a_part)
    x += (part * rows_a_part).to(tl.int64) * stride
    grad_down += (part * rows_a_part).to(tl.int64) * stride + adapter * RANK
    rows = tl.arange(0, BM)
    offsets = rows[:, None] * stride
    for first in range(part * rows_a_part, end, BM):
        inside = first + rows < end
        tile_left = tl.load(x + offsets + left, mask=inside[:, None] & (left < num_columns), other=0.0)
        tile_right = tl.load(x + offsets + right, mask=inside[:, None] & (right < num_columns), other=0.0)
        grads = tl.load(grad_down + rows[None, :] * stride + ranks, mask=inside[None, :], other=0.0)
        x += BM * stride
        grad_down += BM * stride
        if DROPOUT:
            bits_left, bits_right = _random16((first + rows[:, None]) * hash_stride, start // 2 + lane, key)
            tile_left, tile_right = _keep(tile_left, bits_left, threshold), _keep(tile_right, bits_right, threshold)
        sum_left = tl.dot(grads, tile_left, sum_left)
        sum_right = tl.dot(grads, tile_right, sum_right)
    target = out + ((part * ADAPTERS + adapter) * RANK + ranks) * num_columns
    tl.store(target + left, sum_left * factor, mask=left < num_columns)
    tl.store(target + right, sum_right * factor, mask=right < num_columns)


@triton.jit
def _grad_x_kernel(
    grad, a, seeds, out, num_rows, num_columns, threshold, factor, ADAPTERS: tl.constexpr,
    RANK: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    first, start = tl.program_id(0) * BM, tl.program_id(1) * 2 * HALF
    rows, ranks, lane = tl.arange(0, BM)[:, None], tl.arange(0, RANK), tl.arange(0, HALF)[None, :]
    left, right = start + lane, start + HALF + lane
    inside = first + rows < num_rows
    in_left, in_right = inside & (left < num_columns), inside & (right < num_columns)
    stride = num_columns + ADAPTERS * RANK
    grad += first.to(tl.int64) * stride
    out += first.to(tl.int64) * num_columns
    hash_rows = (first + rows) * (tl.cdiv(num_columns, 2 * HALF) * HALF)
    total_left = tl.load(grad + rows * stride + left, mask=in_left, other=0.0).to(tl.float32)
    total_right = tl.load(grad + rows * stride + right, mask=in_right, other=0.0).to(tl.float32)
    for adapter in tl.static_range(ADAPTERS):
        grads = tl.load(grad + rows * stride + num_columns + adapter * RANK + ranks[None, :], mask=inside, other=0.0)
        weights = a + (adapter * RANK + ranks[:, None]) * num_columns
        through_left = tl.dot(grads, tl.load(weights + left, mask=left < num_columns, other=0.0))
        through_right = tl.dot(grads, tl.load(weights + right, mask=right < num_columns, other=0.0))
        if DROPOUT:
            bits_left, bits_right = _random16(hash_rows, start // 2 + lane, tl.load(seeds + adapter))
            through_left = _keep(through_left, bits_left, threshold)
            through_right = _keep(through_right, bits_right, threshold)
        total_left += through_left * factor
        total_right += through_right * factor
    tl.store(out + rows * num_columns + left, total_left.to(out.dtype.element_ty), mask=in_left)
    tl.store(out + rows * num_columns + right, total_right.to(out.dtype.element_ty), mask=in_right)


def lora_down(x: torch.Tensor, a: torch.Tensor, seeds: torch.Tensor, threshold: int, factor: float) -> torch.Tensor:
    """See `latexocr.lora.lora_down`."""
    (num_rows, num_columns), width, adapters = x.shape, a.shape[0], len(seeds)
    height = 32
    strips, tiles = triton.cdiv(num_rows, height), triton.cdiv(num_columns, 2 * HALF)
    tiles_a_part = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // (strips * adapters))))
    parts = triton.cdiv(tiles, tiles_a_part)
    out = x.new_empty(num_rows, num_columns + width)
    sums = torch.empty(parts, num_rows, width, dtype=torch.float32, device=x.device)
    _down_kernel[(strips, parts, adapters)](
        x, x.stride(0), a, seeds, out, sums, num_rows, num_columns, tiles_a_part * 2 * HALF, threshold,
        ADAPTERS=adapters, RANK=width // adapters, DROPOUT=threshold > 0, BM=height, HALF=HALF,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _sum_kernel[(triton.cdiv(num_rows, 16),)](sums, out, num_rows, num_columns, parts, factor, WIDTH=width, BM=16)
    return out


def lora_grad_a(
    x_and_down: torch.Tensor, grad_down: torch.Tensor, seeds: torch.Tensor, threshold: int, factor: float
) -> torch.Tensor:
    """See `latexocr.lora.lora_grad_a`; both arguments are parts of tensors of one row length."""
    (num_rows, width), adapters = grad_down.shape, len(seeds)
    num_columns = x_and_down.shape[1] - width
    tiles = triton.cdiv(num_columns, 2 * HALF)
    parts = max(1, min(PROGRAMS // (tiles * adapters), triton.cdiv(num_rows, 256)))
    rows_a_part = triton.cdiv(num_rows, parts * 32) * 32
    sums = torch.empty(parts, width, num_columns, dtype=torch.float32, device=x_and_down.device)
    _grad_a_kernel[(tiles, parts, adapters)](
        x_and_down, grad_down, seeds, sums, num_rows, num_columns, rows_a_part, threshold, factor,
        ADAPTERS=adapters, RANK=width // adapters, DROPOUT=threshold > 0, BM=32, HALF=HALF, num_warps=4, num_stages=3,
    )  # fmt: skip
    return sums.sum(0) if parts > 1 else sums[0]


def lora_grad_x(
    grad: torch.Tensor, a: torch.Tensor, seeds: torch.Tensor, threshold: int, factor: float
) -> torch.Tensor:
    """See `latexocr.lora.lora_grad_x`."""
    width, adapters = a.shape[0], len(seeds)
    num_rows, num_columns = grad.shape[0], grad.shape[1] - width
    out = grad.new_empty(num_rows, num_columns)
    _grad_x_kernel[(triton.cdiv(num_rows, 64), triton.cdiv(num_columns, 2 * HALF))](
        grad, a, seeds, out, num_rows, num_columns, threshold, factor,
        ADAPTERS=adapters, RANK=width // adapters, DROPOUT=threshold > 0, BM=64, HALF=HALF, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _cross_entropy_kernel(logits, targets, scale, losses, num_columns, IGNORED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    source = logits + row * num_columns
    if target == IGNORED:
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            tl.store(source + columns, tl.zeros((BLOCK,), source.dtype.element_ty), mask=columns < num_columns)
        tl.store(losses + row, 0.0)
    else:
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            values = tl.load(source + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
            above = tl.maximum(largest, values)
            # a lane beyond the end has only -inf so far: exp(-inf - -inf) would be NaN
            safe = tl.where(above == float("-inf"), 0.0, above)
            sums = sums * tl.exp(largest - safe) + tl.exp(values - safe)
            largest = above
        peak = tl.max(largest, 0)
        total = peak + tl.log(tl.sum(sums * tl.exp(largest - peak), 0))
        factor = tl.load(scale)
        tl.store(losses + row, total - tl.load(source + target).to(tl.float32))
        tl.debug_barrier()
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            values = tl.load(source + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
            grads = (tl.exp(values - total) - tl.where(columns == target, 1.0, 0.0)) * factor
            tl.store(source + columns, grads.to(source.dtype.element_ty), mask=columns < num_columns)


def cross_entropy_in_place(
    logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor, ignored: int
) -> torch.Tensor:
    """See `latexocr.loss.cross_entropy_in_place`."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(len(logits),)](
        logits, targets, scale, losses, logits.shape[1], IGNORED=ignored, BLOCK=4096, num_warps=8
    )
    return losses
