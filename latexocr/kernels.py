"""Triton kernels of the training step: LoRA with its dropout, norms, gates, positions, embeddings, experts,
cross-entropy.

Why our own: dropout before an adapter makes a copy of every layer's input, and the adapter's thin products read and
write it again; together that costs half as much time as the frozen layer itself. Here a mask is a function of seed and
position, so it is never stored, and each tensor is read once. Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

HALF = 64  # columns a half tile; elements this far apart share 32 random bits, see `latexocr.lora.keep_mask`
ELEMENTS = 2048  # a program of the elementwise kernels
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


@triton.jit(do_not_specialize=["adapters", "threshold"])
def _down_kernel(
    x, x_stride, a, seeds, out, sums, num_rows, num_columns, columns_a_part, threshold, adapters,
    RANK: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BM
    part, adapter = tl.program_id(1), tl.program_id(2)
    rows, ranks, lane = tl.arange(0, BM)[:, None], tl.arange(0, RANK), tl.arange(0, HALF)[None, :]
    inside = first + rows < num_rows
    out_stride = num_columns + adapters * RANK
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
    target = ((part * num_rows + first + rows) * adapters + adapter) * RANK + ranks[None, :]
    tl.store(sums + target, total, mask=inside)


@triton.jit(do_not_specialize=["num_parts"])
def _sum_kernel(sums, out, num_rows, num_columns, num_parts, factor, width, BM: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    lane = tl.arange(0, 64)[None, :]
    for start in range(0, width, 64):
        valid = (rows < num_rows) & (start + lane < width)
        total = tl.zeros((BM, 64), dtype=tl.float32)
        for part in range(num_parts):
            total += tl.load(sums + (part * num_rows + rows) * width + start + lane, mask=valid, other=0.0)
        target = out + rows.to(tl.int64) * (num_columns + width) + num_columns + start + lane
        tl.store(target, (total * factor).to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["adapters", "threshold"])
def _grad_a_kernel(
    x, grad_down, seeds, out, num_rows, num_columns, rows_a_part, threshold, factor, adapters,
    RANK: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * 2 * HALF
    part, adapter = tl.program_id(1), tl.program_id(2)
    ranks, lane = tl.arange(0, RANK)[:, None], tl.arange(0, HALF)[None, :]
    left, right = start + lane, start + HALF + lane
    stride = num_columns + adapters * RANK
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
    target = out + ((part * adapters + adapter) * RANK + ranks) * num_columns
    tl.store(target + left, sum_left * factor, mask=left < num_columns)
    tl.store(target + right, sum_right * factor, mask=right < num_columns)


@triton.jit(do_not_specialize=["threshold"])
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
        x, x.stride(0), a, seeds, out, sums, num_rows, num_columns, tiles_a_part * 2 * HALF, threshold, adapters,
        RANK=width // adapters, DROPOUT=threshold > 0, BM=height, HALF=HALF,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _sum_kernel[(triton.cdiv(num_rows, 16),)](sums, out, num_rows, num_columns, parts, factor, width, BM=16)
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
        x_and_down, grad_down, seeds, sums, num_rows, num_columns, rows_a_part, threshold, factor, adapters,
        RANK=width // adapters, DROPOUT=threshold > 0, BM=32, HALF=HALF, num_warps=4, num_stages=3,
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
def _copy_kernel(tensors, blocks, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.load(blocks + 2 * tl.program_id(0))
    entry = tensors + 5 * number
    source = tl.load(entry).to(tl.pointer_type(tl.float32))
    target = tl.load(entry + 1).to(tl.pointer_type(DTYPE))
    size, num_columns, stride = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    places = tl.load(blocks + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK)
    values = tl.load(source + places, mask=places < size, other=0.0)
    rows = places // num_columns
    tl.store(target + rows * stride + places - rows * num_columns, values.to(DTYPE), mask=places < size)


class Copies:
    """Copies many float32 matrices to rows of other matrices in another type, all with one kernel.

    Args:
        targets: (rows, columns) each, rows may lie apart.
        sources: as many, contiguous.
    """

    def __init__(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        self._held = targets, sources  # the kernel knows addresses alone: their memory must not become another's
        self.addresses = [source.data_ptr() for source in sources]
        entries = [
            (source.data_ptr(), target.data_ptr(), source.numel(), source.shape[1], target.stride(0))
            for source, target in zip(sources, targets, strict=True)
        ]
        blocks = [(i, start) for i, entry in enumerate(entries) for start in range(0, entry[2], 2 * ELEMENTS)]
        self._tensors, self._blocks = (torch.tensor(rows, device=targets[0].device) for rows in (entries, blocks))
        self._dtype = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(targets[0].dtype, tl.float32)

    def __call__(self) -> None:
        _copy_kernel[(len(self._blocks),)](
            self._tensors, self._blocks, DTYPE=self._dtype, BLOCK=2 * ELEMENTS, num_warps=8
        )


@triton.jit
def _take_rows_kernel(table, ids, out, num_columns, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    source = table + tl.load(ids + place).to(tl.int64) * num_columns
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(source + columns, mask=columns < num_columns)
        tl.store(out + place * num_columns + columns, values, mask=columns < num_columns)


def take_rows(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows (..., width) of `table` (rows, width), on the device of `ids` (...).

    Over the bus an H200 reads 192 rows of 3,584 16-bit numbers in 0.03 ms, 2,752 in 0.39.

    Args:
        table: contiguous; on the device, or in the host's pinned memory.
        ids: row numbers, all of them in the table: this is not checked.
    """
    ids, num_columns = ids.contiguous(), table.shape[1]
    out = torch.empty(*ids.shape, num_columns, dtype=table.dtype, device=ids.device)
    _take_rows_kernel[(ids.numel(),)](table, ids, out, num_columns, BLOCK=1024)
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


