"""Base weights in 4 or 8 bits: which layers, in what way, and what must be installed for it.

QLoRA (arXiv:2305.14314): frozen weights are kept as NF4, whose scales are themselves kept in 8 bits ("double
quantisation"), 0.516 bytes a weight in all; they become 16-bit numbers when a layer computes, and the adapter is
trained as always. 8 bits: LLM.int8 (arXiv:2208.07339). bitsandbytes does both, and has kernels for the CPU too.

Only linear layers inside the named parts are rounded: the decoder by default. The vision tower, its merger and the
head are a small share of the memory and the first to lose accuracy. Experts that are stacked in one parameter, which
transformers and bitsandbytes leave as they are, can be in 4 bits, too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from latexocr.errors import InputError

if TYPE_CHECKING:
    import torch

ROUNDABLE = ("language", "vision", "merger", "head", "experts")
SMALL_SHARE = 0.5  # of the weights that are rounded: with less there is little to be had in exchange for accuracy
PACKAGE = "bitsandbytes"
STOCK = "bitsandbytes_4bit"  # by which transformers finds what rounds
_LOADING = threading.RLock()  # one model at a time is loaded with something of transformers replaced
INSTALL = f"pip install '{PACKAGE}>=0.46.1'"  # what transformers 5 asks for


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a base model are rounded when it is loaded.

    Args:
        bits: 4 (NF4 with double quantisation) or 8 (LLM.int8).
        parts: of the model whose linear layers are rounded: language, vision, merger, head; and in 4 bits experts.
    """

    bits: Literal[4, 8] = 4
    parts: tuple[str, ...] = ("language",)

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in ROUNDABLE]
        if unknown or not self.parts:
            given = f"{unknown[0]!r} is none of" if unknown else "is empty: name at least one of"
            raise InputError(f"quantized_parts: {given} {list(ROUNDABLE)}")
        if self.bits == 8 and "experts" in self.parts:
            raise InputError("quantized_parts: experts are no layers, and can be in 4 bits only: add load_in_4bit")

    def __str__(self) -> str:
        return f"{self.bits}-bit {', '.join(self.parts)}"


def check_installed(what: str, otherwise: str = "leave it out") -> None:
    """
    Raises:
        InputError: `what` was asked for and bitsandbytes is not there.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise InputError(f"{what} needs {PACKAGE}, which is not installed: {INSTALL}; or {otherwise}")


def loading_options(
    quantization: Quantization, shape: torch.nn.Module, targets: str, dtype: torch.dtype
) -> dict[str, Any]:
    """What `from_pretrained` is told to round the weights while it reads them.

    Args:
        quantization: which parts, how.
        shape: the model without its weights (on the meta device).
        targets: expression of the linear layers to round.
        dtype: in which the layers compute.
    """
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=quantization.bits == 4,
            load_in_8bit=quantization.bits == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept_modules(shape, targets),
        )
    }


@contextlib.contextmanager
def stacked_experts_rounded(targets: str) -> Iterator[None]:
    """Let `from_pretrained` put stacked experts in 4 bits, too, one by one while it reads them.

    transformers (5.17 to 5.23) rounds the weights of linear layers only, and has no other way in than the class that
    stands in its table.

    Args:
        targets: expression of the parameters' paths.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    class Rounding(Bnb4bitQuantize):
        def convert(self, input_dict: dict[str, Any], *, model: Any, **more: Any) -> dict[str, Any]:
            found = {}
            for name, given in input_dict.items():
                if isinstance(model.get_submodule(name.rpartition(".")[0]), Linear4bit):
                    found |= super().convert({name: given}, model=model, **more)
                else:
                    value = given[0] if isinstance(given, list) else given
                    found[name] = Params4bit(value, quant_type="nf4").to(value.device)
            return found

    class Quantizer(Bnb4BitHfQuantizer):
        def param_needs_quantization(self, model: Any, param_name: str, **more: Any) -> bool:
            stacked = re.fullmatch(targets, f".{param_name}") is not None
            return stacked or super().param_needs_quantization(model, param_name, **more)

        def get_quantize_ops(self) -> Rounding:
            return Rounding(self)

    with replaced(auto.AUTO_QUANTIZER_MAPPING, STOCK, Quantizer):
        yield


