"""Learning rates that differ within a model: by part, and for the second matrix of each adapter (LoRA+).

Why: a vision tower and embeddings that are right already need smaller steps than the rest, new tokens larger ones; and
B, which begins at zero, should learn faster than A (LoRA+, arXiv:2402.12354).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from latexocr.errors import InputError, nearest
from latexocr.families import Family

if TYPE_CHECKING:
    import torch

    from latexocr.config import TrainOptions


def learning_rates(model: torch.nn.Module, family: Family, options: TrainOptions) -> dict[str, float]:
    """The peak learning rate of every trained parameter, by name.

    Raises:
        InputError: `learning_rates` names a part that this model does not have or that is not trained.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = {name: family.part_of(name) for name in names}
    for part, rate in options.learning_rates.items():
        if part not in family.parts:
            known = list(family.parts)
            raise InputError(f"learning_rates: {part!r} is none of {known}{nearest(part, known)} ({family.name})")
        if part not in parts.values():
            trained = ", ".join(dict.fromkeys(parts.values()))
            raise InputError(f"learning_rates: {part} is not trained here ({trained}); leave it out")
        if not (0 <= rate < math.inf):
            raise InputError(f"learning_rates: {part} is {rate}, needs a number from 0")
    ratio = options.loraplus_lr_ratio or 1.0
    return {
        name: options.learning_rates.get(part, options.learning_rate) * (ratio if ".lora_B." in name else 1.0)
        for name, part in parts.items()
    }


def parameter_groups(
    model: torch.nn.Module, family: Family, options: TrainOptions, *, decaying: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimiser: parameters with the same learning rate and weight decay together.

    Args:
        model: with its trained parameters.
        family: tells the parts.
        options: `learning_rate`, `learning_rates`, `loraplus_lr_ratio`.
        decaying: names of the parameters that `weight_decay` is for.
        weight_decay: of those.
    """
    usual = options.learning_rate, weight_decay  # first, because stock Trainer logs the first group's rate
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {usual: []}
    parameters = dict(model.named_parameters())
    for name, rate in learning_rates(model, family, options).items():
        groups.setdefault((rate, weight_decay if name in decaying else 0.0), []).append(parameters[name])
    return [
        {"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items() if params
    ]
