"""A Triton kernel that makes 4-bit weights whole beside an adapter's B, in one pass: W|B of `latexocr.lora`.

Why our own: bitsandbytes' kernels write the scales, then the weights, and a third reads them to put B beside them;
with QLoRA and small batches that took half of the step. Importing this module needs Triton.

The format is that of bitsandbytes 0.46 to 0.50: two weights a byte, the first in the high half; one scale for 64
weights along the rows, itself kept in 8 bits with one scale for 256 of them, a table, and an offset.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 64  # weights a scale
ROWS, COLUMNS = 16, 512  # of weights a program: the fastest of 32 on an H200


@triton.jit
def _scale(block, inside, scales, table, coarse, offset):
    number = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
    fine = tl.load(table + number, mask=inside, other=0.0)
    return fine * tl.load(coarse + block // 256, mask=inside, other=0.0) + tl.load(offset)


@triton.jit(do_not_specialize=["first", "before", "behind"])
def _whole_kernel(
    packed, pairs, scales, scale_table, coarse, offset, b, out, first, num_rows, num_columns, before, rank, behind,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    start = tl.program_id(1) * BN
    width = before + rank + behind
    target = out + rows * (num_columns + width)
    lane = tl.arange(0, BN)[None, :]
    if start < num_columns:
        places = start // 2 + tl.arange(0, BN // 2)[None, :]
        inside = (rows < num_rows) & (2 * places < num_columns)
        weights = (first + rows) * num_columns
        byte = tl.load(packed + weights // 2 + places, mask=inside, other=0).to(tl.int32)
        if ALIGNED:  # rows begin with a block: each scale is worked out once
            blocks = start // BLOCK + tl.arange(0, BN // BLOCK)[None, :]
            known = (rows < num_rows) & (blocks * BLOCK < num_columns)
            scale = _scale(weights // BLOCK + blocks, known, scales, scale_table, coarse, offset)
            scale = tl.broadcast_to(scale[:, :, None], (BM, BN // BLOCK, BLOCK // 2)).reshape(BM, BN // 2)
        else:
            scale = _scale((weights + 2 * places) // BLOCK, inside, scales, scale_table, coarse, offset)
        both = tl.load(pairs + byte)
        left = (both & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        right = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        values = tl.interleave(left * scale, right * scale)
        columns = start + lane
        valid = (rows < num_rows) & (columns < num_columns)
        tl.store(target + columns, values.to(out.dtype.element_ty), mask=valid)
    else:
        for begin in range(0, width, BN):
            columns = begin + lane
            own = (columns >= before) & (columns < before + rank) & (rows < num_rows)
            values = tl.load(b + rows * rank + columns - before, mask=own, other=0.0)
            tl.store(target + num_columns + columns, values, mask=(rows < num_rows) & (columns < width))


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """(256,) the two numbers that each byte stands for, float32 side by side in 64 bits: reading them takes half as
    long as choosing each of 16 with comparisons."""
    import bitsandbytes.functional

    table = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    byte = torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=1).view(torch.int64)[:, 0].to(device)


def takes(state: Any) -> bool:
    """Whether a weight with this `bitsandbytes.functional.QuantState` is in the format above."""
    return (
        state.quant_type == "nf4" and state.nested and state.blocksize == BLOCK and state.state2.blocksize == 256
        and state.shape[-1] % 2 == 0
    )  # fmt: skip


def whole_beside(
    packed: torch.Tensor, state: Any, b: torch.Tensor, before: int, behind: int, first: int = 0
) -> torch.Tensor:
    """W|0|B|0 (rows, in + before + r + behind) in the type of `b`.

    Args:
        packed: the bytes of W (out, in), or of several below each other (experts, out, in).
        state: its `bitsandbytes.functional.QuantState`, see `takes`.
        b: (rows, r), contiguous.
        before: columns of zeros between W and B.
        behind: columns of zeros after B.
        first: row of W that stands beside the first of B.
    """
    (num_rows, rank), num_columns, scales = b.shape, state.shape[-1], state.state2
    out = b.new_empty(num_rows, num_columns + before + rank + behind)
    _whole_kernel[(triton.cdiv(num_rows, ROWS), triton.cdiv(num_columns, COLUMNS) + 1)](
        packed, _pairs(packed.device), state.absmax, scales.code, scales.absmax, state.offset, b, out, first, num_rows,
        num_columns, before, rank, behind, ALIGNED=num_columns % BLOCK == 0, BLOCK=BLOCK, BM=ROWS, BN=COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return out
