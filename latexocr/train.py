"""Stage 4: train.json -> adapter or model. Reading `train` tells the story in order.

from latexocr.train import TrainConfig, train

result = train(TrainConfig(model_name_or_path="Qwen/Qwen2-VL-2B-Instruct", train_json="train.json"))
print(result.adapter_dir, result.metrics)
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import PeftModel
from PIL import Image
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, set_seed

from latexocr.adapters import add_lora, freeze, trainable_parameters
from latexocr.announcement import announce
from latexocr.checkpoint import TRAINER_STATE
from latexocr.collate import FlattenedCollator, FormulaCollator
from latexocr.config import PROMPT
from latexocr.contract import Contract, config_fingerprint, fingerprint, write_text
from latexocr.dataset import FormulaDataset, Selection, Variation, select
from latexocr.errors import InputError
from latexocr.evaluate import score_rows
from latexocr.families import Family
from latexocr.formats import Access
from latexocr.images import ImagePolicy
from latexocr.initialisation import loftq, pissa
from latexocr.metrics.fields import check_fields
from latexocr.metrics_file import MetricsFile
from latexocr.modeling import (
    check_untied,
    check_whole,
    family_in,
    fresh_base,
    greedy_config,
    inner_model,
    load_base,
    load_processor,
    positions_per_second,
    resolve_checkpoint,
)
from latexocr.new_tokens import add_tokens, make_room, read_words, token_indices, train_rows
from latexocr.optimizers import learning_rates
from latexocr.preprocess import Preprocessor
from latexocr.records import read_records
from latexocr.run_folder import (
    check_output_dir,
    check_same_run,
    checkpoint_to_resume,
    discard_earlier_run,
)
from latexocr.sampling import BudgetSampler
from latexocr.stopping import StoppedInEvaluation, StopSignal
from latexocr.streaming import Stream, first_records
from latexocr.tower import Tower
from latexocr.tracking import Sample, Tracker, dashboard_command, resolve_mode, saved_run_id, track
from latexocr.train_config import TrainConfig
from latexocr.trainer import FINAL, FormulaTrainer, validation_file
from latexocr.vision_cache import GivenFeatures, VisionCache

logger = logging.getLogger(__name__)
# option -> field of ImagePolicy
IMAGE_OPTIONS = {
    "image_mode": "mode",
    "min_visual_tokens": "min_visual_tokens",
    "max_visual_tokens": "max_visual_tokens",
    "image_height": "height",
    "image_width": "width",
}


@dataclass(frozen=True)
class TrainResult:
    """What a training leaves behind.

    Args:
        adapter_dir: the best adapter (by `metric_for_best_model`; the last one without validation); None with
            `finetuning="full"`.
        metrics: the final training loss and the best checkpoint's evaluation.
        model_dir: the best model, an ordinary checkpoint, with `finetuning="full"`; else None.
        num_dropped: overlong training records left out.
        stopped_by: number of the signal that ended training early, else 0; continue with
            `resume_from_checkpoint=True`.
        is_main_process: False on the other ranks of a distributed run.
    """

    adapter_dir: Path | None
    metrics: dict[str, float]
    model_dir: Path | None = None
    num_dropped: int = 0
    stopped_by: int = 0
    is_main_process: bool = True

    @property
    def trained_dir(self) -> Path:
        """`adapter_dir` or `model_dir`, whichever there is."""
        return self.adapter_dir or self.model_dir

    def __str__(self) -> str:
        if self.stopped_by:
            return (
                f"stopped by signal {self.stopped_by}: {self.trained_dir} written; "
                "go on with --resume_from_checkpoint true"
            )
        shown = {name: value for name, value in self.metrics.items() if "loss" in name or name in BEST_SHOWN}
        scores = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        return f"{self.trained_dir.name}: {self.trained_dir}  {scores}"


BEST_SHOWN = ("eval_exact_match", "eval_field_match", "eval_edit_distance", "eval_bleu", "eval_glyph_f1")


def train(config: TrainConfig) -> TrainResult:
    """Fine-tune with LoRA or as a whole: load, check, announce, train, keep the best.

    Leaves in `output_dir`: `config.yaml` (everything resolved), `metrics.jsonl` (the source of truth),
    `checkpoint-N/` and `adapter/`, each with adapter, processor, tokenizer and `latexocr.json`; with validation also
    the answers of each one in `validation/`, and `evaluation/` with all that is known about those of `adapter/`.

    `finetuning="full"` trains every weight, in float32 (a GPU computes in bfloat16 with copies of them), from those of
    the base or, with `init_from_config`, from random ones. In place of adapters there are whole models: float32 in
    `checkpoint-N/`, for resuming, and in `model/` (in place of `adapter/`) bfloat16 under the hub's names, an ordinary
    checkpoint: the base of the next training, full or LoRA.

    Raises:
        InputError: data, model or options that cannot be used; nothing has been written then.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of its own would warn in every forked worker
    resolve_mode(config.swanlab_mode)  # a wrong mode is refused before anything is loaded
    data = load_data(config)
    checkpoint = checkpoint_to_resume(config)
    output_dir = check_output_dir(config, checkpoint)
    model, contract = load_model(config, data, checkpoint)
    training, validation = data.training, data.validation
    with _tracked(config, output_dir, checkpoint) as tracker, StopSignal() as stop:
        trainer = build_trainer(
            config, data, model, contract, stop=stop, on_board=tracker.log_samples,
            callbacks=[MetricsFile(), tracker.callback(), *_early_stopping(config)],
        )  # fmt: skip
        cache = VisionCache(trainer, training, data.preprocessor, contract) if config.cache_vision_features else None
        if trainer.is_world_process_zero():
            if checkpoint is None:
                discard_earlier_run(output_dir)
            print(announce(trainer, training, validation, cache), flush=True)
            write_text(
                output_dir / "config.yaml",
                yaml.safe_dump(config.resolved(), allow_unicode=True, sort_keys=False),
            )
        if cache:
            trainer.train_dataset.vision, trainer.given_features = cache.filled(), GivenFeatures(model)
        with suppress(StoppedInEvaluation):  # its checkpoint is written
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.received:
            tracker.finish_as("aborted", f"signal {stop.received} at step {trainer.state.global_step}")
            trained_dir = output_dir / f"checkpoint-{trainer.state.global_step}"
        else:
            trained_dir = output_dir / FINAL[config.finetuning]
            trainer.save_model(str(trained_dir))
            if cache:
                cache.remove()
        evaluation = {} if stop.received else _evaluate_kept(trainer, output_dir)
        if trainer.is_world_process_zero() and tracker.run.get("mode") == "local":
            logger.info(f"dashboard: {dashboard_command(output_dir / 'swanlog')}")
    return TrainResult(
        adapter_dir=trained_dir if config.finetuning == "lora" else None,
        metrics=_final_metrics(trainer) | evaluation,
        model_dir=trained_dir if config.finetuning == "full" else None,
        num_dropped=trainer.train_dataset.num_dropped if config.streaming else len(training.dropped),
        stopped_by=stop.received,
        is_main_process=trainer.is_world_process_zero(),
    )


