"""Checkpoints: find, load and save them, and check that what was loaded is what was asked for."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from torch.nn.functional import linear
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    modeling_utils,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.distributed.utils import is_local_dist_rank_0
from transformers.integrations import is_fsdp_enabled
from transformers.utils import logging as transformers_logging

from latexocr.checkpoint import ADAPTER_CONFIG, HUB_ID, MODEL_CONFIG, read_json
from latexocr.contract import Contract, write_text
from latexocr.errors import InputError
from latexocr.families import Family, families, family_of
from latexocr.host_embedding import keep_on_host
from latexocr.images import ImagePolicy
from latexocr.layers import fuse_rounded_experts
from latexocr.quantization import (
    PACKAGE,
    SMALL_SHARE,
    Quantization,
    check_installed,
    loading_options,
    replaced,
    rounded_share,
    settle,
    stacked_experts_rounded,
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
    offload_embeddings: bool = False,
    for_sharding: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The base model with its weights from safetensors, set to decode greedily.

    Args:
        folder: of the checkpoint.
        dtype: of the weights that are not rounded.
        device: where the weights go; rounded ones are read to where they stay (default: the GPU).
        quantization: how linear layers are rounded; a checkpoint that is stored like that needs none.
        whole: weights that are stored in 4 or 8 bits become whole numbers, for merging.
        offload_embeddings: the table of embeddings is in pinned host memory, see `keep_on_host`; of a model that is
            rounded here it never is on the GPU.
        for_sharding: if FSDP2 is to send them from rank 0, only that rank reads the weights: those of the others are
            any numbers until accelerate has prepared the model.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        InputError: weights are missing from the files or do not fit the configuration, or cannot be rounded here.
    """
    stored = stored_quantization(folder)
    if for_sharding and _sent_by_rank_0() and not (quantization or stored):
        return _with_fast_patches(_to_be_filled(folder, dtype, trust_remote_code))
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    loading = contextlib.ExitStack()
    if quantization:
        check_whole(folder, "quantization")
        check_installed(f"{folder} in {quantization.bits} bits")
        shape = _without_weights(folder, trust_remote_code)
        targets = _to_round(shape, family_in(folder), quantization.parts)
        options |= loading_options(quantization, shape, targets, dtype)
        if "experts" in quantization.parts:
            loading.enter_context(stacked_experts_rounded(targets))
    elif stored == PACKAGE:
        check_installed(f"{folder}, stored in 4 or 8 bits,", "take the whole checkpoint")
    if quantization or stored:
        # no word: by "cpu" transformers means what it does not round
        options["device_map"] = {"": torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))}
        if quantization and offload_embeddings:
            options["device_map"][_table_name(shape)] = "cpu"
            options["quantization_config"].llm_int8_enable_fp32_cpu_offload = True  # accept that map
            # without accelerate's hooks, which would copy it to the GPU in every forward
            loading.enter_context(replaced(vars(modeling_utils), "accelerate_dispatch", lambda *_: None))
    try:
        with no_progress_bars(), loading:
            model, info = AutoModelForImageTextToText.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **options
            )
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        raise InputError(f"{folder}: weights cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"{folder}: {len(missing)} weights are missing from the files, first {missing[0]}")
    model = _with_fast_patches(model)
    if offload_embeddings:
        keep_on_host(model)
    if "device_map" in options:  # the weights are where they belong
        settle(model, dtype)
        fuse_rounded_experts(model)
        if quantization and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            _say_what_is_rounded(model, family_in(folder), quantization)
        return _dequantized(model, dtype) if whole and stored else model
    return model if device is None else model.to(device)


def _to_round(shape: PreTrainedModel, family: Family, parts: Sequence[str]) -> str:
    """The expression of the linear layers in these parts.

    Raises:
        InputError: the head is among them, and it is the table of embeddings as well; or experts that are not there.
    """
    layers = [part for part in parts if part != "head"]
    if "experts" in layers and "experts" not in family.lora_targets:
        raise InputError(f"quantized_parts: {family.name} has no experts; leave experts out")
    targets = [family.target_regex(layers)] if layers else []
    if "head" in parts:
        if _is_tied(shape):
            raise InputError("quantized_parts: the head of this model is its table of embeddings, too; leave head out")
        targets.append(r"\.lm_head")
    return "|".join(targets)


def _table_name(model: PreTrainedModel) -> str:
    table = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is table)


def _is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _say_what_is_rounded(model: PreTrainedModel, family: Family, quantization: Quantization) -> None:
    """Only linear layers are rounded unless one asks for more, and of ERNIE's weights most are stacked experts."""
    share = rounded_share(model)
    logger.info(f"{quantization.bits} bits: {share:.0%} of the weights")
    if share < SMALL_SHARE:
        more = "experts" in family.lora_targets and "experts" not in quantization.parts
        logger.warning(
            f"only {share:.0%} of the weights are in {quantization.bits} bits, so that little memory is saved: the "
            f"others are no linear layers of {' or '.join(quantization.parts)}"
            f"{'; --load_in_4bit true --quantized_parts language experts rounds those of the experts' if more else ''}"
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


def check_untied(folder: Path, option: str, *, trust_remote_code: bool = False) -> None:
    """
    Args:
        folder: of a checkpoint whose table of embeddings is to be kept apart from the GPU.
        option: by which the caller was asked for it.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        InputError: the table is the head, too.
    """
    if _is_tied(_without_weights(folder, trust_remote_code)):
        raise InputError(f"{option}: the table of embeddings in {folder} is its head, too; leave it out")


def _without_weights(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The modules of a checkpoint, without memory for their weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)


def _sent_by_rank_0() -> bool:
    """Whether accelerate fills this rank's model when it is sharded. transformers (5.17 to 5.23) reads the weights on
    every rank all the same: host memory for one model a GPU."""
    return is_fsdp_enabled() and not is_local_dist_rank_0()


def _to_be_filled(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """A checkpoint's model whose weights have the types that they are loaded in, and are on the CPU, where nobody has
    written to them: they have addresses, by which accelerate knows those of the optimiser, and take no memory."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kept = torch.float32 if keeps_float32(model, f"{path}.{name}") else dtype
            setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device="cpu", dtype=kept)))
    model.tie_weights()
    return model


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


def activation_dtype(model: PreTrainedModel) -> torch.dtype:
    """The type in which numbers go from layer to layer. `model.dtype` is that of the first parameter that is no
    integer, and in 4 bits with the embeddings elsewhere that is an adapter's."""
    return model.model.language_model.norm.weight.dtype
