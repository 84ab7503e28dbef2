"""A Triton kernel that makes 4-bit weights whole beside an adapter's B, in one pass: W|B of `latexocr.lora`.

Why our own: bitsandbytes' kernels write the scales, then the weights, and a third reads them to put B beside them;
with QLoRA and small batches that took half of the step. Importing this module needs Triton.

The format is that of bitsandbytes 0.46 to 0.50: two weights a byte, the first in the high half; one scale for 64
weights along the rows, itself kept in 8 bits with one scale for 256 of them, a table, and an offset.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 64  # weights a scale
COLUMNS = 256  # of weights a program
ROWS = 16


@triton.jit
def _looked_up(half, table):
    """The number in `table` (16,) for each of `half`: selected bit by bit, which is faster than reading it."""
    a, b, c, d = half & 1 > 0, half & 2 > 0, half & 4 > 0, half & 8 > 0
    pair0 = tl.where(a, tl.load(table + 1), tl.load(table + 0))
    pair1 = tl.where(a, tl.load(table + 3), tl.load(table + 2))
    pair2 = tl.where(a, tl.load(table + 5), tl.load(table + 4))
    pair3 = tl.where(a, tl.load(table + 7), tl.load(table + 6))
    pair4 = tl.where(a, tl.load(table + 9), tl.load(table + 8))
    pair5 = tl.where(a, tl.load(table + 11), tl.load(table + 10))
    pair6 = tl.where(a, tl.load(table + 13), tl.load(table + 12))
    pair7 = tl.where(a, tl.load(table + 15), tl.load(table + 14))
    low = tl.where(c, tl.where(b, pair3, pair2), tl.where(b, pair1, pair0))
    high = tl.where(c, tl.where(b, pair7, pair6), tl.where(b, pair5, pair4))
    return tl.where(d, high, low)


@triton.jit
def _scale(block, inside, scales, table, coarse, offset):
    number = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
    fine = tl.load(table + number, mask=inside, other=0.0)
    return fine * tl.load(coarse + block // 256, mask=inside, other=0.0) + tl.load(offset)


@triton.jit(do_not_specialize=["first", "before", "behind"])
def _whole_kernel(
    packed, table, scales, scale_table, coarse, offset, b, out, first, num_rows, num_columns, before, rank, behind,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    start = tl.program_id(1) * BN
    width = before + rank + behind
    target = out + rows * (num_columns + width)
    lane = tl.arange(0, BN)[None, :]
    if start < num_columns:
        pairs = start // 2 + tl.arange(0, BN // 2)[None, :]
        inside = (rows < num_rows) & (2 * pairs < num_columns)
        weights = (first + rows) * num_columns
        byte = tl.load(packed + weights // 2 + pairs, mask=inside, other=0).to(tl.int32)
        if ALIGNED:  # rows begin with a block: each scale is worked out once
            blocks = start // BLOCK + tl.arange(0, BN // BLOCK)[None, :]
            known = (rows < num_rows) & (blocks * BLOCK < num_columns)
            scale = _scale(weights // BLOCK + blocks, known, scales, scale_table, coarse, offset)
            scale = tl.broadcast_to(scale[:, :, None], (BM, BN // BLOCK, BLOCK // 2)).reshape(BM, BN // 2)
        else:
            scale = _scale((weights + 2 * pairs) // BLOCK, inside, scales, scale_table, coarse, offset)
        values = tl.interleave(_looked_up(byte >> 4, table) * scale, _looked_up(byte & 15, table) * scale)
        columns = start + lane
        valid = (rows < num_rows) & (columns < num_columns)
        tl.store(target + columns, values.to(out.dtype.element_ty), mask=valid)
    else:
        for first in range(0, width, BN):
            columns = first + lane
            own = (columns >= before) & (columns < before + rank) & (rows < num_rows)
            values = tl.load(b + rows * rank + columns - before, mask=own, other=0.0)
            tl.store(target + num_columns + columns, values, mask=(rows < num_rows) & (columns < width))


def takes(state: Any) -> bool:
    """Whether a weight with this `bitsandbytes.functional.QuantState` is in the format above."""
    return (
        state.quant_type == "nf4" and state.nested and state.blocksize == BLOCK and state.state2.blocksize == 256
        and state.shape[1] % 2 == 0
    )  # fmt: skip


def whole_beside(
    packed: torch.Tensor, state: Any, b: torch.Tensor, before: int, behind: int, first: int = 0
) -> torch.Tensor:
    """W|0|B|0 (rows, in + before + r + behind) in the type of `b`.

    Args:
        packed: the bytes of W (out, in).
        state: its `bitsandbytes.functional.QuantState`, see `takes`.
        b: (rows, r), contiguous.
        before: columns of zeros between W and B.
        behind: columns of zeros after B.
        first: row of W that stands beside the first of B.
    """
    (num_rows, rank), num_columns, scales = b.shape, state.shape[1], state.state2
    out = b.new_empty(num_rows, num_columns + before + rank + behind)
    _whole_kernel[(triton.cdiv(num_rows, ROWS), triton.cdiv(num_columns, COLUMNS) + 1)](
        packed, state.code, state.absmax, scales.code, scales.absmax, state.offset, b, out, first, num_rows,
        num_columns, before, rank, behind, ALIGNED=num_columns % BLOCK == 0, BLOCK=BLOCK, BM=ROWS, BN=COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return out