@dataclass(frozen=True)
class Data:
    """The records that a configuration selects, their preprocessing, and their micro-batches if by budget."""

    base_folder: Path
    preprocessor: Preprocessor
    training: Selection
    validation: Selection | None
    batches: BudgetSampler | None


def load_data(config: TrainConfig) -> Data:
    """Read, measure and select the records; no model is needed for it.

    Raises:
        InputError: no train_json, or data or processor files that cannot be used.
    """
    if not config.train_json:
        raise InputError("train_json is not set: give the file that csv2json wrote (--train_json train.json)")
    base_folder, preprocessor = load_preprocessor(config)
    if config.augment:  # a wrong style is refused before anything is measured
        _variation(config).picture(Image.new("L", (64, 32), "white"), np.random.default_rng(0))
    training = _select(config, config.train_json, preprocessor, streaming=config.streaming)
    if config.augment and not preprocessor.all_plain(training.records):
        raise InputError("augment varies records of one picture and its answer, and not all are: leave it out")
    validation = _select(config, config.val_json, preprocessor) if config.val_json else None
    if config.answer_format == "json":
        for record in (record for selection in (training, validation) if selection for record in selection.records):
            check_fields(record.text, record.where)
    if validation and config.eval_generate_samples and validation.records.kinds.talk:
        for record in validation.records:
            if record.turns[0].role == "document":
                raise InputError(
                    f"{record.where}: a text with markers asks nothing to be answered; add --eval_generate_samples 0"
                )
    batches = _batches_by_budget(config, training, preprocessor)
    return Data(base_folder, preprocessor, training, validation, batches)


