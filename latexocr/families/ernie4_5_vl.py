"""ERNIE-4.5-VL: a mixture of experts, some for text and some for images; patches are not doubled in time."""

from latexocr.families import LANGUAGE, PARTS, Family

FAMILY = Family(
    name="ERNIE-4.5-VL",
    model_types=("ernie4_5_vl_moe",),
    end_token="<|end_of_sentence|>",
    padded=(("mm_token_type_ids", 0), ("moe_mm_token_type_ids", 0)),
    framing_tokens=("<|IMAGE_START|>", "<|IMAGE_END|>"),
    empty_reasoning="<think>\n\n</think>\n\n",
    tower="bounds",
    routed=True,
    never_trained=(r"\.e_score_correction_bias$",),  # it balances the choice of experts, and is no part of the output
    hub_names=(("vision_model", "model.vision_tower"),),
    parts={
        "experts": r"\.(?:text|vision)_moe\.",
        **PARTS,
        "merger": r"\.resampler_model\.",
        "vision": r"\.vision_tower\.",
    },
    lora_targets={
        **LANGUAGE,  # language.mlp: that of the first layer, which has no experts
        "language.shared_experts": r".*\.language_model\.layers\.\d+\.mlp\.shared_experts\.(?:gate|up|down)_proj",
        # stacked parameters, not layers
        "experts": r".*\.language_model\.layers\.\d+\.mlp\.(?:text|vision)_moe\.experts\.(?:gate_up|down)_proj",
        "vision.attention": r".*\.vision_tower\.blocks\.\d+\.attn\.(?:qkv|proj)",
        "vision.mlp": r".*\.vision_tower\.blocks\.\d+\.mlp\.fc[12]",
        "merger": r".*\.resampler_model\.(?:mlp|(?:spatial|temporal)_linear\.fc[12])",
    },
)
