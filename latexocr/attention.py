"""Variable-length attention on PyTorch's own kernel: many sequences in one row, no padding, no extra package.

Why: a padded batch of formulas is a quarter padding, and stock attention loops over the images of the vision tower.
`torch.nn.attention.varlen.varlen_attn` computes all sequences of a flattened batch in one call. transformers lets
a function be registered as an attention implementation; a name with "flash" in it makes the vision tower hand over
all images at once.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

VARLEN = "flash_varlen_torch"
# Kernels are chosen by the longest sequence; a few fixed sizes keep compiled code from being compiled again.
LENGTH_STEP = 512
VARLEN_CAPABILITY = (8, 0)  # Ampere and later, in 16 bits: what the kernel is written for
# Grouped key-value heads: PyTorch 2.12 and later want to be told; 2.11 takes them as they are.
KNOWS_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def bucketed(length: int) -> int:
    """`length` rounded up to a multiple of 512."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    text_cu_seqlens: torch.Tensor | None = None,
    text_max_seqlen: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each sequence of a flattened row.

    The vision tower gives its own boundaries as `cu_seq_lens_q`; the language model's come from the collator as
    `text_cu_seqlens`, under a name of their own because transformers 5.17 hands every keyword to both.

    Args:
        module: the attention layer; causal unless it says otherwise.
        query: (1, heads, length, head_dim).
        key: (1, key_value_heads, length, head_dim).
        value: as `key`.
        attention_mask: must be None: boundaries say everything.
        scaling: factor of the scores, 1 / sqrt(head_dim) by default.
        is_causal: overrides the module's own.
        cu_seq_lens_q: (sequences + 1,) boundaries of the images, int32.
        max_length_q: longest image in patches.
        text_cu_seqlens: (sequences + 1,) boundaries of the records, int32.
        text_max_seqlen: longest record in tokens.

    Returns:
        (1, length, heads, head_dim), and None for the weights, as transformers expects.
    """
    causal = module.is_causal if is_causal is None else is_causal
    cu_seqlens, longest = (text_cu_seqlens, text_max_seqlen) if causal else (cu_seq_lens_q, max_length_q)
    # under autocast stock rotary positions leave queries and keys in float32, and values in 16 bits
    query, key, value = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        output = _kernel(query, key, value, cu_seqlens, longest, causal, scaling)
    else:
        output = _one_by_one(query, key, value, cu_seqlens, causal, scaling)
    return output[None], None


def _kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, longest: int,
    causal: bool, scaling: float | None,
) -> torch.Tensor:  # fmt: skip
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0) if causal else (-1, -1)}
    if KNOWS_GROUPS and query.shape[1] > key.shape[1]:
        options["enable_gqa"] = True
    return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool,
    scaling: float | None,
) -> torch.Tensor:  # fmt: skip
    """The same in plain PyTorch, for the CPU and for float32, which the kernel does not know."""
    outputs = []
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        each = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scaling, enable_gqa=True)
        outputs.append(each[0].transpose(0, 1))
    return torch.cat(outputs)


def set_attention(model: torch.nn.Module, name: str) -> None:
    """Let every part of `model` use the attention implementation `name`."""
    for part in model.modules():
        if hasattr(part, "config") and hasattr(part.config, "_attn_implementation"):
            part.config._attn_implementation = name


# No mask function is registered on purpose: transformers then builds no mask, and the boundaries say everything.
AttentionInterface.register(VARLEN, varlen_attention)