def load_model(
    config: TrainConfig, data: Data, checkpoint: Path | None = None
) -> tuple[PeftModel | PreTrainedModel, Contract]:
    """The base with a fresh adapter or ready to be trained as a whole, and the contract of all its checkpoints.

    Args:
        config: says what is trained.
        data: tells the base's folder and family.
        checkpoint: of the run that is to go on.

    Raises:
        InputError: what is to be trained, frozen or learnt at another rate is not there, or the run was another one.
    """
    family = data.preprocessor.family
    contract = Contract(
        base_model=_lasting_name(config.model_name_or_path),
        hub=config.hub,
        quantization=config.quantization,
        base_fingerprint=(config_fingerprint if config.init_from_config else fingerprint)(data.base_folder),
        model_type=family.model_types[0],
        prompt=config.prompt,
        image_policy=data.preprocessor.policy,
        end_token=family.end_token,
        answer_format=config.answer_format,
        empty_thinking=config.empty_thinking,
        training=_training_facts(config, data),
    )
    if checkpoint:
        check_same_run(checkpoint, contract)
    set_seed(config.seed)
    model = _load_with_lora(config, data, checkpoint) if config.finetuning == "lora" else _load_whole(config, data)
    if config.router_aux_loss_coef is not None:
        ask_for_router_loss(inner_model(model).config, family, config.router_aux_loss_coef)
    seeing = " and ".join(part for part in trainable_parameters(model) if part in ("vision", "merger"))
    if config.cache_vision_features and seeing:
        raise InputError(
            f"cache_vision_features needs frozen vision and merger, but this trains {seeing}: leave it out, or take "
            + ("--freeze vision merger" if config.finetuning == "full" else "--lora_components language")
        )
    learning_rates(model, family, config)
    inner_model(model).generation_config = greedy_config(data.preprocessor.processor, family)
    inner_model(model).generation_config.max_new_tokens = config.max_new_tokens
    return model, contract


def _training_facts(config: TrainConfig, data: Data) -> dict[str, Any]:
    """What people will want to know of the run; files by their last two names, because checkpoints are given away."""
    known = {"train_records": len(data.training.records), "dropped": len(data.training.dropped)}
    words = [_short(word) if Path(word).is_file() else word for word in config.new_tokens]
    facts = {
        "train_json": _short(config.train_json),
        **({} if config.streaming else known),
        "recipe": {**config.recipe, "new_tokens": words},
        "options": config.notable,
    }
    if data.preprocessor.new_tokens:
        added = data.preprocessor.processor.tokenizer.convert_ids_to_tokens(list(data.preprocessor.new_tokens))
        facts["new_tokens_hash"] = hashlib.sha256("\n".join(added).encode()).hexdigest()[:16]
    if data.validation:
        num_records = len(data.validation.records)
        facts |= {
            "val_json": _short(config.val_json),
            "val_records": num_records,
            "generated_records": min(num_records, config.eval_generate_samples),
        }
    return facts


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def ask_for_router_loss(config: Any, family: Family, weight: float) -> None:
    """Let a mixture of experts give its router loss, see `latexocr.loss`.

    Raises:
        InputError: the family has no experts, or a negative weight.
    """
    if not family.routed or weight < 0:
        raise InputError(f"router_aux_loss_coef {weight}: needs a mixture of experts and 0 or more ({family.name})")
    text = config.get_text_config()
    text.output_router_logits, text.router_aux_loss_coef = weight > 0, weight


def _load_with_lora(config: TrainConfig, data: Data, checkpoint: Path | None) -> PeftModel:
    dtype = config.frozen_dtype
    with _kernels_compiled(config, dtype):
        base = load_base(
            data.base_folder,
            dtype=dtype,
            device=config.device if config.quantization else None,
            quantization=config.quantization,
            offload_embeddings=config.offload_embeddings,
            for_sharding=True,
            trust_remote_code=config.trust_remote_code,
        )
        pieces = data.preprocessor.new_tokens
        make_room(base, pieces)
        model = add_lora(
            base,
            data.preprocessor.family,
            components=config.lora_components,
            pattern=config.lora_pattern,
            r=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            trainable_token_indices=token_indices(base, pieces) if pieces else None,
        )
    train_rows(model)
    if config.lora_init == "pissa":
        model.pissa_start = pissa(model, checkpoint, config.device)
    elif config.lora_init == "loftq":
        whole = load_base(data.base_folder, dtype=dtype, trust_remote_code=config.trust_remote_code)
        loftq(model, whole, config.device)
    return model


