"""What an optimiser is given: learning rates by part of the model and for the second matrix of each adapter (LoRA+),
and parameters that are stepped together.

Why: a vision tower and embeddings that are right already need smaller steps than the rest, new tokens larger ones; and
B, which begins at zero, should learn faster than A (LoRA+, arXiv:2402.12354).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
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
            raise InputError(
                f"learning_rates: {part} is not trained here ({trained}); {_to_train(part, family, options)}"
            )
        if not (0 <= rate < math.inf):
            raise InputError(f"learning_rates: {part} is {rate}, needs a number from 0")
    ratio = options.loraplus_lr_ratio or 1.0
    return {
        name: options.learning_rates.get(part, options.learning_rate) * (ratio if ".lora_B." in name else 1.0)
        for name, part in parts.items()
    }


def _to_train(part: str, family: Family, options: TrainOptions) -> str:
    if part == "new_tokens":
        return "leave it out, or name them: --new_tokens"
    if options.finetuning == "full":
        return "leave it out, or take it out of --freeze"
    if options.lora_pattern:
        return "leave it out, or train it: a wider --lora_pattern, or --finetuning full"
    adapted = part in (word for key in family.lora_targets for word in key.split("."))
    components = f"--lora_components {' '.join([*options.lora_components, part])}, or " if adapted else ""
    return f"leave it out, or train it: {components}--finetuning full"


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


@dataclass(frozen=True)
class Flat:
    """One parameter of an optimiser whose parts are parameters of a model.

    Args:
        whole: what the optimiser steps, (elements,).
        parts: the model's, one behind the other.
    """

    whole: torch.nn.Parameter
    parts: list[torch.nn.Parameter]


def flatten(optimizer: torch.optim.Optimizer) -> list[Flat]:
    """Make each group one parameter, of which those that were in it become views.

    Why: bitsandbytes steps one parameter after the other, 0.1 ms of the host's time each, and adapters have hundreds.
    Gradients have to lie in one tensor likewise, see `latexocr.graphs.GradientBuffer`.

    Args:
        optimizer: before its first step; it does the same to every element, whatever its parameter's shape.
    """
    import torch

    flats = []
    for group in optimizer.param_groups:
        parts = group["params"]
        if not parts:
            continue
        whole = torch.nn.Parameter(torch.cat([part.data.flatten() for part in parts]))
        for part, values in zip(parts, whole.data.split([part.numel() for part in parts]), strict=True):
            part.data = values.view_as(part)
        group["params"] = [whole]
        flats.append(Flat(whole, parts))
    return flats
