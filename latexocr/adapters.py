"""What is trained: LoRA on named components, or a model with frozen parts; and trained adapters on their bases."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from transformers import PreTrainedModel

from latexocr.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG
from latexocr.contract import Contract, fingerprint
from latexocr.errors import InputError, nearest
from latexocr.families import Family, family_of
from latexocr.modeling import inner_model, read_config
from latexocr.new_tokens import add_rows, train_rows
from latexocr.quantization import is_rounded, num_weights


def add_lora(
    model: PreTrainedModel,
    family: Family,
    *,
    components: list[str],
    r: int,
    alpha: int,
    dropout: float,
    pattern: str | None = None,
    **variant: Any,
) -> PeftModel:
    """Wrap `model` with fresh LoRA adapters on the linear layers (or stacked experts) of the named components.

    Args:
        model: the base.
        family: tells what the components are.
        components: parts, kinds, or parts of parts; see `Family.targets`.
        r: rank.
        alpha: scale.
        dropout: before the adapter.
        pattern: in place of the components, a regular expression over whole paths of layers.
        variant: further fields of `peft.LoraConfig`.

    Raises:
        InputError: an unknown component, or one in which nothing matches.
    """
    if r < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise InputError(
            f"lora_r {r}, lora_alpha {alpha}, lora_dropout {dropout}: needs r >= 1, alpha > 0, 0 <= dropout < 1"
        )
    if pattern is not None:
        _check_pattern(model, family, pattern)
    layers: set[str] = set()
    stacked: set[str] = set()  # experts in one parameter, which is no layer
    for component in [] if pattern else components:
        matches = re.compile(family.target_regex([component])).fullmatch
        found = {name for name, _ in model.named_modules() if matches(f".{name}")}
        parameters = {name: each for name, each in model.named_parameters() if matches(f".{name}")}
        if any(map(is_rounded, parameters.values())):
            raise InputError(
                f"{component} of {family.name} in 4 bits cannot be adapted: leave experts out of quantized_parts or "
                "of lora_components"
            )
        if not found | parameters.keys():
            raise InputError(f"no layer of this model matches the {family.name} component {component!r}")
        layers, stacked = layers | found, stacked | parameters.keys()
    if stacked and (dropout or variant.get("use_dora")):
        raise InputError(
            f"{' '.join(components)} of {family.name} names experts that are stacked in one parameter, where neither "
            "dropout nor DoRA is possible: --lora_dropout 0 --use_dora false"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=pattern or (family.target_regex(components) if layers else None),
        target_parameters=sorted(stacked) or None,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        **variant,
    )
    with _old_names():
        return get_peft_model(model, config)


@contextmanager
def _old_names() -> Iterator[None]:
    """peft 0.21 asks transformers 5.23 for `is_gradient_checkpointing`, which is not the user's to mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _check_pattern(model: PreTrainedModel, family: Family, pattern: str) -> None:
    modules = dict(model.named_modules())
    matches = _expression(pattern, "lora_pattern").fullmatch
    found = [name for name in modules if matches(name)]
    for name in found:
        if not isinstance(modules[name], torch.nn.Linear):
            raise InputError(f"lora_pattern {pattern!r} also matches {name or 'the whole model'}, no linear layer")
    if not found:
        linear = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
        shapes = dict.fromkeys(re.sub(r"\b\d+\b", r"\\d+", name) for name in linear)
        raise InputError(
            f"lora_pattern {pattern!r} matches no layer of {family.name}"
            f"{nearest(pattern, shapes, cutoff=0.4) or f'; layers are called like {linear[0]}'}"
        )


def freeze(model: PreTrainedModel, family: Family, patterns: list[str]) -> None:
    """Train all of `model` but what a pattern names: frozen parts of a model are not differentiated.

    Args:
        model: as loaded.
        family: tells the parts.
        patterns: parts (`Family.parts`), or regular expressions found in the parameters' names.

    Raises:
        InputError: a pattern that matches nothing, or nothing is left.
    """
    model.requires_grad_(True)
    names = dict(model.named_parameters())
    for pattern in [*patterns, *family.never_trained]:
        is_part, search = pattern in family.parts, _expression(pattern, "freeze").search
        found = [name for name in names if (family.part_of(name) == pattern if is_part else search(name))]
        if not found:
            words = dict.fromkeys(word for name in names for word in name.split(".") if not word.isdigit())
            known = [*family.parts, *words]
            raise InputError(f"freeze: {pattern!r} matches no parameter of {family.name}{nearest(pattern, known)}")
        for name in found:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise InputError(f"freeze: {' '.join(patterns)} leave nothing to train")


def _expression(pattern: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"{option}: {pattern!r} is no regular expression ({error})") from error


def trainable_parameters(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Where the trainable parameters sit: part of the model -> (number of parameters, number of modules)."""
    family = family_of(inner_model(model).config.model_type)
    parameters: Counter[str] = Counter()
    modules: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = family.part_of(name)
            parameters[part] += num_weights(parameter)
            modules.setdefault(part, set()).add(name.split(".lora_")[0])
    return {part: (count, len(modules[part])) for part, count in parameters.items()}


def load_adapter(model: PreTrainedModel, adapter: Path, base_folder: Path) -> PeftModel:
    """Put a trained adapter on its base, checked: right base, every tensor there, none left over.

    An adapter whose keys do not match loads as nothing without an error, so the keys are compared here.

    Raises:
        InputError: not an adapter folder, an adapter for another base, or tensors that do not fit.
    """
    contract = check_adapter(adapter)
    if contract is not None and fingerprint(base_folder) != contract.base_fingerprint:
        raise InputError(
            f"{adapter}: trained on another base model ({contract.base_model}, {contract.model_type}), "
            f"given {base_folder} ({read_config(base_folder).get('model_type')})"
        )
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    new_tokens = itertools.chain.from_iterable((config.get("trainable_token_indices") or {}).values())
    add_rows(model, max(new_tokens, default=-1) + 1)
    try:
        with _old_names():
            peft_model = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{adapter}: does not fit {base_folder} ({' '.join(str(error).split())[:300]})") from error
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        saved = set(file.keys())
    expected = set(get_peft_model_state_dict(peft_model))
    if saved != expected:
        first = sorted(saved ^ expected)[0]
        raise InputError(f"{adapter}: {len(saved ^ expected)} tensors do not fit {base_folder}, first {first}")
    train_rows(peft_model)
    return peft_model


@torch.no_grad()
def take_rounded(model: torch.nn.Module, rounded: torch.nn.Module) -> None:
    """Give the linear layers of `model` the values of those that are in 4 or 8 bits in `rounded`."""
    whole = dict(model.named_modules())
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.is_floating_point():
            whole[name].weight.copy_(dequantize_module_weight(module))


def check_adapter(adapter: Path) -> Contract | None:
    """The contract of an adapter folder, None for an adapter that this library did not write.

    Raises:
        InputError: not an adapter folder.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter / name).is_file():
            whole = (adapter / MODEL_CONFIG).is_file()
            hint = "a whole model, which --model takes as it is" if whole else "a checkpoint-N folder or adapter/ is"
            raise InputError(f"{adapter}: no {name}, so not an adapter folder ({hint})")
    return Contract.load(adapter)