def _load_whole(config: TrainConfig, data: Data) -> PreTrainedModel:
    """In float32: steps are smaller than what bfloat16 can tell apart; autocast computes with rounded copies."""
    if config.init_from_config:
        model = fresh_base(data.base_folder, trust_remote_code=config.trust_remote_code)
    else:
        options = {"for_sharding": True, "trust_remote_code": config.trust_remote_code}
        model = load_base(data.base_folder, dtype=torch.float32, **options)
    make_room(model, data.preprocessor.new_tokens)
    freeze(model, data.preprocessor.family, config.freeze)
    return model


def _kernels_compiled(config: TrainConfig, dtype: torch.dtype) -> AbstractContextManager:
    if not (config.fused_lora and config.device.type == "cuda"):
        return nullcontext()
    from latexocr import kernels

    return kernels.compiled_meanwhile(config.lora_r, config.lora_dropout > 0, dtype)


def build_trainer(
    config: TrainConfig,
    data: Data,
    model: PeftModel | PreTrainedModel,
    contract: Contract,
    *,
    stop: StopSignal,
    on_board: Callable[[list[Sample], int], None],
    callbacks: Sequence[TrainerCallback] = (),
) -> FormulaTrainer:
    """The trainer over `data`, ready to train; nothing is written yet."""
    processor, family = data.preprocessor.processor, data.preprocessor.family
    if config.cuda_graphs and (reason := waits_for_the_gpu(config, family)):
        logger.info(f"steps are not captured as CUDA graphs: {reason}")
        config.cuda_graphs = False
    if config.cuda_graphs and (config.streaming or data.training.records.kinds.talk):
        logger.info("steps are not captured as CUDA graphs: records may be more than one picture and its answer")
        config.cuda_graphs = False
    padded = FormulaCollator(
        tokenizer=processor.tokenizer,
        family=family,
        blank=data.preprocessor.blank,
        tower=Tower.of(family, inner_model(model).config),
    )
    collate = _training_collator(config, padded)
    return FormulaTrainer(
        model=model,
        args=config,
        contract=contract,
        generation=inner_model(model).generation_config,
        stop=stop,
        lengths=data.training.counts.total,
        batches=data.batches,
        on_board=on_board,
        train_dataset=(
            _stream(config, data, collate) if config.streaming else _dataset(data.training, data, _variation(config))
        ),
        eval_dataset=_dataset(data.validation, data) if data.validation else None,
        data_collator=collate,
        eval_collator=padded,
        processing_class=processor,
        callbacks=list(callbacks),
    )


def _dataset(selection: Selection, data: Data, variation: Variation | None = None) -> FormulaDataset:
    """Pictures travel as bytes; the patches of a video are numbers, and a batch holds one or the other."""
    records = selection.records
    return FormulaDataset(records, data.preprocessor, as_bytes=not records.kinds.video, variation=variation)


def _stream(config: TrainConfig, data: Data, collate: FormulaCollator) -> Stream:
    return Stream(
        config.train_json, data.preprocessor, collate, access=_access(config), hub=config.hub,
        max_length=config.max_length, overlong=config.overlong, batch_size=config.per_device_train_batch_size,
        rank=config.process_index, world_size=config.world_size,
        seed=config.data_seed if config.data_seed is not None else config.seed,
    )  # fmt: skip


def waits_for_the_gpu(config: TrainConfig, family: Family) -> str | None:
    """Why a step of this family asks the GPU for sizes, so that no graph of it can be captured; None where it does
    not."""
    if family.routed and not (config.fused_layers and config.finetuning == "lora"):  # the product of experts is 16-bit
        return f"the experts of {family.name} get tokens by content, but for adapters and fused_layers"
    if family.tower == "grids" and not config.cache_vision_features:
        return f"the vision tower of {family.name} asks the host for sizes"
    return None


