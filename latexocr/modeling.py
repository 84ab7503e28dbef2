"""Checkpoints: find, load, add LoRA, put adapters on, and check that what was loaded is what was asked for."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils import logging as transformers_logging

from latexocr.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, HUB_ID, MODEL_CONFIG, read_json
from latexocr.contract import Contract, fingerprint, write_text
from latexocr.errors import InputError, nearest
from latexocr.families import Family, families, family_of
from latexocr.images import ImagePolicy
from latexocr.new_tokens import add_rows, train_rows
from latexocr.quantization import (
    PACKAGE,
    SMALL_SHARE,
    Quantization,
    check_installed,
    loading_options,
    rounded_share,
    settle,
)

logger = logging.getLogger(__name__)


def _know_hub_names() -> None:
    """Let `save_pretrained` write what it reads: transformers (5.17 to 5.23) adds the prefix of the model's body while
    it loads, and does not take it away again. Delete it when a saved ERNIE begins its names with `vision_model`.
    """
    for family in families():
        for model_type in family.model_types if family.hub_names else ():
            known = get_checkpoint_conversion_mapping(model_type)
            for hub, own in family.hub_names:
                both = [WeightRenaming(rf"^model\.{hub}", own), WeightRenaming(f"^{hub}", own)]  # stock's, the hub's
                known = [*both, *(each for each in known if each.source_patterns != [hub])]
            register_checkpoint_conversion_mapping(model_type, known, overwrite=True)


_know_hub_names()


def resolve_checkpoint(name: str | Path, hub: Literal["modelscope", "huggingface"] = "modelscope") -> Path:
    """The local folder of a checkpoint: a folder as it is, a hub id downloaded (or taken from the hub's cache).

    Raises:
        InputError: neither a folder nor a hub id, or the hub could not deliver.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(str(name)):
        raise InputError(f"{name}: no such folder, and not a hub id of the form organisation/model")
    try:
        if hub == "modelscope":
            from modelscope import snapshot_download
        else:
            from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(name)))
    except Exception as error:  # both hubs raise many kinds; the way out is the same
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name}: no such folder here, and {hub} could not deliver it ({type(error).__name__}: {reason}); "
            "give the path of a downloaded checkpoint, or the other --hub"
        ) from error


