"""What differs between model families, as data: one small file each, chosen by `config.model_type`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from latexocr.errors import InputError, nearest

PARTS = {
    "new_tokens": r"\.trainable_tokens_",  # peft's
    "embeddings": r"\.embed_tokens\.|\blm_head\.",
    "merger": r"\.visual\.(?:merger|deepstack_merger_list)\.",
    "vision": r"\.visual\.",
    "language": r"\.language_model\.",
}


@dataclass(frozen=True)
class Family:
    """The facts about one model family that the rest of the library needs.

    Args:
        name: what we call it.
        model_types: values of `config.model_type` that belong to it.
        end_token: what the chat template writes after an answer; supervised, and where generation stops.
        lora_targets: "part.kind" -> regular expression over full module paths. Full paths, because short names
            collide: a `gate_proj` is in Qwen2.5-VL's language model and in its vision tower. A key without a kind
            is selected by its own name alone.
        parts: part -> regular expression found in the names of its parameters; the first that is found counts.
        padded: per-token inputs that the tokenizer does not pad, with their padding value.
        concatenated: per-image inputs, joined along their first dimension; those that a batch has.
        deepstack: the vision tower also gives features of its middle layers to the first decoder layers.
        video: what tells the frames of a video apart: "grid" (positions count on by one), "seconds" (positions by
            time) or "timestamps" (text between pictures); None: no videos.
        vision_marks: what stands around each picture of a video with time stamps.
        tower: what the vision tower wants to know of a picture beside the places of its patches: nothing but its
            "bounds", the "windows" of its attention, its places in a "table" of learned positions, or the "grids".
        framing_tokens: those around an image that count as its own in `moe_mm_token_type_ids`.
        raster: the image processor gives patches row by row, and they are merged behind the vision tower; elsewhere
            the patches of a visual token stand together.
        routed: experts get those tokens that a router sends them, see `latexocr.experts`.
        empty_reasoning: what the chat template writes after a prompt in the place of a thought, and leaves out of a
            finished conversation.
        never_trained: regular expressions of parameters that no gradient reaches.
        hub_names: beginnings of names in the published checkpoints -> the model's own, where transformers reads the
            former but writes others.
    """

    name: str
    model_types: tuple[str, ...]
    end_token: str = "<|im_end|>"
    lora_targets: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=lambda: PARTS)
    padded: tuple[tuple[str, int], ...] = (("mm_token_type_ids", 0),)
    concatenated: tuple[str, ...] = ("pixel_values", "image_features", "image_grid_thw")
    deepstack: bool = False
    video: Literal["grid", "seconds", "timestamps"] | None = None
    vision_marks: tuple[str, str] = ("<|vision_start|>", "<|vision_end|>")
    tower: Literal["bounds", "windows", "table", "grids"] = "grids"
    framing_tokens: tuple[str, ...] = ()
    raster: bool = False
    routed: bool = False
    empty_reasoning: str = ""
    never_trained: tuple[str, ...] = ()
    hub_names: tuple[tuple[str, str], ...] = ()

    @property
    def token_types(self) -> tuple[str, ...]:
        """Those of `padded` that a model asks for beside positions."""
        return tuple(key for key, _ in self.padded if key != "mm_token_type_ids")

    def part_of(self, parameter: str) -> str:
        """The part of the model that a parameter with this name belongs to.

        >>> family_of("qwen2_vl").part_of("model.visual.merger.mlp.0.weight")
        'merger'
        """
        return next((part for part, regex in self.parts.items() if re.search(regex, parameter)), "other")

    def targets(self, components: list[str]) -> dict[str, list[str]]:
        """The keys of `lora_targets` that each component selects: a part, a kind, or part.kind.

        >>> family_of("qwen2_vl").targets(["vision", "mlp"])
        {'vision': ['vision.attention', 'vision.mlp'], 'mlp': ['language.mlp', 'vision.mlp']}

        Raises:
            InputError: a component that this family does not have, or none at all.
        """
        known = list(dict.fromkeys(word for key in self.lora_targets for word in (key, *key.split("."))))
        for component in components:
            if component not in known:
                raise InputError(
                    f"lora_components: {component!r} is none of {known}{nearest(component, known)} ({self.name})"
                )
        if not components:
            raise InputError(f"lora_components is empty: name at least one of {known}")
        return {word: [key for key in self.lora_targets if word in (key, *key.split("."))] for word in components}

    def target_regex(self, components: list[str]) -> str:
        """One expression for peft's `target_modules`. Arguments and errors as `targets`."""
        keys = dict.fromkeys(key for keys in self.targets(components).values() for key in keys)
        return "|".join(f"(?:{self.lora_targets[key]})" for key in keys)


LANGUAGE = {
    "language.attention": r".*\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    "language.mlp": r".*\.language_model\.layers\.\d+\.mlp\.(?:gate|up|down)_proj",
}


def families() -> tuple[Family, ...]:
    """All known families."""
    from latexocr.families import ernie4_5_vl, paddleocr_vl, qwen2_5_vl, qwen2_vl, qwen3_vl

    return tuple(module.FAMILY for module in (qwen2_vl, qwen2_5_vl, qwen3_vl, ernie4_5_vl, paddleocr_vl))


def family_of(model_type: str) -> Family:
    """The family with this `config.model_type`.

    Raises:
        InputError: unknown; the known ones are listed.
    """
    known = {kind: family for family in families() for kind in family.model_types}
    if model_type not in known:
        raise InputError(f"unknown model type {model_type!r}{nearest(model_type, known)}; known: {', '.join(known)}")
    return known[model_type]
