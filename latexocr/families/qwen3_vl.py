"""Qwen3-VL: 32-pixel cells (16-pixel patches), vision blocks with `linear_fc1` and `linear_fc2`, deepstack mergers."""

from latexocr.families import LANGUAGE, Family

FAMILY = Family(
    name="Qwen3-VL",
    model_types=("qwen3_vl",),
    video="timestamps",
    tower="table",
    deepstack=True,
    lora_targets={
        **LANGUAGE,
        "vision.attention": r".*\.visual\.blocks\.\d+\.attn\.(?:qkv|proj)",
        "vision.mlp": r".*\.visual\.blocks\.\d+\.mlp\.linear_fc[12]",
        "merger": r".*\.visual\.(?:merger|deepstack_merger_list\.\d+)\.linear_fc[12]",
    },
)
