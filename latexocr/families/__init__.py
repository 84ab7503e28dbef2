"""What differs between model families, as data: one small file each, chosen by `config.model_type`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from latexocr.errors import InputError, nearest


@dataclass(frozen=True)
class Family:
    """The facts about one model family that the rest of the library needs.

    Args:
        name: what we call it.
        model_types: values of `config.model_type` that belong to it.
        end_token: what the chat template writes after an answer; supervised, and where generation stops.
        lora_targets: component -> regular expression over full module paths. Full paths, because short names
            collide: a `gate_proj` is in Qwen2.5-VL's language model and in its vision tower.
        padded: per-token inputs that the tokenizer does not pad, with their padding value.
        concatenated: per-image inputs, joined along their first dimension; those that a batch has.
        deepstack: the vision tower also gives features of its middle layers to the first decoder layers.
        video: what tells the frames of a video apart: "grid" (positions count on by one), "seconds" (positions by
            time) or "timestamps" (text between pictures); None: no videos.
        vision_marks: what stands around each picture of a video with time stamps.
        grid_free: the vision tower knows pictures by boundaries and positions alone, not by their grids.
    """

    name: str
    model_types: tuple[str, ...]
    end_token: str = "<|im_end|>"
    lora_targets: dict[str, str] = field(default_factory=dict)
    padded: tuple[tuple[str, int], ...] = (("mm_token_type_ids", 0),)
    concatenated: tuple[str, ...] = ("pixel_values", "image_features", "image_grid_thw")
    deepstack: bool = False
    video: Literal["grid", "seconds", "timestamps"] | None = None
    vision_marks: tuple[str, str] = ("<|vision_start|>", "<|vision_end|>")
    grid_free: bool = False

    def target_regex(self, components: list[str]) -> str:
        """One expression for peft's `target_modules`.

        Raises:
            InputError: a component that this family does not have.
        """
        for component in components:
            if component not in self.lora_targets:
                known = list(self.lora_targets)
                raise InputError(
                    f"lora_components: {component!r} is none of {known}{nearest(component, known)} ({self.name})"
                )
        if not components:
            raise InputError(f"lora_components is empty: name at least one of {list(self.lora_targets)}")
        return "|".join(f"(?:{self.lora_targets[component]})" for component in components)


LANGUAGE = r".*\.language_model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"


def families() -> tuple[Family, ...]:
    """All known families."""
    from latexocr.families import qwen2_5_vl, qwen2_vl, qwen3_vl

    return (qwen2_vl.FAMILY, qwen2_5_vl.FAMILY, qwen3_vl.FAMILY)


def family_of(model_type: str) -> Family:
    """The family with this `config.model_type`.

    Raises:
        InputError: unknown; the known ones are listed.
    """
    known = {kind: family for family in families() for kind in family.model_types}
    if model_type not in known:
        raise InputError(f"unknown model type {model_type!r}{nearest(model_type, known)}; known: {', '.join(known)}")
    return known[model_type]
