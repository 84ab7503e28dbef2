"""Options: one dataclass, and the way defaults < YAML file < command line become a `TrainConfig`.

Light on purpose (no torch, no transformers): `latexocr train --help` and every spelling mistake are answered at
once. `latexocr.train.TrainConfig` adds these fields to `transformers.TrainingArguments`, so each Trainer flag
works beside them.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from latexocr.errors import InputError, nearest

PROMPT = "Write the LaTeX of the formula in this image."


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help text, which `--help` and the README's table print."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class TrainOptions:
    """Our own fields, and the Trainer fields whose default we changed to the recipe we would run ourselves."""

    # what to train, on what
    model_name_or_path: str = option("Qwen/Qwen2-VL-2B-Instruct", "base model: a folder or a hub id")
    init_from_config: bool = option(False, "fresh weights from the base's config.json instead of its own (needs full)")
    hub: Literal["modelscope", "huggingface"] = option(
        "modelscope", "where a hub id is downloaded from: modelscope or huggingface"
    )
    trust_remote_code: bool = option(False, "run Python code that comes with a checkpoint")
    train_json: str | None = option(
        None, "training records: .json or .jsonl, .parquet, a folder that datasets saved, or a hub id[:subset[:split]]"
    )
    val_json: str | None = option(None, "validation records, likewise; without them nothing is evaluated")
    allow_urls: bool = option(False, "open URLs that records name, once: ~/.cache/latexocr/urls keeps what they hold")
    allow_outside_paths: bool = option(False, "open files that records name outside of their data file's folder")
    streaming: bool = option(
        False, "read training records (.jsonl, .parquet) as they come, never all of them (needs max_steps)"
    )
    output_dir: str | None = option("outputs/latexocr", "checkpoints, metrics.jsonl, config.yaml, adapter/ or model/")
    overwrite_output_dir: bool = option(False, "discard an earlier run in output_dir instead of refusing")

    # what the model sees; left out, as the base was trained by this library (its latexocr.json), else as said here
    prompt: str | None = option(None, f"the instruction beside every image (default: the base's, else {PROMPT!r})")
    supervised_turns: Literal["all", "last"] = option(
        "all", "answers of a conversation that are trained: all, or the last"
    )
    empty_thinking: bool = option(False, "answers without reasoning begin with an empty <think> block")
    answer_format: Literal["latex", "json"] = option(
        "latex", "what answers are, latex or json: chooses the metrics of validation"
    )
    image_mode: Literal["fit", "fixed"] | None = option(
        None, "fit: keep the aspect ratio; fixed: stretch to one size (default: the base's, else fit)"
    )
    min_visual_tokens: int | None = option(
        None, "fit: small images are enlarged to about this many visual tokens (default: the base's, else 64)"
    )
    max_visual_tokens: int | None = option(
        None, "fit: large images are shrunk to at most this many visual tokens (default: the base's, else 1024)"
    )
    image_height: int | None = option(
        None, "fixed: height in pixels, rounded to whole cells (default: the base's, else 100)"
    )
    image_width: int | None = option(
        None, "fixed: width in pixels, rounded to whole cells (default: the base's, else 500)"
    )
    max_length: int = option(2048, "longest record in tokens: prompt, image, answer and end token")
    overlong: Literal["drop", "error"] = option(
        "drop", "drop: a longer record is left out and counted; error: it is refused"
    )

    # what is trained
    finetuning: Literal["lora", "full"] = option("lora", "lora: adapters on frozen weights; full: every weight")
    lora_r: int = option(64, "rank")
    lora_alpha: int = option(16, "scale: the update is multiplied by lora_alpha / lora_r")
    lora_dropout: float = option(0.05, "dropout before the adapter")
    lora_components: list[str] = option(
        ["language"], "what gets adapters: language, vision, merger, attention, mlp, or one of one: vision.mlp"
    )
    lora_pattern: str | None = option(
        None, "in place of lora_components: the layers whose whole path matches this regular expression"
    )
    lora_init: Literal["default", "pissa", "loftq"] = option(
        "default", "pissa: adapters begin as the main part of the weights; loftq: as what 4 bits lost of them"
    )
    use_rslora: bool = option(False, "scale the update by lora_alpha / sqrt(lora_r), for large ranks")
    use_dora: bool = option(False, "train the length of each row of the weights apart from its direction; slower")
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: the second matrix of an adapter learns this many times faster, such as 16"
    )
    freeze: list[str] = option(
        [], "full: what is not trained: vision, merger, language, embeddings, or expressions found in parameter names"
    )
    new_tokens: list[str] = option(
        [], "words, or files of one a line, that become tokens with embeddings of their own"
    )

    load_in_4bit: bool = option(False, "QLoRA: the frozen base in 4 bits (NF4, double quantisation; bitsandbytes)")
    load_in_8bit: bool = option(False, "the frozen base in 8 bits (LLM.int8; bitsandbytes)")
    quantized_parts: list[str] = option(
        ["language"], "what 4 or 8 bits hold: language, vision, merger, head; 4 bits also experts"
    )
    offload_embeddings: bool = option(
        False, "the frozen table of embeddings stays in the host's memory, where the GPU reads its rows"
    )
    router_aux_loss_coef: float | None = option(
        None, "mixture of experts: weight of the loss for unequal use of experts (default: as config.json says)"
    )

    # against memorising
    token_corruption: float = option(0.0, "share of answer tokens that the decoder is shown wrong in training")
    augment: str | None = option(
        None,
        "style (im2latex, print, scan, pencil, chalk) in which each training picture is varied anew in every epoch",
    )

    # optimisation (TrainingArguments fields with our defaults)
    num_train_epochs: float = option(2.0, "passes over the training records")
    per_device_train_batch_size: int = option(4, "samples a device and micro-batch")
    max_tokens_per_batch: int | None = option(None, "tokens a device and micro-batch, in place of a number of samples")
    max_patches_per_batch: int | None = option(None, "vision patches a device and micro-batch, likewise")
    gradient_accumulation_steps: int = option(4, "micro-batches a step")
    learning_rate: float = option(1e-4, "peak learning rate of AdamW")
    learning_rates: dict[str, float] = option(
        {}, "others for parts, such as vision=1e-5 merger=1e-5 language=1e-4 embeddings=2e-5 new_tokens=1e-3"
    )
    bf16: bool | None = option(None, "bfloat16 arithmetic, and weights if frozen (default: where the GPU has it)")
    flatten: bool | None = option(None, "batches in one row without padding (default: where the GPU can, and on CPUs)")
    cache_vision_features: bool = option(False, "compute the frozen vision tower's output once, keep it on disk")
    fused_layers: bool | None = option(
        None, "norms, gates and rotary positions in one kernel each (default: on a GPU)"
    )
    fused_loss: bool | None = option(None, "loss without holding all logits (default: weights not sharded)")
    fused_lora: bool | None = option(None, "adapters in kernels of our own (default: bfloat16 on a GPU, not sharded)")
    cuda_graphs: bool | None = option(None, "replay steps as CUDA graphs (default: with fused_lora, or full in bf16)")
    average_weights: float | None = option(
        None, "validate and keep a moving average of the weights with this decay, such as 0.999 (default: none)"
    )
    seed: int = option(42, "seed of initialisation, order and dropout")
    dataloader_num_workers: int | None = option(None, "image workers a process (default: cores, at most 8)")
    dataloader_persistent_workers: bool | None = option(
        None, "keep the workers from one epoch to the next (default: true where there are any)"
    )

    # validation
    eval_strategy: str | None = option(None, "no, steps or epoch (default: epoch when there is a val_json)")
    save_strategy: str | None = option(None, "no, steps, epoch or best (default: as eval_strategy, else epoch)")
    save_total_limit: int | None = option(3, "checkpoints kept besides the best one")
    per_device_eval_batch_size: int = option(16, "samples a device in validation")
    generate_batch_size: int = option(128, "samples a device generated at once; fewer where memory is short")
    eval_generate_samples: int = option(64, "validation rows that are also generated and scored")
    max_new_tokens: int = option(512, "longest generated answer in tokens")
    metric_for_best_model: str | None = option(
        None, "what picks the best checkpoint (default: eval_edit_distance, or eval_loss without generation)"
    )
    load_best_model_at_end: bool | None = option(
        None, "adapter/ or model/ is the best checkpoint, not the last (default: true where each one is evaluated)"
    )
    early_stopping_patience: int | None = option(None, "stop after this many evaluations without improvement")

    # logging
    logging_steps: float = option(10, "steps between two lines of metrics.jsonl")
    logging_nan_inf_filter: bool = option(False, "hide NaN losses; looking for them stalls the GPU at every step")
    logging_first_step: bool = option(True, "log step 1 too")
    board_samples: int = option(8, "validation pictures on the dashboard, at most eval_generate_samples")
    swanlab_mode: str | None = option(None, "online, local, offline or disabled (default: what this machine allows)")
    swanlab_project: str | None = option(None, "SwanLab project (default: SWANLAB_PROJECT, else latexocr)")
    resume_from_checkpoint: str | None = option(None, "checkpoint folder, or true for the last one in output_dir")


OUR_NAMES = tuple(item.name for item in fields(TrainOptions))


def train_help(verb: Literal["train", "plan"] = "train") -> str:
    """The text of `latexocr train --help` and `latexocr plan --help`."""
    does = {
        "train": "Fine-tune a vision-language model on train.json.",
        "plan": "Run the worst batch of a training once: memory, speed, time, what to change. --json prints JSON.",
    }
    lines = [
        f"usage: latexocr {verb} [--config FILE.yaml] [--option value ...]",
        "",
        f"{does[verb]} Flags win over the YAML file, the file over defaults.",
        "Fields of transformers.TrainingArguments work too (--max_steps 100, --warmup_steps 50, ...).",
        "",
    ]
    for row in option_table():
        default = "" if "(default" in row[2] else f" (default: {row[1]})"
        lines.append(f"  --{row[0]:<30}{row[2]}{default}")
    return "\n".join(lines)


def option_table() -> list[tuple[str, str, str]]:
    """Name, default and meaning of every field of `TrainOptions`; the README's table is made of it."""
    rows = []
    for item in fields(TrainOptions):
        default = item.default if item.default is not MISSING else item.default_factory()
        shown = (" ".join(default) or "none") if isinstance(default, list | dict) else str(default)
        rows.append((item.name, shown, item.metadata["help"]))
    return rows


