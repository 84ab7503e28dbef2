"""Qwen2.5-VL: 28-pixel cells, window attention, a gated vision MLP."""

from latexocr.families import LANGUAGE, Family

FAMILY = Family(
    name="Qwen2.5-VL",
    model_types=("qwen2_5_vl",),
    video="seconds",
    tower="windows",
    lora_targets={
        **LANGUAGE,
        "vision.attention": r".*\.visual\.blocks\.\d+\.attn\.(?:qkv|proj)",
        "vision.mlp": r".*\.visual\.blocks\.\d+\.mlp\.(?:gate|up|down)_proj",
        "merger": r".*\.visual\.merger\.mlp\.[02]",
    },
)
