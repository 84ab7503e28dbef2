"""TrainConfig: what a training is told, checked and completed before anything is loaded."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from latexocr.attention import VARLEN_CAPABILITY
from latexocr.config import OUR_NAMES, TrainOptions, check_names, typed_values
from latexocr.errors import InputError, nearest
from latexocr.lora import kernels_available, runs_kernels
from latexocr.metrics import METRICS
from latexocr.metrics.fields import FIELD_METRICS
from latexocr.modeling import default_dtype
from latexocr.quantization import Quantization, check_installed

logger = logging.getLogger(__name__)
MAX_WORKERS = 8
# config.yaml describes a run, so that it can be given again: no secrets, and nothing about how it was started.
NEVER_SAVED = {"hub_token", "push_to_hub_token", "overwrite_output_dir", "resume_from_checkpoint"}
# What a number needs to be, if it is given: in words, as a test, of which options.
RANGES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda number: number >= 1,
        ("per_device_train_batch_size", "max_tokens_per_batch", "max_patches_per_batch", "gradient_accumulation_steps",
         "per_device_eval_batch_size", "generate_batch_size", "max_length", "max_new_tokens", "lora_r",
         "early_stopping_patience"),
    ),
    "at least 0": (
        lambda number: number >= 0,
        ("dataloader_num_workers", "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "seed",
         "data_seed", "eval_generate_samples", "board_samples"),
    ),
    "more than 0": (lambda number: number > 0, ("logging_steps", "eval_steps", "save_steps", "num_train_epochs")),
    "a share from 0 to below 1": (
        lambda number: 0 <= number < 1, ("token_corruption", "lora_dropout", "adam_beta1", "adam_beta2")
    ),
    "a decay between 0 and 1, such as 0.999": (lambda number: 0 < number < 1, ("average_weights",)),
    "a number from 1, such as 16": (lambda number: number >= 1, ("loraplus_lr_ratio",)),
}  # fmt: skip
# A model card shows these always, and of the others what is not as by default,
SHOWN = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed")
# except what is said elsewhere in `latexocr.json` and what the weights do not depend on. Names begin so.
NOT_SHOWN = (
    "model_name", "hub", "train_json", "val_json", "output_dir", "prompt", "image_", "min_visual", "max_visual",
    "dataloader_", "logging_", "swanlab_", "board_", "eval_", "save_", "per_device_eval", "generate_", "greater_is",
    "run_name", "report_to", "disable_tqdm", "use_cpu", "remove_unused", "ddp_", "log_level", "max_new_tokens",
    "activation_checkpointing", "gradient_checkpointing", "push_to_hub", "trust_remote", "local_rank", "_n_gpu",
    "accelerator_config", "load_best", "metric_for", "flatten", "fused_", "cuda_graphs", "cache_vision", "debug",
    "do_", "allow_", "offload_",
)  # fmt: skip

# Fields that say what is trained; a run that goes on repeats them.
RATES = ("learning_rates", "new_tokens")
LORA_SIZE = ("lora_r", "lora_alpha")
LORA = ("lora_components", "lora_pattern", "lora_init", "use_rslora", "use_dora", "loraplus_lr_ratio")
RECIPE = {"lora": ("finetuning", *LORA_SIZE, *LORA, *RATES), "full": ("finetuning", "freeze", *RATES)}


@dataclass
class TrainConfig(TrainOptions, TrainingArguments):
    """`transformers.TrainingArguments` with our fields beside them and our recipe as defaults.

    Raises:
        InputError: an unknown option, a value that cannot be used, or values that do not go together.
    """

    remove_unused_columns: bool = False  # our collator needs the keys that Trainer would call unused

    def __new__(cls, *_: Any, **values: Any) -> TrainConfig:
        """Before `__init__`, which would only say that a keyword is unexpected."""
        check_names(cls, values)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check()
        if self.eval_strategy is None:
            self.eval_strategy = "epoch" if self.val_json else "no"
        if self.save_strategy is None:  # with the evaluations, so that the best checkpoint can be kept
            self.save_strategy = "epoch" if self.eval_strategy == "no" else self.eval_strategy
            if self.save_strategy == "steps":
                self.save_steps = self.eval_steps or self.logging_steps
        if self.metric_for_best_model is None:
            generated = "eval_field_match" if self.answer_format == "json" else "eval_edit_distance"
            self.metric_for_best_model = generated if self.eval_generate_samples else "eval_loss"
        if self.greater_is_better is None:
            metric = METRICS.get(self.best_metric)
            self.greater_is_better = self.best_metric in FIELD_METRICS or (
                metric is not None and metric.better == "higher"
            )
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = self.eval_strategy != "no" and self.save_strategy in (
                self.eval_strategy,
                "best",
            )
        if self.dataloader_num_workers is None:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self.dataloader_num_workers = max(1, min(MAX_WORKERS, _num_cores() // ranks))
        if self.dataloader_persistent_workers is None:  # starting them anew cost two ranks 11% of short epochs
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else accelerate takes every rank for a run of its own
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if not on_gpu:
            self.dataloader_pin_memory = False  # it only warns there
        self._check_precision(on_gpu)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every adapter takes part in every step
        if self.bf16 is None:
            self.bf16 = on_gpu and not self.fp16 and default_dtype("cuda") == torch.bfloat16
        if self.flatten is None:
            self.flatten = not on_gpu or (
                (self.bf16 or self.fp16) and torch.cuda.get_device_capability() >= VARLEN_CAPABILITY
            )
        if self.by_budget and not self.flatten:
            raise InputError("max_tokens_per_batch and max_patches_per_batch count no padding: they need flatten")
        by_fsdp, by_deepspeed = (
            bool(option) or os.environ.get(f"ACCELERATE_USE_{kind}") == "true"
            for option, kind in ((self.fsdp, "FSDP"), (self.deepspeed, "DEEPSPEED"))
        )
        sharded = by_fsdp or by_deepspeed
        if by_fsdp and self._bitsandbytes_optimiser:  # 0.50; DeepSpeed hands it plain tensors
            raise InputError(f"{self._bitsandbytes_optimiser} cannot step weights that FSDP shards; leave it out")
        if self.fused_layers is None:
            self.fused_layers = on_gpu and kernels_available()
        if self.fused_loss is None:
            # a trained head needs a gradient; in float16 gradients vanish before they are scaled
            self.fused_loss = not sharded and self.finetuning == "lora" and not self.fp16
        if self.fused_lora is None:
            self.fused_lora = self.bf16 and self.flatten and on_gpu and not sharded and runs_kernels(self.lora_r)
            plain = self.finetuning == "lora" and not (self.use_dora or self.load_in_8bit)
            self.fused_lora = self.fused_lora and plain
            if self.use_dora and on_gpu:
                logger.info("DoRA trains without the fused kernels for adapters and without CUDA graphs")
        if self.cuda_graphs is None:
            self.cuda_graphs = on_gpu and self.flatten and self.no_random_state and self.bf16 and not sharded
        self._check_fast(on_gpu, sharded)
        self._check_installation()
        if self.accelerator_config is None and on_gpu:
            self.accelerator_config = {"non_blocking": True}  # a blocking copy waits for the step before
        try:
            super().__post_init__()
        except (ValueError, TypeError, ImportError, NotImplementedError) as error:
            raise self._refused(error) from error
        self.set_checkpointing(bool(self.gradient_checkpointing))
        if self.n_gpu > 1:
            logger.warning(f"{self.n_gpu} GPUs are visible, one is used; start with accelerate launch to use all")
            self._n_gpu = 1  # Trainer would fall back to nn.DataParallel, which is slow and splits our batches wrongly

    def _check_streaming(self) -> None:
        if self.max_steps <= 0:
            raise InputError("streaming does not know how many records there are: set max_steps")
        for name in ("max_tokens_per_batch", "max_patches_per_batch", "cache_vision_features", "augment",
                     "token_corruption"):  # fmt: skip
            if getattr(self, name):
                raise InputError(f"{name} needs records that can be read again: leave out it or --streaming")
        self.ignore_data_skip = True  # the stream itself begins at the batch that is due

    def _check(self) -> None:
        self._check_numbers()
        if self.streaming:
            self._check_streaming()
        if self.init_from_config and self.finetuning == "lora":
            raise InputError("init_from_config makes random weights: nothing to adapt; add --finetuning full")
        self._check_trained()
        if self.cache_vision_features and self.augment:
            raise InputError("cache_vision_features keeps one version of a picture, augment makes more: leave one out")
        if self.init_from_config and self.freeze:
            raise InputError("init_from_config makes random weights, freeze keeps them so: leave one out")
        for name in ("fused_loss", "fused_lora"):
            if getattr(self, name) and self.finetuning == "full":
                raise InputError(f"{name} needs frozen weights, --finetuning full trains them: leave it out")
        self._check_quantization()
        if self.early_stopping_patience is not None and not self.val_json:
            raise InputError("early_stopping_patience needs a val_json to watch")
        if self.eval_strategy not in (None, "no") and not self.val_json:
            raise InputError(
                f"eval_strategy is {self.eval_strategy!r}, but there is no val_json to evaluate on; "
                "add one or set --eval_strategy no"
            )
        if self.load_best_model_at_end and not self.val_json:
            raise InputError("load_best_model_at_end needs a validation to judge by: add --val_json, or leave it out")
        if self.save_strategy == "best" and (not self.val_json or self.eval_strategy == "no"):
            raise InputError(
                "save_strategy best keeps what validation finds best, and there is none: add --val_json and evaluate, "
                "or take --save_strategy epoch"
            )
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise InputError("early_stopping_patience needs evaluations, but eval_strategy is 'no'")
        known = ["loss", *(METRICS if self.answer_format == "latex" else FIELD_METRICS)]
        if self.metric_for_best_model is not None and self.best_metric not in known:
            raise InputError(
                f"metric_for_best_model {self.metric_for_best_model!r} is not measured"
                f"{nearest(self.best_metric, known)} (one of {', '.join(known)})"
            )
        if not self.eval_generate_samples and self.metric_for_best_model not in (None, "loss", "eval_loss"):
            raise InputError(
                f"metric_for_best_model {self.metric_for_best_model!r} needs eval_generate_samples above 0"
            )
        unused = {"label_smoothing_factor": 0.0, "train_sampling_strategy": "random", "torch_compile": False,
                  "auto_find_batch_size": False}  # fmt: skip
        hints = {"torch_compile": "; fused_layers has its effect", "auto_find_batch_size": "; latexocr plan finds one"}
        pushing = [item for item in fields(self) if item.name.startswith(("push_to_hub", "hub_"))]
        unused |= {item.name: self._default(item) for item in pushing} | {"remove_unused_columns": False}
        hints |= {item.name: "; latexocr upload sends what was saved" for item in pushing}
        if self.by_budget:
            unused["per_device_train_batch_size"] = TrainOptions.per_device_train_batch_size
            hints["per_device_train_batch_size"] = "; the budget says how large a batch is"
        for name, default in unused.items():
            value = getattr(getattr(self, name), "value", getattr(self, name))
            if value != default:
                shown = "" if name in NEVER_SAVED else f" to {value!r}"
                raise InputError(f"{name} is set{shown}, but has no effect here: leave it out{hints.get(name, '')}")

    def _check_numbers(self) -> None:
        unused = {f"{what}_steps" for what in ("logging", "eval", "save")
                  if getattr(self, f"{what}_strategy") != "steps"}  # fmt: skip
        unused |= {"num_train_epochs"} if self.max_steps > 0 else set()
        for needed, (fits, names) in RANGES.items():
            for name in names:
                number = getattr(self, name)
                if number is not None and not isinstance(number, int | float):
                    raise InputError(f"{name} is {number!r}, needs a number")
                if number is not None and name not in unused and not fits(number):
                    raise InputError(f"{name} is {number:.12g}, needs {needed}")
        if self.dataloader_persistent_workers and self.dataloader_num_workers == 0:
            raise InputError("dataloader_persistent_workers keeps workers, dataloader_num_workers 0 starts none: "
                             "leave one out")  # fmt: skip

    def _check_installation(self) -> None:
        """What must be there beside this package: programs to report to, processes to shard over."""
        known = ["none", *INTEGRATION_TO_CALLBACK]
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        if len(names) > 1 and "swanlab" in names:  # a configuration that was saved when `all` was taken
            self.report_to = names = [name for name in names if name != "swanlab"]
        there = {"none", "flyte", *get_available_reporting_integrations()}
        for name in names:
            if name in ("all", "swanlab"):
                raise InputError(
                    f"report_to {name}: SwanLab follows a run by itself (--swanlab_mode); name others only"
                )
            if name not in known:
                raise InputError(f"report_to is {name!r}{nearest(name, known)} (one of {', '.join(known)})")
            if name not in there:
                raise InputError(f"report_to {name}: its package is not installed, or too old for transformers")
        if self.fsdp and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise InputError(
                "fsdp shards over several processes, and this is one: start with accelerate launch, or leave it out"
            )
        if self.deepspeed and find_spec("deepspeed") is None:
            raise InputError("deepspeed is not installed: pip install deepspeed, or leave --deepspeed out")

    def _refused(self, error: Exception) -> InputError:
        """What TrainingArguments refuses, with the option named: the error names it, or begins with its value."""
        message = re.sub(r"\b\w+Strategy\.(\w+)", lambda found: found[1].lower(), " ".join(str(error).split()))
        names = [item.name for item in fields(self)]
        if not any(f"--{name}" in message or ("_" in name and name in message) for name in names):
            for name in names:
                if isinstance(getattr(self, name), str) and message.startswith(f"{getattr(self, name)} is "):
                    return InputError(f"option {name!r}: {message}")
        return InputError(f"these options cannot be used: {message}")

    def _check_precision(self, on_gpu: bool) -> None:
        if self.fp16 and self.bf16:
            raise InputError("bf16 and fp16 exclude each other: leave fp16 out, bfloat16 needs no scaling")
        if self.fp16 and not on_gpu:
            raise InputError("fp16 needs a GPU; a CPU computes in float32, or with --bf16 true")
        if self.fp16 and self.fused_loss:
            raise InputError("fused_loss would lose small gradients in fp16: leave it out, or take --bf16 true")

    def _check_trained(self) -> None:
        """What is trained, and how it begins."""
        plain = TrainOptions()
        # LORA_SIZE may stand in a YAML file that serves both
        for name in LORA if self.finetuning == "full" else ("freeze",):
            if getattr(self, name) != getattr(plain, name):
                other = "lora" if self.finetuning == "full" else "full"
                raise InputError(f"{name} is for --finetuning {other}: leave it out")
        if self.lora_init == "loftq" and not self.load_in_4bit:
            raise InputError("lora_init loftq begins with what 4 bits lose: add --load_in_4bit true")
        if self.lora_init == "pissa" and self.quantization:
            raise InputError("lora_init pissa changes weights, which rounded ones cannot: take --lora_init loftq")
        if self.offload_embeddings and (self.finetuning == "full" or self.new_tokens):
            trained = "finetuning full" if self.finetuning == "full" else "new_tokens"
            raise InputError(f"offload_embeddings freezes embeddings, which {trained} trains: leave one out")
        if self.lora_pattern and self.lora_components != plain.lora_components:
            raise InputError("lora_pattern takes the place of lora_components: leave one out")

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Of frozen weights; trained ones are float32."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    @property
    def recipe(self) -> dict[str, Any]:
        """What is trained, and how: what a run that goes on must repeat."""
        return {name: getattr(self, name) for name in RECIPE[self.finetuning]}

    def _check_quantization(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("load_in_4bit and load_in_8bit exclude each other: leave one out")
        if not self.quantization and tuple(self.quantized_parts) != ("language",):
            raise InputError("quantized_parts says what 4 or 8 bits hold: add load_in_4bit or load_in_8bit")
        if self.quantization:
            name = f"load_in_{self.quantization.bits}bit"
            if self.finetuning == "full":
                raise InputError(f"{name} rounds weights that --finetuning full trains: leave one of the two out")
            check_installed(name)
        if self._bitsandbytes_optimiser:
            check_installed(self._bitsandbytes_optimiser)

    @property
    def _bitsandbytes_optimiser(self) -> str:
        """`optim` and its name, if bitsandbytes brings it."""
        name = str(getattr(self.optim, "value", self.optim))
        theirs = any(word in name for word in ("8bit", "bnb", "paged", "lion", "ademamix")) and "torch" not in name
        return f"optim {name}" if theirs else ""

    @property
    def quantization(self) -> Quantization | None:
        """How the base is rounded when it is loaded."""
        if not (self.load_in_4bit or self.load_in_8bit):
            return None
        return Quantization(4 if self.load_in_4bit else 8, tuple(self.quantized_parts))

    @property
    def best_metric(self) -> str | None:
        """`metric_for_best_model` as `latexocr.metrics` names it."""
        return self.metric_for_best_model and self.metric_for_best_model.removeprefix("eval_")

    @property
    def picks_by_pictures(self) -> bool:
        """Whether every validation must render formulas because the best checkpoint is chosen by it."""
        latex = self.answer_format == "latex"
        return latex and self.best_metric in METRICS and METRICS[self.best_metric].needs_pictures

    @property
    def no_random_state(self) -> bool:
        """Whether a step draws no random numbers of its own: `fused_lora` makes dropout masks from a seed."""
        return self.fused_lora or self.finetuning == "full"

    @property
    def by_budget(self) -> bool:
        """Whether a budget of tokens or patches, not a number of samples, says how large a micro-batch is."""
        return self.max_tokens_per_batch is not None or self.max_patches_per_batch is not None

    def set_checkpointing(self, on: bool) -> None:
        """Gradient checkpointing, under each name that it has: transformers 5.23 reads `activation_checkpointing`."""
        known = {item.name for item in fields(self)}
        for name in known & {"gradient_checkpointing", "activation_checkpointing"}:
            setattr(self, name, on)
            if on:
                given = getattr(self, f"{name}_kwargs") or {}
                if given.get("use_reentrant"):
                    raise InputError("use_reentrant: true would train no adapter of the vision tower; leave it out")
                kept = {"preserve_rng_state": False} if self.no_random_state else {}
                setattr(self, f"{name}_kwargs", {**kept, **given, "use_reentrant": False})

    def _check_fast(self, on_gpu: bool, sharded: bool) -> None:
        """Refuse what was asked for and cannot be had; where nobody asked, the defaults have seen to it."""
        if self.fused_lora and self.use_dora:
            raise InputError("fused_lora computes no DoRA: leave one out")
        if self.fused_lora and on_gpu and not (self.bf16 and runs_kernels(self.lora_r)):
            raise InputError("fused_lora needs bf16, Triton, and a lora_r of 16, 32, 64 or 128; leave it out")
        if self.cuda_graphs and not (on_gpu and self.flatten and self.bf16 and self.no_random_state):
            raise InputError("cuda_graphs needs a GPU, flatten, bf16, and fused_lora or full; leave it out")
        if self.lora_init != "default" and sharded:
            raise InputError(f"lora_init {self.lora_init} needs whole weights (no FSDP, no DeepSpeed): leave it out")
        for name in ("fused_loss", "fused_lora", "cuda_graphs", "average_weights", "load_in_4bit", "load_in_8bit",
                     "offload_embeddings"):  # fmt: skip
            if getattr(self, name) and sharded:
                raise InputError(f"{name} needs weights that are not sharded (FSDP, DeepSpeed); leave it out")
        if self.new_tokens and self.finetuning == "lora" and sharded:
            raise InputError(
                "new_tokens beside adapters needs weights that are not sharded (FSDP, DeepSpeed): leave it out, or "
                "train every weight: --finetuning full"
            )
        if self.offload_embeddings and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("offload_embeddings serves one GPU, not several ranks: leave it out")
        if self.offload_embeddings and not (on_gpu and kernels_available()):
            raise InputError("offload_embeddings saves memory of a GPU that Triton writes kernels for: leave it out")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """From names and values as YAML or the command line gives them.

        Raises:
            InputError: an unknown name (with the nearest one) or a value of the wrong type.
        """
        return cls(**typed_values(cls, values))

    def resolved(self) -> dict[str, Any]:
        """All our fields, and the Trainer fields that differ from their defaults: what `config.yaml` holds."""
        values = self.to_dict()
        kept = {}
        for item in fields(self):
            value = values.get(item.name, getattr(self, item.name, None))
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            default = item.default if item.default is not MISSING else None
            plain = isinstance(value, bool | int | float | str | list | type(None))
            mapping = isinstance(value, dict) and (item.name in OUR_NAMES or item.name.endswith("kwargs"))
            if item.name in NEVER_SAVED or not (plain or mapping):
                continue
            if item.name in OUR_NAMES or value != getattr(default, "value", default):
                kept[item.name] = value
        return kept

    @property
    def notable(self) -> dict[str, Any]:
        """Beside `recipe`, the options that made the weights what they are, for the model card."""
        defaults = {item.name: self._default(item) for item in fields(self)}
        options = {
            name: value
            for name, value in self.resolved().items()
            if name in SHOWN or (value is not None and value != defaults[name] and not name.startswith(NOT_SHOWN))
        }
        options = {name: value for name, value in options.items() if name not in self.recipe}
        if self.by_budget:
            del options["per_device_train_batch_size"]
        return options | ({"ranks": self.world_size} if self.world_size > 1 else {})

    @staticmethod
    def _default(item: Any) -> Any:
        default = item.default if item.default is not MISSING else item.default_factory()
        return getattr(default, "value", default)  # an enumeration's


def _num_cores() -> int:
    """Cores that this job may use; a Slurm job on a large node is given few of them."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
