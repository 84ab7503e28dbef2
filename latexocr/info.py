"""What a folder of weights is: family, parameters, adapter, prompt, image policy, training, scores.

Read from headers and JSON files alone, without torch, so that the answer is there at once for a model of any size.
"""

from __future__ import annotations

import json as json_module
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from latexocr.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AVERAGE_WEIGHTS,
    MODEL_CONFIG,
    TensorHeader,
    read_json,
    tensor_headers,
)
from latexocr.contract import Contract
from latexocr.errors import InputError
from latexocr.families import Family, families

# What bitsandbytes stores beside a quantised weight, by the end of the tensor's name.
QUANTISATION_STATE = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$|quant_state\."
)
# Two parameters of 4 bits stand in one byte.
PACKED = {"U8": 2}
TYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "U8": "4-bit", "I8": "8-bit"}
# An adapted layer's tensors, with and without the adapter's name.
LORA_TENSOR = re.compile(
    r"^base_model\.model\.(.+?)\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\b|token_)"
)
# Of an evaluation's figures, those that a reader of one line wants.
SCORES = (
    "eval_loss",
    "eval_exact_match",
    "eval_field_match",
    "eval_json_rate",
    "eval_exact_match_level2",
    "eval_edit_distance",
    "eval_bleu",
)


@dataclass(frozen=True)
class Info:
    """What `latexocr info` says; `to_json` has the same as JSON.

    Args:
        folder: where it is.
        kind: adapter or model.
        family: name of the model family, None when it is none of ours.
        model_type: `config.model_type` of the model or of the adapter's base.
        parameters: number of weights in the folder: the adapter's own for an adapter.
        size_bytes: of the files that hold them.
        weight_type: type of most of them.
        lora: for an adapter its rank, alpha, dropout, variants, and how many layers of which part have one.
        base_model: what it was trained from.
        contract: the folder's `latexocr.json`, None without one.
    """

    folder: Path
    kind: str
    family: str | None
    model_type: str | None
    parameters: int
    size_bytes: int
    weight_type: str
    lora: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    contract: Contract | None = None

    @property
    def training(self) -> dict[str, Any]:
        """Facts about the run, `{}` when nothing is known."""
        return self.contract.training if self.contract else {}

    @property
    def options(self) -> dict[str, Any]:
        """What was trained and how; what is off or empty is left out."""
        options = self.training.get("recipe", {}) | self.training.get("options", {})
        return {name: value for name, value in options.items() if value or (value == 0 and value is not False)}

    @property
    def scores(self) -> dict[str, float]:
        """The validation of these very weights, by metric without `eval_`."""
        evaluation = self.training.get("evaluation", {})
        return {name.removeprefix("eval_"): evaluation[name] for name in SCORES if name in evaluation}

    @property
    def quantised(self) -> bool:
        """Whether its weights are stored in 4 or 8 bits."""
        return self.weight_type in ("4-bit", "8-bit")

    def to_json(self) -> str:
        """Everything, `latexocr.json` included, as a JSON object."""
        values = {**asdict(self), "folder": str(self.folder), "scores": self.scores}
        return json_module.dumps(values, ensure_ascii=False, indent=2)

    def rows(self) -> list[tuple[str, str]]:
        """Name and text of each line that is known, for `__str__` and the model card."""
        what = f"{self.parameters:,} parameters, {self.weight_type}, {self.size_bytes / 1e6:,.1f} MB"
        found = [("weights", what)]
        if self.base_model:
            found.append(("base model", self.base_model))
        if self.lora:
            found.append(("adapter", _lora_text(self.lora)))
        if self.contract:
            found += [
                ("prompt", self.contract.prompt),
                ("pictures", self.contract.image_policy.describe()),
                ("end token", self.contract.end_token),
            ]
        if "train_json" in self.training:
            found.append(("trained on", training_text(self.training)))
        if self.options:
            found.append(("options", ", ".join(option_texts(self.options))))
        if self.scores:
            found.append(("scores", ", ".join(f"{name} {value:.4g}" for name, value in self.scores.items())))
        if self.contract:
            found.append(("versions", ", ".join(" ".join(item) for item in self.contract.versions.items())))
        return found

    def __str__(self) -> str:
        family = f"{self.family} ({self.model_type})" if self.family else self.model_type or "unknown"
        what = "adapter for" if self.kind == "adapter" else "model of"
        return "\n".join(
            [f"{self.folder}: {what} the family {family}", *(f"{name:<12}{text}" for name, text in self.rows())]
        )