def parse_train_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """`--config FILE --name value ...` -> one dictionary; flags win over the file. Values are still untyped.

    A flag without a value means true; dashes and underscores are the same.

    >>> parse_train_arguments(["--lora-r", "8", "--bf16", "--learning_rate=2e-4"])
    {'lora_r': '8', 'bf16': 'true', 'learning_rate': '2e-4'}

    Raises:
        InputError: a word that is no flag, or a configuration file that cannot be read.
    """
    flags: dict[str, Any] = {}
    position = 0
    while position < len(argv):
        word = argv[position]
        if not word.startswith("--") or word == "--":
            raise InputError(f"unexpected argument {word!r}: options are written --name value")
        name, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        position += 1
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        flags[name.replace("-", "_")] = values[0] if len(values) == 1 else (values or "true")
    config_file = flags.pop("config", None)
    return {**(read_yaml(Path(config_file)) if config_file else {}), **flags}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of options.

    Raises:
        InputError: missing, not YAML, or not a mapping of names to values.
    """
    import yaml

    if not path.is_file():
        raise InputError(f"{path}: no such configuration file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: needs lines of the form 'name: value', holds {type(values).__name__}")
    return values


def check_names(config_class: type, names: Iterable[object]) -> None:
    """Raises: InputError: a name that is no field of the dataclass; the nearest one is suggested."""
    known = [item.name for item in fields(config_class) if item.init]
    for name in names:
        if name not in known:
            # ours first: lora_rank means lora_r, although Trainer's local_rank is spelt more alike
            hint = nearest(str(name), OUR_NAMES, cutoff=0.75) or nearest(str(name), known)
            raise InputError(f"unknown option {name!r}{hint} (latexocr train --help lists all)")


def typed_values(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """Check names and types of `values` against the fields of a dataclass; strings become what the field needs.

    Raises:
        InputError: an unknown name (with the nearest known one) or a value of the wrong type.
    """
    hints = typing.get_type_hints(config_class)
    check_names(config_class, values)
    typed = {}
    for name, value in values.items():
        if value is False and name.endswith("_strategy"):
            value = "no"  # YAML reads an unquoted no as false
        typed[name] = _convert(name, value, hints[name])
    return typed


def _convert(name: str, value: Any, hint: Any) -> Any:
    kinds = _members(hint)
    if str in kinds and value == "none":  # a word of its own there: report_to none
        return value
    for kind in kinds:
        matched, converted = _try(value, kind)
        if matched:
            return converted
    wanted = " or ".join(sorted({_describe(kind) for kind in kinds}))
    raise InputError(f"option {name!r} is {value!r}, needs {wanted}")


def _members(hint: Any) -> list[Any]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        # a string matches anything, so it is tried last
        members = [inner for member in typing.get_args(hint) for inner in _members(member)]
        return sorted(members, key=lambda member: member is str)
    return [hint]


def _try(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether `value` fits `kind`, and what it becomes. YAML reads `1e-4` as text, so text is converted."""
    origin = typing.get_origin(kind)
    if kind is type(None):
        return value is None or value in ("null", "None", "none"), None
    if origin is Literal:
        return value in typing.get_args(kind), value
    if kind is bool:
        texts = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
        if isinstance(value, bool):
            return True, value
        return isinstance(value, str) and value.lower() in texts, texts.get(str(value).lower())
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return False, None
        try:
            number = float(value)
            return (kind is float or number.is_integer()), kind(number)
        except (ValueError, OverflowError):
            return False, None
    if origin is list or kind is list:
        items = value if isinstance(value, list) else str(value).split(",")
        return isinstance(value, list | str), [str(item) for item in items]
    if kind is str:
        return isinstance(value, str | Path | bool | int | float), (
            str(value).lower() if isinstance(value, bool) else str(value)
        )
    if kind == dict[str, float]:
        return _try_numbers(value)
    if origin is dict or kind is dict:
        return isinstance(value, dict), value
    return isinstance(value, str | dict), value  # enums and nested configurations: TrainingArguments checks them


def _try_numbers(value: Any) -> tuple[bool, Any]:
    """`{"vision": "1e-5"}`, or the same as `vision=1e-5` words."""
    if isinstance(value, list | str):
        words = value if isinstance(value, list) else value.split(",")
        value = dict(str(word).partition("=")[::2] for word in words)
    if not isinstance(value, dict):
        return False, None
    found = {str(name): _try(number, float) for name, number in value.items()}
    return all(matched for matched, _ in found.values()), {name: number for name, (_, number) in found.items()}


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    if kind == dict[str, float]:
        return "names with numbers (name=0.1 or a mapping)"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return names.get(kind, "a list" if typing.get_origin(kind) is list else "a mapping")
