"""PaddleOCR-VL: a small reader of documents; its patches are merged behind the vision tower."""

from latexocr.families import LANGUAGE, PARTS, Family

FAMILY = Family(
    name="PaddleOCR-VL",
    model_types=("paddleocr_vl",),
    end_token="</s>",
    raster=True,
    parts={**PARTS, "merger": r"\.projector\."},
    lora_targets={
        **LANGUAGE,
        "vision.attention": r".*\.visual\.vision_model\.encoder\.layers\.\d+\.self_attn\.(?:[qkv]|out)_proj",
        "vision.mlp": r".*\.visual\.vision_model\.encoder\.layers\.\d+\.mlp\.fc[12]",
        "merger": r".*\.projector\.linear_[12]",
    },
)
