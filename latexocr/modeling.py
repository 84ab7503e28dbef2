"""Checkpoints: find, load, add LoRA, put adapters on, and check that what was loaded is what was asked for."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from latexocr.contract import Contract, fingerprint, write_text
from latexocr.errors import InputError
from latexocr.families import Family, family_of

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL_WEIGHTS = "config.json", "model.safetensors"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
logger = logging.getLogger(__name__)


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
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: malformed JSON ({error})") from error


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
    """Without transformers' check that image tokens and features are equally many: it waits for the GPU.

    `latexocr.preprocess` writes the tokens from the same grid.
    """
    inner = inner_model(model).model
    inner.get_placeholder_mask = functools.partial(_placeholder_masks, inner.config)
    try:
        yield
    finally:
        del inner.get_placeholder_mask


def _placeholder_masks(
    config: Any, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, length, 1) twice: where image features and where video features belong."""
    tokens = (config.image_token_id, config.video_token_id)
    return tuple((input_ids == token)[..., None].as_subclass(PlaceholderMask) for token in tokens)


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
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The base model with its weights from safetensors, set to decode greedily.

    Raises:
        InputError: weights are missing from the files or do not fit the configuration.
    """
    try:
        with no_progress_bars():
            model, info = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, RuntimeError) as error:
        raise InputError(f"{folder}: weights cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"{folder}: {len(missing)} weights are missing from the files, first {missing[0]}")
    model = _with_fast_patches(model)
    return model if device is None else model.to(device)


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


def save_for_use(model: PreTrainedModel, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
    """All weights in bfloat16 under the hub's key names: an ordinary checkpoint. Arguments as `save_for_training`."""
    weights = model.state_dict() if state_dict is None else state_dict
    rounded = {value.data_ptr(): value.bfloat16() for value in weights.values()}  # tied weights stay one
    state_dict = {name: rounded[value.data_ptr()] for name, value in weights.items()}
    with no_progress_bars():
        model.save_pretrained(folder, state_dict=state_dict, save_original_format=True)
    path = folder / MODEL_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:  # save_pretrained writes the type of the weights in memory
        part.update({"dtype": "bfloat16"} if "dtype" in part else {})
    write_text(path, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def greedy_config(processor: Any, family: Family) -> GenerationConfig:
    """Plain greedy decoding up to the family's end token.

    Published checkpoints carry sampling settings and a repetition penalty meant for chat; a penalty ruins formulas,
    whose tokens repeat by nature.
    """
    tokenizer = processor.tokenizer
    end_id = tokenizer.convert_tokens_to_ids(family.end_token)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_id
    return GenerationConfig(do_sample=False, eos_token_id=end_id, pad_token_id=pad_id, repetition_penalty=1.0)


def inner_model(model: Any) -> Any:
    """The transformers model inside an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def add_lora(
    model: PreTrainedModel, family: Family, *, components: list[str], r: int, alpha: int, dropout: float
) -> PeftModel:
    """Wrap `model` with fresh LoRA adapters on the linear layers of the named components.

    Raises:
        InputError: an unknown component, or one in which nothing matches.
    """
    if r < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise InputError(
            f"lora_r {r}, lora_alpha {alpha}, lora_dropout {dropout}: needs r >= 1, alpha > 0, 0 <= dropout < 1"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=family.target_regex(components),
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
    )
    for component in components:
        if not any(re.fullmatch(family.lora_targets[component], f".{name}") for name, _ in model.named_modules()):
            raise InputError(f"no layer of this model matches the {family.name} component {component!r}")
    return get_peft_model(model, config)


def trainable_parameters(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Where the trainable parameters sit: part of the model -> (number of parameters, number of modules)."""
    parameters: Counter[str] = Counter()
    modules: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "vision" if ".visual." in name else "language" if ".language_model." in name else "other"
            if ".visual." in name and "merger" in name:
                part = "merger"
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
    return peft_model


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