@triton.jit
def _rms_norm_kernel(x, weight, y, scales, num_rows, num_columns, eps, BM: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    places = rows * num_columns + columns
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 1) / num_columns + eps)[:, None]
    weights = tl.load(weight + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    normed = (values * scale).to(x.dtype.element_ty).to(tl.float32)  # transformers rounds before the weight, too
    tl.store(y + places, (normed * weights).to(y.dtype.element_ty), mask=inside)
    tl.store(scales + rows, scale, mask=rows < num_rows)


@triton.jit
def _rms_norm_backward_kernel(
    grad, x, weight, scales, grad_x, num_rows, num_columns, BM: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    places = rows * num_columns + columns
    scale = tl.load(scales + rows, mask=rows < num_rows, other=0.0)
    normed = tl.load(x + places, mask=inside, other=0.0).to(tl.float32) * scale
    weights = tl.load(weight + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    grads = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32) * weights
    along = tl.sum(grads * normed, 1)[:, None] / num_columns
    tl.store(grad_x + places, ((grads - normed * along) * scale).to(grad_x.dtype.element_ty), mask=inside)


def _rows_and_block(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Rows, columns, rows a program and columns a program: about 4,096 elements, or one row."""
    num_columns = x.shape[-1]
    block = triton.next_power_of_2(num_columns)
    return x.numel() // num_columns, num_columns, max(1, 4096 // block), block


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm over the last dimension of a contiguous `x`, and (rows,) factors that it divided by, inverted."""
    num_rows, num_columns, height, block = _rows_and_block(x)
    y, scales = torch.empty_like(x), torch.empty(num_rows, dtype=torch.float32, device=x.device)
    _rms_norm_kernel[(triton.cdiv(num_rows, height),)](
        x, weight, y, scales, num_rows, num_columns, eps, BM=height, BLOCK=block, num_warps=8
    )
    return y, scales


def rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Gradient of the input of `rms_norm`."""
    num_rows, num_columns, height, block = _rows_and_block(x)
    grad_x = torch.empty_like(x)
    _rms_norm_backward_kernel[(triton.cdiv(num_rows, height),)](
        grad, x, weight, scales, grad_x, num_rows, num_columns, BM=height, BLOCK=block, num_warps=8
    )
    return grad_x


@triton.jit
def _swiglu_kernel(gate, up, y, num_elements, width, stride, BLOCK: tl.constexpr):
    part, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    places, sources = part * width + lane, part * stride + lane
    inside = (lane < width) & (places < num_elements)
    gates = tl.load(gate + sources, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(up + sources, mask=inside, other=0.0).to(tl.float32)
    activated = (gates * tl.sigmoid(gates)).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(y + places, (activated * ups).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    grad, gate, up, grad_gate, grad_up, num_elements, width, stride, BLOCK: tl.constexpr
):  # fmt: skip
    part, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    places, sources = part * width + lane, part * stride + lane
    inside = (lane < width) & (places < num_elements)
    grads = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(gate + sources, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(up + sources, mask=inside, other=0.0).to(tl.float32)
    open_share = tl.sigmoid(gates)
    slope = open_share * (1 + gates * (1 - open_share))
    tl.store(grad_gate + sources, (grads * ups * slope).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + sources, (grads * gates * open_share).to(grad_up.dtype.element_ty), mask=inside)


def _parts(x: torch.Tensor) -> tuple[int, int, int]:
    """Elements a program of a kernel over `x`, elements from one program's to the next one's, and a power of two that
    is not smaller: rows of half a tensor, or of a contiguous one any part."""
    if x.is_contiguous():
        return ELEMENTS, ELEMENTS, ELEMENTS
    return x.shape[-1], x.stride(-2), triton.next_power_of_2(x.shape[-1])


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; both contiguous, or the halves (rows, columns) of one tensor."""
    width, stride, block = _parts(gate)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _swiglu_kernel[(triton.cdiv(gate.numel(), width),)](
        gate, up, y, gate.numel(), width, stride, BLOCK=block, num_warps=8
    )
    return y


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, grads: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Writes the gradients of gate and up, laid out as they are, to `grads`."""
    width, stride, block = _parts(gate)
    _swiglu_backward_kernel[(triton.cdiv(gate.numel(), width),)](
        grad, gate, up, *grads, gate.numel(), width, stride, BLOCK=block, num_warps=8
    )


@triton.jit
def _weighted_sum_kernel(rows, places, shares, theirs, out, num_columns, TOP: tl.constexpr, BLOCK: tl.constexpr):
    token, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, total = columns < num_columns, tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP):
        number = token * TOP + choice
        there = columns < num_columns * tl.load(theirs + number).to(tl.int32)
        values = tl.load(rows + tl.load(places + number) * num_columns + columns, mask=there, other=0.0)
        total += tl.load(shares + number).to(tl.float32) * values.to(tl.float32)
    tl.store(out + token * num_columns + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_sum_backward_kernel(
    grad, rows, places, shares, theirs, grad_rows, grad_shares, num_columns, TOP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < num_columns
    grads = tl.load(grad + token * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
    for choice in tl.static_range(TOP):
        number = token * TOP + choice
        there = columns < num_columns * tl.load(theirs + number).to(tl.int32)
        row = tl.load(places + number) * num_columns
        values = tl.load(rows + row + columns, mask=there, other=0.0).to(tl.float32)
        share = tl.load(shares + number).to(tl.float32)
        tl.store(grad_rows + row + columns, (share * grads).to(grad_rows.dtype.element_ty), mask=there)
        tl.store(grad_shares + number, tl.sum(values * grads).to(grad_shares.dtype.element_ty))


def weighted_sum(rows: torch.Tensor, places: torch.Tensor, shares: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """See `latexocr.experts.weighted_sum`; all contiguous. Rows that are nobody's are not read."""
    out = rows.new_empty(len(places), rows.shape[1])
    _weighted_sum_kernel[(len(places),)](
        rows, places, shares, theirs, out, rows.shape[1], TOP=places.shape[1],
        BLOCK=triton.next_power_of_2(rows.shape[1]), num_warps=8,
    )  # fmt: skip
    return out


def weighted_sum_backward(
    grad: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, shares: torch.Tensor, theirs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `latexocr.experts.weighted_sum_backward`; all contiguous."""
    grads = torch.empty_like(rows), torch.empty_like(shares)
    _weighted_sum_backward_kernel[(len(places),)](
        grad, rows, places, shares, theirs, *grads, rows.shape[1], TOP=places.shape[1],
        BLOCK=triton.next_power_of_2(rows.shape[1]), num_warps=8,
    )  # fmt: skip
    return grads


@triton.jit
def _quick_gelu_kernel(x, y, num_elements, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_elements
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + places, (values * tl.sigmoid(1.702 * values)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _quick_gelu_backward_kernel(grad, x, grad_x, num_elements, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_elements
    grads = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    open_share = tl.sigmoid(1.702 * values)
    slope = open_share * (1 + 1.702 * values * (1 - open_share))
    tl.store(grad_x + places, (grads * slope).to(grad_x.dtype.element_ty), mask=inside)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x) of a contiguous tensor."""
    y = torch.empty_like(x)
    _quick_gelu_kernel[(triton.cdiv(x.numel(), ELEMENTS),)](x, y, x.numel(), BLOCK=ELEMENTS, num_warps=8)
    return y


def quick_gelu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gradient of the input of `quick_gelu`."""
    grad_x = torch.empty_like(x)
    _quick_gelu_backward_kernel[(triton.cdiv(x.numel(), ELEMENTS),)](
        grad, x, grad_x, x.numel(), BLOCK=ELEMENTS, num_warps=8
    )
    return grad_x


@triton.jit(do_not_specialize=["num_heads"])
def _rotate_kernel(
    x, cos, sin, y, row_stride, head_stride, num_heads, half, BACKWARD: tl.constexpr, HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    inside, in_row = (heads < num_heads) & (lane < half), lane < half
    source = x + row * row_stride + heads * head_stride + lane
    left = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    angle = row * 2 * half + lane
    cos_left = tl.load(cos + angle, mask=in_row, other=0.0).to(tl.float32)
    cos_right = tl.load(cos + angle + half, mask=in_row, other=0.0).to(tl.float32)
    sin_left = tl.load(sin + angle, mask=in_row, other=0.0).to(tl.float32)
    sin_right = tl.load(sin + angle + half, mask=in_row, other=0.0).to(tl.float32)
    if BACKWARD:
        turned_left = left * cos_left + right * sin_right
        turned_right = right * cos_right - left * sin_left
    else:
        turned_left = left * cos_left - right * sin_left
        turned_right = right * cos_right + left * sin_right
    target = y + (row * num_heads + heads) * 2 * half + lane
    tl.store(target, turned_left.to(y.dtype.element_ty), mask=inside)
    tl.store(target + half, turned_right.to(y.dtype.element_ty), mask=inside)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backward: bool) -> torch.Tensor:
    """Rotary positions of (..., heads, head_dim), angles (..., head_dim); `backward` turns back."""
    *rows, num_heads, head_dim = x.shape
    if x.stride(-1) != 1 or any(
        x.stride(i) != x.stride(i + 1) * x.shape[i + 1] and x.shape[i] > 1 for i in range(len(rows) - 1)
    ):
        x = x.contiguous()
    y = x.new_empty(x.shape)
    _rotate_kernel[(y.numel() // (num_heads * head_dim), triton.cdiv(num_heads, 16))](
        x, cos, sin, y, x.stride(-3), x.stride(-2), num_heads, head_dim // 2, BACKWARD=backward, HEADS=16,
        BLOCK=triton.next_power_of_2(head_dim // 2), num_warps=4,
    )  # fmt: skip
    return y


@contextmanager
def compiled_meanwhile(rank: int, dropout: bool, dtype: torch.dtype) -> Iterator[None]:
    """Compile the kernels of a training in threads, while the block does something else; they are ready at its end.

    Why: the first time in an environment each takes about a second; after that they come from Triton's cache.

    Args:
        rank: of the adapters.
        dropout: whether they have any.
        dtype: of the weights.
    """
    tasks = _rehearsals(rank, dropout, dtype, torch.cuda.current_device())
    with ThreadPoolExecutor(len(tasks)) as threads:
        running = [threads.submit(task) for task in tasks]
        yield
        for task in running:
            task.result()


def _rehearsals(rank: int, dropout: bool, dtype: torch.dtype, device: int) -> list[Callable[[], None]]:
    """Every kernel once on small tensors, each by one task only: what Triton keeps for a kernel is not locked."""
    new = partial(torch.zeros, dtype=dtype, device=device)
    plain = partial(torch.zeros, device=device)
    threshold, rows, columns = 3 * dropout, 32, 128
    one, both, grads = new(rows, columns), new(rows, columns + rank), new(rows, columns)

    def seeds(adapters: int = 1) -> torch.Tensor:
        return plain(adapters, dtype=torch.long)

    def grad_x() -> None:
        for adapters in (1, 2, 3):
            width = adapters * rank
            lora_grad_x(new(rows, columns + width), new(width, columns), seeds(adapters), threshold, 1.0)

    def elementwise() -> None:
        swiglu_backward(grads, one, swiglu(one, one), (new(rows, columns), new(rows, columns)))
        quick_gelu(one)
        Copies([new(rows, columns)], [plain(rows, columns)])()
        cross_entropy_in_place(one, plain(rows, dtype=torch.long), plain(()), -100)

    def norms() -> None:
        y, scales = rms_norm(one, new(columns), 1e-6)
        rms_norm_backward(grads, y, new(columns), scales)

    def rotations() -> None:
        heads = new(rows, 1, columns)
        rotate(heads, plain(rows, columns), plain(rows, columns), backward=False)  # of the vision tower
        for backward in (False, True):
            rotate(heads, one, one, backward=backward)

    def on_device(task: Callable[[], Any]) -> None:
        with torch.cuda.device(device):
            task()

    tasks = (
        lambda: lora_down(one, new(rank, columns), seeds(), threshold, 1.0),
        lambda: lora_grad_a(both, both[:, columns:], seeds(), threshold, 1.0),
        grad_x, elementwise, norms, rotations,
    )  # fmt: skip
    return [partial(on_device, task) for task in tasks]