@contextlib.contextmanager
def replaced(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """Let `from_pretrained` find something of ours under a name, in a table or the `vars` of a module."""
    with _LOADING:
        before, names[name] = names[name], value
        try:
            yield
        finally:
            names[name] = before


def kept_modules(model: torch.nn.Module, targets: str, name: str = "") -> list[str]:
    """The fewest module names that cover all linear layers except those that `targets` matches."""
    import torch

    found = []
    for child_name, child in model.named_children():
        path = f"{name}.{child_name}" if name else child_name
        linear = [inner for inner, part in child.named_modules(prefix=path) if isinstance(part, torch.nn.Linear)]
        rounded = [inner for inner in linear if re.fullmatch(targets, f".{inner}")]
        if linear and not rounded:
            found.append(path)
        elif len(rounded) < len(linear):
            found += kept_modules(child, targets, path)
    return found


def settle(model: Any, dtype: torch.dtype) -> None:
    """Let 4-bit layers compute in `dtype`, whatever a checkpoint that was stored in 4 bits says.

    On CPUs with AVX512-BF16 bitsandbytes (0.50) packs the weights anew at the first evaluation, in a form that has no
    gradient: off.
    """
    for module in model.modules():
        if hasattr(module, "compute_dtype") and hasattr(module, "quant_state"):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            module.support_avx512bf16_for_cpu = False


def whole_beside(
    layer: Any, b: torch.Tensor, *, before: int = 0, behind: int = 0, rows: slice | None = None
) -> torch.Tensor:
    """W|0|B|0 (rows, in + before + r + behind) of a 4-bit layer, in the type of B.

    Args:
        layer: of bitsandbytes.
        b: (rows, r) what stands beside the layer's weights; r may be 0.
        before: columns of zeros between W and B.
        behind: columns of zeros after B.
        rows: of W (default: all).
    """
    import torch
    from torch.nn.functional import pad

    rows = rows or slice(0, layer.out_features)
    if kernel := _kernel(layer.weight):
        return kernel(layer.weight.data, layer.weight.quant_state, b, before, behind, rows.start)
    return torch.cat([weights(layer, b.dtype)[rows], pad(b, (before, behind))], dim=1)


def is_rounded(parameter: torch.nn.Parameter | None) -> bool:
    """Whether a parameter is in 4 bits."""
    return getattr(parameter, "quant_state", None) is not None


def weights(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """(out, in) numbers of a 4-bit layer."""
    return whole(layer.weight).to(dtype)


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The numbers of a parameter in 4 bits, in the shape and the type that it had."""
    packed, state = parameter.data, parameter.quant_state
    if kernel := _kernel(parameter):
        nothing = packed.new_empty(state.shape[:-1].numel(), 0, dtype=state.dtype)
        return kernel(packed, state, nothing, 0, 0).view(state.shape)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state)


def _kernel(parameter: torch.nn.Parameter) -> Callable[..., torch.Tensor] | None:
    """`nf4.whole_beside`, where it takes this parameter."""
    if parameter.is_cuda and _has_triton():
        from latexocr import nf4

        if nf4.takes(parameter.quant_state):
            return nf4.whole_beside
    return None


@cache
def _has_triton() -> bool:
    """Asked by every layer of every step."""
    return importlib.util.find_spec("triton") is not None


def rounded_share(model: torch.nn.Module) -> float:
    """The share of a model's weights that are in 4 or 8 bits."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[not parameter.is_floating_point()] += num_weights(parameter)
    return counts[True] / sum(counts.values())


def num_weights(parameter: torch.nn.Parameter) -> int:
    """How many weights a parameter holds: two share a byte in 4 bits, and a shard of ZeRO-3 knows the whole."""
    if is_rounded(parameter):
        return parameter.quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())
