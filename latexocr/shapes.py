"""Sizes of models: those of published checkpoints and tiny ones for the CPU.

A shape is (text configuration, vision configuration); vocab_size follows the tokenizer unless it is given.
"""

from __future__ import annotations

from typing import Any

Shape = tuple[dict[str, Any], dict[str, Any]]


def _rope(theta: float, *sections: int) -> dict[str, Any]:
    """Rotary positions in time, height and width: `sections` are their shares of half a head."""
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)}


def _qwen(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    """The decoder of Qwen2-VL and Qwen2.5-VL."""
    return dict(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=32768, rms_norm_eps=1e-6,
        tie_word_embeddings=tied, rope_parameters=_rope(1e6, 16, 24, 24),
    )  # fmt: skip


def _qwen2_5_vision(mlp: int, out: int) -> dict[str, Any]:
    return dict(
        depth=32, hidden_size=1280, num_heads=16, intermediate_size=mlp, out_hidden_size=out, window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
    )  # fmt: skip


TINY_TEXT: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=32768, tie_word_embeddings=True,
    # Wider than the usual 0.02: LoRA leaves the head frozen, and over 128 dimensions a head that small could not
    # give any token a high probability.
    initializer_range=0.1,
    rope_parameters=_rope(10000.0, 4, 6, 6),
)  # fmt: skip
QWEN2_VISION = dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4)
QWEN3_VL_8B_TEXT = dict(
    hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, vocab_size=151936, max_position_embeddings=262144, rms_norm_eps=1e-6, tie_word_embeddings=False,
    rope_parameters={**_rope(5e6, 24, 20, 20), "mrope_interleaved": True},
)  # fmt: skip
QWEN3_VL_8B_VISION = dict(
    depth=27, hidden_size=1152, num_heads=16, intermediate_size=4304, out_hidden_size=4096, patch_size=16,
    num_position_embeddings=2304, deepstack_visual_indexes=[8, 16, 24],
)  # fmt: skip
ERNIE_28B_TEXT = dict(
    hidden_size=2560, intermediate_size=12288, num_hidden_layers=28, num_attention_heads=20, num_key_value_heads=4,
    vocab_size=103424, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=True,
    moe_num_experts=64, moe_k=6, moe_num_shared_experts=2, moe_intermediate_size=[1536, 512],
    rope_parameters=_rope(500000.0, 22, 22, 20),
)  # fmt: skip
PADDLEOCR_TEXT = dict(
    hidden_size=1024, intermediate_size=3072, num_hidden_layers=18, num_attention_heads=16, num_key_value_heads=2,
    head_dim=128, vocab_size=103424, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False,
    rope_parameters=_rope(500000.0, 16, 24, 24),
)  # fmt: skip
# 11 million parameters with 1,000 tokens. Patches of 6 pixels: a visual token covers one or two glyphs of print that
# is 14 pixels high. The decoder is small, so that it looks at the picture instead of learning texts by heart.
BASE_TEXT = dict(
    hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=32768, tie_word_embeddings=True, rope_parameters=_rope(10000.0, 8, 12, 12),
)  # fmt: skip

# model type -> size -> shape
SHAPES: dict[str, dict[str, Shape]] = {
    "qwen2_vl": {
        "tiny": (TINY_TEXT, dict(depth=2, embed_dim=64, num_heads=4, mlp_ratio=2, hidden_size=128)),
        "base": (BASE_TEXT, dict(depth=8, embed_dim=256, num_heads=4, mlp_ratio=4, hidden_size=256, patch_size=6)),
        "2b": (_qwen(1536, 8960, 28, 12, 2, 151936, True), {**QWEN2_VISION, "hidden_size": 1536}),
        "7b": (_qwen(3584, 18944, 28, 28, 4, 152064, False), {**QWEN2_VISION, "hidden_size": 3584}),
    },
    "qwen2_5_vl": {
        "tiny": (TINY_TEXT, dict(depth=2, hidden_size=64, num_heads=4, intermediate_size=128, out_hidden_size=128,
                                 fullatt_block_indexes=[1])),
        "3b": (_qwen(2048, 11008, 36, 16, 2, 151936, True), _qwen2_5_vision(3420, 2048)),
        "7b": (_qwen(3584, 18944, 28, 28, 4, 152064, False), _qwen2_5_vision(3420, 3584)),
        "32b": (_qwen(5120, 27648, 64, 40, 8, 152064, False), _qwen2_5_vision(3456, 5120)),
    },
    "qwen3_vl": {
        "tiny": ({**TINY_TEXT, "head_dim": 32},
                 dict(depth=2, hidden_size=64, num_heads=4, intermediate_size=128, out_hidden_size=128,
                      patch_size=16, num_position_embeddings=256, deepstack_visual_indexes=[0])),
        "8b": (QWEN3_VL_8B_TEXT, QWEN3_VL_8B_VISION),
    },
    "ernie4_5_vl_moe": {
        "tiny": ({**TINY_TEXT, "rope_parameters": _rope(10000.0, 6, 6, 4), "moe_num_experts": 4, "moe_k": 2,
                  "moe_num_shared_experts": 1, "moe_intermediate_size": [64, 32]},
                 dict(depth=2, hidden_size=64, num_heads=4, intermediate_size=128)),
        "28b-a3b": (ERNIE_28B_TEXT, dict(depth=32, hidden_size=1280, num_heads=16, intermediate_size=5120)),
    },
    "paddleocr_vl": {
        "tiny": ({**TINY_TEXT, "head_dim": 32},
                 dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=128,
                      image_size=112)),
        "0.9b": (PADDLEOCR_TEXT, dict(num_hidden_layers=27, hidden_size=1152, num_attention_heads=16,
                                      intermediate_size=4304, image_size=384)),
    },
}  # fmt: skip
