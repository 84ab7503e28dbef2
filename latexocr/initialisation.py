"""How adapters begin: PiSSA and LoftQ, and plain LoRA files of adapters that began so.

PiSSA (arXiv:2404.02948) moves the r largest singular values of W into the adapter and trains what matters most:
W = W' + s B0 A0, with s = lora_alpha / r; W' stays frozen. What was learnt is s (B A - B0 A0) on top of W: an adapter
of twice the rank, [B, -B0] [A; A0]. It is written like that, so it fits the original base, in any program; and as it
holds A, B, A0 and B0, training goes on from it.

LoftQ (arXiv:2310.08659) begins with what rounding to 4 bits lost, s B0 A0 = W - Q up to rank r, so that training
starts near the unrounded model. The rounded base itself stays as anybody rounds it, and the adapter fits it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file

from latexocr.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from latexocr.contract import write_text
from latexocr.errors import InputError
from latexocr.lora import ADAPTER

ITERATIONS = 16  # of the randomised decomposition; PiSSA's authors find 16 as good as an exact one
FULL_BELOW = 4  # times the rank: a matrix this small is decomposed exactly, which costs nothing there

Tensors = dict[str, torch.Tensor]


@torch.no_grad()
def pissa(model: PeftModel, checkpoint: Path | None = None, device: torch.device | str = "cpu") -> Tensors:
    """Begin every adapter with the main part of its weight, which the weight loses.

    Args:
        model: with fresh adapters.
        checkpoint: of a run that goes on: it began with the A0 and B0 that are in there.
        device: where matrices are decomposed.

    Returns:
        A0 and B0 under the names of the adapter's file, on the CPU.
    """
    if any(_is_rounded(layer) for _, layer in _lora_layers(model)):
        raise InputError("lora_init pissa changes weights, which rounded ones cannot: take --lora_init loftq there")
    saved = load_file(checkpoint / ADAPTER_WEIGHTS) if checkpoint else None
    start: Tensors = {}
    for name, layer in _lora_layers(model):
        base, scaling, r = layer.get_base_layer(), layer.scaling[ADAPTER], layer.r[ADAPTER]
        weight = base.weight.to(device, torch.float32)
        if saved is None:
            a, b = _decomposed(weight, r, scaling, name)
        else:
            a, b = saved[f"{name}.lora_A.weight"][r:].to(device), -saved[f"{name}.lora_B.weight"][:, r:].to(device)
        base.weight.copy_(weight - scaling * (b @ a))
        _set(layer, a, b)
        start |= {f"{name}.lora_A.weight": a.cpu(), f"{name}.lora_B.weight": b.cpu()}
    return start


@torch.no_grad()
def loftq(model: PeftModel, exact: torch.nn.Module, device: torch.device | str = "cpu") -> None:
    """Begin every adapter on a rounded weight with what rounding has lost; others begin as usual.

    Args:
        model: with rounded weights and fresh adapters.
        exact: the base before rounding.
        device: where matrices are decomposed.
    """
    for name, layer in _lora_layers(model):
        if _is_rounded(layer):
            weight = exact.get_submodule(name.removeprefix("base_model.model.")).weight
            rounded = dequantize_module_weight(layer.get_base_layer())
            lost = weight.to(device, torch.float32) - rounded.to(device, torch.float32)
            _set(layer, *_decomposed(lost, layer.r[ADAPTER], layer.scaling[ADAPTER], name))


def _is_rounded(layer: LoraLayer) -> bool:
    return not layer.get_base_layer().weight.is_floating_point()


def _lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            raise InputError(
                f"lora_init pissa and loftq are for layers, and {name} holds stacked experts: leave it out"
            )
        if isinstance(module, LoraLayer):
            yield name, module


def _decomposed(weight: torch.Tensor, r: int, scaling: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r), `scaling` times whose product is next to `weight` (out, in)."""
    if r > min(weight.shape):
        raise InputError(f"lora_r {r} is above the {min(weight.shape)} singular values of {name}; take a smaller one")
    if min(weight.shape) <= FULL_BELOW * r:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=ITERATIONS)
        vh = v.T
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def _set(layer: LoraLayer, a: torch.Tensor, b: torch.Tensor) -> None:
    layer.lora_A[ADAPTER].weight.copy_(a)
    layer.lora_B[ADAPTER].weight.copy_(b)


def write_difference(folder: Path, start: Tensors) -> None:
    """Rewrite the adapter in `folder`, trained on top of `pissa`'s base, as plain LoRA for the original base."""
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    for name, initial in start.items():
        if ".lora_A." in name:
            tensors[name] = torch.cat([tensors[name], initial.to(tensors[name])])
        else:
            tensors[name] = torch.cat([tensors[name], -initial.to(tensors[name])], dim=1)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["r"] *= 2
    config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2  # the same scaling
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_difference(model: PeftModel, folder: Path, start: Tensors) -> None:
    """Put A and B of an adapter that `write_difference` wrote back into the model that it was trained in."""
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    for name, initial in start.items():
        tensors[name] = tensors[name][: len(initial)] if ".lora_A." in name else tensors[name][:, : initial.shape[1]]
    set_peft_model_state_dict(model, tensors)