def inspect(folder: Path) -> Info:
    """What an adapter's, a model's or a run's folder is; of a run its adapter or model.

    Raises:
        InputError: none of them.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    for inner in ("adapter", "model"):
        if (folder / inner).is_dir():
            return inspect(folder / inner)
    if (folder / ADAPTER_CONFIG).is_file():
        return _adapter(folder)
    if (folder / MODEL_CONFIG).is_file():
        return _model(folder)
    raise InputError(
        f"{folder}: neither {ADAPTER_CONFIG} nor {MODEL_CONFIG}, so neither an adapter nor a model; "
        "give an adapter/, a model/, a checkpoint-N/ or a run's folder"
    )


def _adapter(folder: Path) -> Info:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise InputError(f"{folder}: no {ADAPTER_WEIGHTS}, so not a whole adapter; copy it again")
    contract, config, tensors = Contract.load(folder), read_json(folder / ADAPTER_CONFIG), list(tensor_headers(path))
    family = _family_of(contract.model_type) if contract else None
    variants = [name for name in ("use_rslora", "use_dora") if config.get(name)]
    start = config.get("init_lora_weights")
    lora = {
        "r": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout"),
        "variants": [*(name.removeprefix("use_") for name in variants), *([start] if isinstance(start, str) else [])],
        "layers": _layers(tensors, family),
    }
    return _info(
        folder, "adapter", family, tensors, [path], lora=lora, contract=contract,
        base_model=contract.base_model if contract else config.get("base_model_name_or_path"),
        model_type=contract and contract.model_type,
    )  # fmt: skip


def _model(folder: Path) -> Info:
    paths = sorted(path for path in folder.glob("*.safetensors") if path.name != AVERAGE_WEIGHTS)
    if not paths:
        raise InputError(f"{folder}: no *.safetensors weights (other formats are not read)")
    contract, config = Contract.load(folder), read_json(folder / MODEL_CONFIG)
    tensors = [tensor for path in paths for tensor in tensor_headers(path)]
    model_type = config.get("model_type")
    return _info(
        folder, "model", _family_of(model_type), tensors, paths, contract=contract,
        base_model=contract and contract.base_model, model_type=model_type,
    )  # fmt: skip


def _info(
    folder: Path, kind: str, family: Family | None, tensors: list[TensorHeader], paths: list[Path], **known: Any
) -> Info:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if not QUANTISATION_STATE.search(tensor.name):
            counts[tensor.dtype] += _numel(tensor.shape) * PACKED.get(tensor.dtype, 1)
    most = max(counts, key=lambda name: counts[name], default="none")
    return Info(
        folder=folder,
        kind=kind,
        family=family and family.name,
        parameters=sum(counts.values()),
        size_bytes=sum(path.stat().st_size for path in paths),
        weight_type=TYPE_NAMES.get(most, most),
        **known,
    )


def _numel(shape: Iterable[int]) -> int:
    number = 1
    for size in shape:
        number *= size
    return number


def _layers(tensors: list[TensorHeader], family: Family | None) -> dict[str, int]:
    """How many adapted layers each component of the family has; `other` for those that none of them names."""
    matches = (LORA_TENSOR.match(tensor.name) for tensor in tensors)
    names = {match.group(1) for match in matches if match}
    patterns = family.lora_targets if family else {}
    counts: Counter[str] = Counter()
    for name in names:
        counts[next((part for part, pattern in patterns.items() if re.fullmatch(pattern, f".{name}")), "other")] += 1
    return {part: counts[part] for part in (*patterns, "other") if counts[part]}


def _family_of(model_type: str | None) -> Family | None:
    return next((family for family in families() if model_type in family.model_types), None)


def _lora_text(lora: dict[str, Any]) -> str:
    layers = ", ".join(f"{part} {number}" for part, number in lora["layers"].items())
    variants = "".join(f", {name}" for name in lora["variants"])
    return f"r {lora['r']}, alpha {lora['alpha']}, dropout {lora['dropout']}{variants}; layers: {layers}"


def training_text(training: dict[str, Any]) -> str:
    """One line: file, records, step."""
    text = training.get("train_json", "unnamed file")
    if training.get("train_records") is not None:  # not counted where they are streamed
        text += f": {training['train_records']:,} records"
    if training.get("dropped"):
        text += f", {training['dropped']:,} more left out as overlong"
    if "val_json" in training:
        text += f"; validated on {training['val_json']}: {training['val_records']:,} records"
    return text + (f"; step {training['step']:,}" if "step" in training else "")


def option_texts(options: dict[str, Any]) -> list[str]:
    """`name value` of each option, as the command line takes it."""
    return [f"{name} {_words(value)}" for name, value in options.items()]


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={inner}" for name, inner in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def info(folder: Path, /, *, json: bool = False) -> str:
    """Say what a folder is: family, parameters, adapter, prompt, image policy, training, scores.

    Args:
        folder: an adapter, a model, a checkpoint-N of either, or the folder of a whole run.
        json: as a JSON object, with the whole of latexocr.json.

    Raises:
        InputError: none of these.
    """
    found = inspect(folder)
    return found.to_json() if json else str(found)
