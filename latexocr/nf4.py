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
ROWS, COLUMNS = 4, 512  # of weights a program: the fastest of 44 on an H200
WORDS = {8: torch.int32, 4: torch.int16, 2: torch.uint8}  # weights that are read at once, and as what


@triton.jit(do_not_specialize=["first", "before", "behind"])
def _whole_kernel(
    packed, codes, scales, scale_table, coarse, offset, b, out, first, num_rows, num_columns, before, rank, behind,
    EACH: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    start = tl.program_id(1) * BN
    width = before + rank + behind
    target = out + rows * (num_columns + width)
    if start < num_columns:
        words = start // EACH + tl.arange(0, BN // EACH)[None, :]
        inside = (rows < num_rows) & (words * EACH < num_columns)
        numbers = (first + rows) * (num_columns // EACH) + words
        bits = tl.load(packed + numbers, mask=inside, other=0).to(tl.int32)
        block = numbers // (BLOCK // EACH)  # of a whole word
        scale = tl.load(scale_table + tl.load(scales + block, mask=inside, other=0).to(tl.int32))
        scale = scale * tl.load(coarse + block // 256, mask=inside, other=0.0) + tl.load(offset)
        place = tl.arange(0, EACH)[None, None, :]
        code = (bits[:, :, None] >> (place ^ 1) * 4) & 15  # of the two in a byte the first is the high half
        # 64 bytes, which all threads read at once: of a table of 256 pairs they read up to 16 lines one by one
        values = tl.load(codes + code) * scale[:, :, None]
        tl.store((target + words * EACH)[:, :, None] + place, values.to(out.dtype.element_ty), mask=inside[:, :, None])
    else:
        for begin in range(0, width, BN):
            columns = begin + tl.arange(0, BN)[None, :]
            own = (columns >= before) & (columns < before + rank) & (rows < num_rows)
            values = tl.load(b + rows * rank + columns - before, mask=own, other=0.0)
            tl.store(target + num_columns + columns, values, mask=(rows < num_rows) & (columns < width))


@cache
def _codes(device: torch.device) -> torch.Tensor:
    """(16,) float32: the numbers that NF4 knows."""
    import bitsandbytes.functional

    return bitsandbytes.functional.get_4bit_type("nf4", device="cpu").to(device)


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
        packed: the bytes of W (out, in), or of several below each other (experts, out, in); they begin a storage.
        state: its `bitsandbytes.functional.QuantState`, see `takes`.
        b: (rows, r), contiguous.
        before: columns of zeros between W and B.
        behind: columns of zeros after B.
        first: row of W that stands beside the first of B.
    """
    (num_rows, rank), num_columns, scales = b.shape, state.shape[-1], state.state2
    out = b.new_empty(num_rows, num_columns + before + rank + behind)
    each = next(number for number in WORDS if num_columns % number == 0)
    _whole_kernel[(triton.cdiv(num_rows, ROWS), triton.cdiv(num_columns, COLUMNS) + (out.shape[1] > num_columns))](
        packed.flatten().view(WORDS[each]), _codes(packed.device), state.absmax, scales.code, scales.absmax,
        state.offset, b, out, first, num_rows, num_columns, before, rank, behind, EACH=each, BLOCK=BLOCK, BM=ROWS,
        BN=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out