def resolve_base(contract: Contract, adapter: Path) -> Path:
    """The folder of the base model that an adapter's `latexocr.json` names.

    Raises:
        InputError: it is not there any more.
    """
    try:
        return resolve_checkpoint(contract.base_model, contract.hub)
    except InputError as error:
        raise InputError(
            f"{adapter / 'latexocr.json'} names the base model {contract.base_model}, which is not to be had here; "
            f"give its place: --model BASE --adapter {adapter}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder.

    Raises:
        InputError: not a checkpoint folder.
    """
    path = folder / MODEL_CONFIG
    if not path.is_file():
        hint = "; it holds an adapter: give it with --adapter" if (folder / ADAPTER_CONFIG).is_file() else ""
        raise InputError(f"{folder}: no config.json, so not a model checkpoint{hint}")
    return read_json(path)


def family_in(folder: Path) -> Family:
    """The family of the checkpoint in `folder`, from `model_type` in its config."""
    return family_of(str(read_config(folder).get("model_type")))


def positions_per_second(folder: Path) -> float:
    """Positions in time that a second of video takes, where the family counts by time (Qwen2.5-VL), else unused."""
    vision = read_config(folder).get("vision_config") or {}
    return float(vision.get("tokens_per_second") or 4)  # 4: default of transformers' configuration class


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Tokenizer, image processor and chat template of a checkpoint.

    Raises:
        InputError: processor files are missing from the folder.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: its processor cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if not hasattr(processor, "image_processor"):
        raise InputError(f"{folder}: processor files are missing (preprocessor_config.json); copy them from the base")
    if processor.chat_template is None:
        raise InputError(f"{folder}: no chat template (chat_template.jinja); copy it from the base model")
    processor.tokenizer.padding_side = "left"  # see FormulaCollator
    return processor


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the device computes in it fast, else float32."""
    on_cuda = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if on_cuda else torch.float32


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers shows bars for work of a second; they drown what matters."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def trusted_placeholders(model: Any) -> Iterator[None]:
    """Features go to their tokens without waits for the GPU: transformers would check that both are equally many, and
    select the tokens to which Qwen3-VL's decoder adds features of the tower's middle layers.

    `latexocr.preprocess` writes the tokens from the same grid.
    """
    inner = inner_model(model).model
    videos = "video_features" in inspect.signature(inner.get_placeholder_mask).parameters  # PaddleOCR-VL reads none
    inner.get_placeholder_mask = functools.partial(_placeholder_masks if videos else _image_mask, inner.config)
    if hasattr(inner.language_model, "_deepstack_process"):
        inner.language_model._deepstack_process = _add_features
    try:
        yield
    finally:
        del inner.get_placeholder_mask
        vars(inner.language_model).pop("_deepstack_process", None)


def _placeholder_masks(
    config: Any, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, length, 1) twice: where image features and where video features belong."""
    return _mask_of(config.image_token_id, input_ids), _mask_of(config.video_token_id, input_ids)


def _image_mask(config: Any, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
    """(batch, length, 1): where image features belong."""
    return _mask_of(config.image_token_id, input_ids)


def _mask_of(token: int, input_ids: torch.Tensor) -> torch.Tensor:
    return (input_ids == token)[..., None].as_subclass(PlaceholderMask)


def _add_features(hidden: torch.Tensor, mask: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Hidden states (batch, length, width) plus features (tokens, width) at the places of the mask (batch, length)."""
    return hidden + _Placed.apply(torch.zeros_like(hidden), mask[..., None], features.to(hidden.dtype))


class PlaceholderMask(torch.Tensor):
    """A mask whose `embeddings.masked_scatter(mask, features)` can be differentiated without waiting for the GPU.

    PyTorch (2.15) selects the gradient of the features by the mask, and asks the GPU how many there are: a step that
    trains the vision tower could not be captured as a CUDA graph.
    """

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.Tensor.masked_scatter:
                return _Placed.apply(*args)
            return function(*args, **(kwargs or {}))


class _Placed(torch.autograd.Function):
    """`torch.Tensor.masked_scatter` for whole rows."""

    @staticmethod
    def forward(ctx: Any, embeddings: torch.Tensor, mask: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Embeddings (batch, length, width) with features (at least as many rows as places, width) in the places of
        the mask (batch, length, 1)."""
        ctx.save_for_backward(mask)
        ctx.num_features = len(features)
        return embeddings.masked_scatter(mask, features)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        (mask,) = ctx.saved_tensors
        numbers = torch.arange(1, ctx.num_features + 1, device=grad.device)
        places = torch.searchsorted(mask.flatten().cumsum(0), numbers)  # beyond the end for features without a place
        rows = torch.nn.functional.pad(grad.flatten(0, 1), (0, 0, 0, 1))
        return grad.masked_fill(mask, 0), None, rows[places]


class PatchEmbedding(torch.nn.Conv3d):
    """A convolution that sees every patch once is a linear layer; as a convolution it is up to thirty times slower."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(patches, channels, time, height, width) of one patch each -> (patches, width, 1, 1, 1)."""
        return linear(patches.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def load_base(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    quantization: Quantization | None = None,
    whole: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The base model with its weights from safetensors, set to decode greedily.

    Args:
        folder: of the checkpoint.
        dtype: of the weights that are not rounded.
        device: where the weights go; rounded ones are read to where they stay (default: the GPU).
        quantization: how linear layers are rounded; a checkpoint that is stored like that needs none.
        whole: weights that are stored in 4 or 8 bits become whole numbers, for merging.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        InputError: weights are missing from the files or do not fit the configuration, or cannot be rounded here.
    """
    stored = stored_quantization(folder)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantization:
        check_whole(folder, "quantization")
        check_installed(f"{folder} in {quantization.bits} bits")
        shape = _without_weights(folder, trust_remote_code)
        options |= loading_options(quantization, shape, _to_round(shape, family_in(folder), quantization.parts), dtype)
    elif stored == PACKAGE:
        check_installed(f"{folder}, stored in 4 or 8 bits,", "take the whole checkpoint")
    if quantization or stored:
        options["device_map"] = {"": device or ("cuda" if torch.cuda.is_available() else "cpu")}
    try:
        with no_progress_bars():
            model, info = AutoModelForImageTextToText.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **options
            )
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        raise InputError(f"{folder}: weights cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"{folder}: {len(missing)} weights are missing from the files, first {missing[0]}")
    model = _with_fast_patches(model)
    if "device_map" in options:  # the weights are where they belong
        settle(model, dtype)
        if quantization and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            _say_what_is_rounded(model, quantization)
        return _dequantized(model, dtype) if whole and stored else model
    return model if device is None else model.to(device)


def _to_round(shape: PreTrainedModel, family: Family, parts: Sequence[str]) -> str:
    """The expression of the linear layers in these parts.

    Raises:
        InputError: the head is among them, and it is the table of embeddings as well.
    """
    layers = [part for part in parts if part != "head"]
    targets = [family.target_regex(layers)] if layers else []
    if "head" in parts:
        if shape.get_output_embeddings().weight is shape.get_input_embeddings().weight:
            raise InputError("quantized_parts: the head of this model is its table of embeddings, too; leave head out")
        targets.append(r"\.lm_head")
    return "|".join(targets)


def _say_what_is_rounded(model: PreTrainedModel, quantization: Quantization) -> None:
    """bitsandbytes rounds linear layers only, and says nothing of all else: of ERNIE's stacked experts, say."""
    share = rounded_share(model)
    logger.info(f"{quantization.bits} bits: {share:.0%} of the weights")
    if share < SMALL_SHARE:
        logger.warning(
            f"only {share:.0%} of the weights are in {quantization.bits} bits, so that little memory is saved: the "
            f"others are no linear layers of {' or '.join(quantization.parts)} (embeddings, stacked experts)"
        )


def _dequantized(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    model = model.dequantize(dtype)
    # transformers (5.23) would try to undo when saving what it did when loading, and cannot
    model._weight_conversions = [
        step
        for step in model._weight_conversions
        if not any(type(operation).__name__.startswith("Bnb") for operation in getattr(step, "operations", []))
    ]
    return model


def stored_quantization(folder: Path) -> str | None:
    """The method by which the weights in `folder` are stored rounded, such as bitsandbytes; None for whole ones."""
    return (read_config(folder).get("quantization_config") or {}).get("quant_method")


def check_whole(folder: Path, option: str) -> None:
    """
    Args:
        folder: of a checkpoint that is to be rounded.
        option: by which the caller was asked for it.

    Raises:
        InputError: its weights are rounded already.
    """
    if stored := stored_quantization(folder):
        raise InputError(f"{folder}: its weights are stored rounded ({stored}) already; leave {option} out")


def _without_weights(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The modules of a checkpoint, without memory for their weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)


def fresh_base(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of the shape that `config.json` in `folder` says, with random weights in float32."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return _with_fast_patches(model)


def _with_fast_patches(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if type(module) is torch.nn.Conv3d and module.stride == module.kernel_size:
            module.__class__ = PatchEmbedding
    return model


def save_for_training(model: PreTrainedModel, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
    """All weights in the type and under the names that they have here: what resuming reads back bit for bit.

    Args:
        model: trained as a whole.
        folder: of the checkpoint.
        state_dict: the weights, where they are not those in `model` (sharded ones have been gathered).
    """
    with no_progress_bars():
        model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)


def keeps_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether the model has this weight in float32 whatever the others are in: a router, whose choices are jumps."""
    words = model._keep_in_fp32_modules_strict or ()
    return any(re.search(rf"(?:^|\.){re.escape(word)}(?:\.|$)", name) for word in words)


def save_for_use(model: PreTrainedModel, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
    """All weights in bfloat16 under the hub's key names: an ordinary checkpoint. Arguments as `save_for_training`."""
    weights = model.state_dict() if state_dict is None else state_dict
    rounded = {  # by address: tied weights stay one
        value.data_ptr(): value if keeps_float32(model, name) else value.bfloat16() for name, value in weights.items()
    }
    state_dict = {name: rounded[value.data_ptr()] for name, value in weights.items()}
    with no_progress_bars():
        model.save_pretrained(folder, state_dict=state_dict, save_original_format=True)
    path = folder / MODEL_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:  # save_pretrained writes the type of the weights in memory
        part.update({"dtype": "bfloat16"} if "dtype" in part else {})
    write_text(path, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def save_processor(processor: Any, folder: Path, policy: ImagePolicy) -> None:
    """Beside a whole model: for vLLM and others that prepare pictures by the checkpoint's own settings.

    Their minimum is then ours: by Qwen2-VL's, 56 x 56 pixels, a small formula would be six visual tokens. What mode
    "fixed" does cannot be said there.
    """
    image_processor = processor.image_processor
    if policy.mode == "fit" and "shortest_edge" in dict(image_processor.size):
        edges = {"shortest_edge": policy.min_visual_tokens, "longest_edge": policy.max_visual_tokens}
        sizes = {name: tokens * policy.cell**2 for name, tokens in edges.items()}
        image_processor.size = type(image_processor.size)(**sizes)
    processor.save_pretrained(folder)


def greedy_config(processor: Any, family: Family) -> GenerationConfig:
    """Plain greedy decoding up to the family's end token, or up to the tokenizer's own, with which an untrained base
    of a family whose template writes another one ends.

    Published checkpoints carry sampling settings and a repetition penalty meant for chat; a penalty ruins formulas,
    whose tokens repeat by nature.
    """
    tokenizer = processor.tokenizer
    end_id = tokenizer.convert_tokens_to_ids(family.end_token)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_id
    ends = end_id if tokenizer.eos_token_id in (None, end_id) else [end_id, tokenizer.eos_token_id]
    return GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=pad_id, repetition_penalty=1.0)


def inner_model(model: Any) -> Any:
    """The transformers model inside an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


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
        parameters = {name for name, _ in model.named_parameters() if matches(f".{name}")}
        if not found | parameters:
            raise InputError(f"no layer of this model matches the {family.name} component {component!r}")
        layers, stacked = layers | found, stacked | parameters
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
    return get_peft_model(model, config)


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
            parameters[part] += parameter.numel()
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
