"""Qwen2-VL: 28-pixel cells, vision blocks with `fc1` and `fc2`."""

from latexocr.families import LANGUAGE, Family

FAMILY = Family(
    name="Qwen2-VL",
    model_types=("qwen2_vl",),
    video="grid",
    tower="bounds",
    lora_targets={
        **LANGUAGE,
        "vision.attention": r".*\.visual\.blocks\.\d+\.attn\.(?:qkv|proj)",
        "vision.mlp": r".*\.visual\.blocks\.\d+\.mlp\.fc[12]",
        "merger": r".*\.visual\.merger\.mlp\.[02]",
    },
)