def load_preprocessor(config: TrainConfig) -> tuple[Path, Preprocessor]:
    """The base checkpoint's folder, and the preprocessing that this configuration means for it.

    What it leaves open is as the base knows it, and is filled in.
    """
    base_folder = resolve_checkpoint(config.model_name_or_path, config.hub)
    family = family_in(base_folder)
    if config.quantization:
        check_whole(base_folder, f"load_in_{config.quantization.bits}bit")
    if config.offload_embeddings:
        check_untied(base_folder, "offload_embeddings", trust_remote_code=config.trust_remote_code)
    processor = load_processor(base_folder, trust_remote_code=config.trust_remote_code)
    known = Contract.load(base_folder)
    cell = processor.image_processor.patch_size * processor.image_processor.merge_size
    given = {field: getattr(config, option) for option, field in IMAGE_OPTIONS.items()}
    policy = replace(
        known.image_policy if known else ImagePolicy(),
        cell=cell,
        **{field: value for field, value in given.items() if value is not None},
    )
    for option, field in IMAGE_OPTIONS.items():  # config.yaml says what was used
        setattr(config, option, getattr(policy, field))
    if config.prompt is None:
        config.prompt = known.prompt if known else PROMPT
    pieces = add_tokens(processor.tokenizer, read_words(config.new_tokens))
    preprocessor = Preprocessor(
        processor, family, policy, config.prompt, pieces, supervised_turns=config.supervised_turns,
        empty_thinking=config.empty_thinking, positions_per_second=positions_per_second(base_folder),
    )  # fmt: skip
    return base_folder, preprocessor


def _select(config: TrainConfig, path: str, preprocessor: Preprocessor, *, streaming: bool = False) -> Selection:
    """The records of a file that fit; of a stream the first ones, for all that is to be known before training."""
    read = first_records if streaming else read_records
    return select(
        read(path, access=_access(config), hub=config.hub),
        preprocessor,
        max_length=config.max_length,
        overlong=config.overlong,
        num_workers=config.dataloader_num_workers,
    )


def _access(config: TrainConfig) -> Access:
    return Access(urls=config.allow_urls, outside=config.allow_outside_paths)


def _tracked(config: TrainConfig, output_dir: Path, checkpoint: Path | None) -> AbstractContextManager[Tracker]:
    """SwanLab beside the run, on the main process only; see `latexocr.tracking`."""
    return track(
        project=config.swanlab_project,
        name=config.run_name or output_dir.name,
        log_dir=output_dir / "swanlog",
        config=config.resolved(),
        is_main=config.process_index == 0,
        mode=config.swanlab_mode,
        run_id=saved_run_id(output_dir) if checkpoint else None,
        resume_step=json.loads((checkpoint / TRAINER_STATE).read_text())["global_step"] if checkpoint else None,
        run_file=output_dir / "swanlab.json",
    )


def _variation(config: TrainConfig) -> Variation | None:
    if not (config.token_corruption or config.augment):
        return None
    return Variation(config.token_corruption, config.augment, config.seed)


def _training_collator(config: TrainConfig, padded: FormulaCollator) -> FormulaCollator:
    if not config.flatten:
        return padded
    return FlattenedCollator(**vars(padded), round_up=config.cuda_graphs)


def _batches_by_budget(config: TrainConfig, training: Selection, preprocessor: Preprocessor) -> BudgetSampler | None:
    if not config.by_budget:
        return None
    return BudgetSampler(
        training,
        patches_per_token=preprocessor.patches_per_token,
        max_tokens=config.max_tokens_per_batch,
        max_patches=config.max_patches_per_batch,
        rank=config.process_index,
        world_size=config.world_size,
        seed=config.data_seed if config.data_seed is not None else config.seed,
    )


def _lasting_name(model_name_or_path: str) -> str:
    """A hub id as it is; a folder absolute, so that the adapter finds it from any working directory."""
    folder = Path(model_name_or_path)
    return str(folder.resolve()) if folder.is_dir() else model_name_or_path


def _early_stopping(config: TrainConfig) -> list[EarlyStoppingCallback]:
    patience = config.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]


def _final_metrics(trainer: FormulaTrainer) -> dict[str, float]:
    """Mean training loss, and the evaluation of the weights that were kept."""
    evaluation = trainer.current_contract().training.get("evaluation", {})
    scores = {name: value for name, value in evaluation.items() if name.startswith("eval_")}
    return {"train_loss": trainer.mean_loss(), **scores}


def _evaluate_kept(trainer: FormulaTrainer, output_dir: Path) -> dict[str, float]:
    """Score the validation answers of the weights that were kept once more, with pictures, intervals and a report."""
    step = trainer.current_contract().training.get("evaluation", {}).get("step")
    answers = validation_file(output_dir, step or 0)
    if not trainer.is_world_process_zero() or not answers.is_file():  # nothing generated
        return {}
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").split("\n") if line]
    evaluation = score_rows(rows, output_dir / "evaluation", answer_format=trainer.args.answer_format)
    if evaluation.engine:
        logger.info(f"report: {output_dir / 'evaluation' / 'report.html'}")
    return {f"eval_{name}": value for name, value in evaluation.metrics.items()}
