"""What is about to happen, in ten lines before step one."""

from __future__ import annotations

import math

import numpy as np

from latexocr.adapters import trainable_parameters
from latexocr.dataset import Selection
from latexocr.families import Family
from latexocr.host_embedding import host_tables
from latexocr.optimizers import learning_rates
from latexocr.preprocess import decode_sample
from latexocr.quantization import num_weights
from latexocr.sampling import BudgetSampler
from latexocr.train_config import TrainConfig
from latexocr.trainer import FormulaTrainer
from latexocr.vision_cache import VisionCache


def announce(
    trainer: FormulaTrainer, training: Selection, validation: Selection | None, cache: VisionCache | None = None
) -> str:
    """Parameters, rows, tokens, steps, the first example decoded."""
    config, preprocessor = trainer.args, trainer.train_dataset.preprocessor
    weights = [*trainer.model.parameters(), *host_tables(trainer.model)]
    total = sum(map(num_weights, weights))
    parts = trainable_parameters(trainer.model)
    trained = sum(count for count, _ in parts.values())
    rates = learning_rates(trainer.model, preprocessor.family, config)
    where = ", ".join(f"{part} {count:,} in {modules} layers" for part, (count, modules) in parts.items())
    first = "a stream, of which the first " if config.streaming else ""
    batch, steps_an_epoch, steps = count_steps(config, len(training.records), trainer.batches)
    if trainer.batches is None:
        size = f"{config.per_device_train_batch_size} a device"
    else:
        bounds = {"tokens": config.max_tokens_per_batch, "patches": config.max_patches_per_batch}
        size = "at most " + " and ".join(f"{bound:,} {name}" for name, bound in bounds.items() if bound) + " a device"
        batch = f"about {batch:.1f}"
    lines = [
        f"model       {config.model_name_or_path} ({trainer.contract.model_type}), {total:,} parameters, "
        f"{_arithmetic(config)} on {config.device}" + ", embeddings on the host" * config.offload_embeddings,
        f"trainable   {trained:,} ({100 * trained / total:.2f}%): {where}",
        f"train       {first}{len(training.records):,} records, {len(training.dropped):,} dropped as overlong; "
        f"tokens a record: {_statistics(training)}",
    ]
    if set(rates.values()) != {config.learning_rate}:
        lines.append(f"rates       {', '.join(_shown_rates(rates, preprocessor.family))}")
    if validation:
        generated = min(len(validation.records), config.eval_generate_samples)
        lines.append(
            f"validation  {len(validation.records):,} records, {len(validation.dropped):,} dropped as overlong; "
            f"{generated:,} of them generated, evaluated each {config.eval_strategy.value}"
        )
    if cache:
        lines.append(
            f"vision      features of {len(training.records):,} images, {cache.file.num_bytes / 1e6:,.1f} MB in "
            f"{cache.file.path.parent}, removed at the end"
        )
    lines += [
        f"steps       {steps:,} of {batch} records ({size} x {config.gradient_accumulation_steps} accumulated x "
        f"{config.world_size} ranks)" + ("" if config.streaming else f", {steps_an_epoch:,} an epoch"),
        f"example     {decode_sample(preprocessor(training.records[0]), preprocessor)}",
    ]
    return "\n".join(lines)


def _shown_rates(rates: dict[str, float], family: Family) -> list[str]:
    """The peak learning rates of each part, such as `vision 1e-05` or `language 0.0001 and 0.0016`."""
    parts: dict[str, set[float]] = {}
    for name, rate in rates.items():
        parts.setdefault(family.part_of(name), set()).add(rate)
    return [f"{part} {' and '.join(f'{rate:.4g}' for rate in sorted(found))}" for part, found in parts.items()]


def _arithmetic(config: TrainConfig) -> str:
    weights = "random weights, " if config.init_from_config else ""
    name = "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"
    master = ", weights in float32" if name != "float32" and config.finetuning == "full" else ""
    rounded = f", {config.quantization}" if config.quantization else ""
    return f"{weights}{name}{master}{rounded}"


def count_steps(config: TrainConfig, num_records: int, batches: BudgetSampler | None = None) -> tuple[float, int, int]:
    """Records a step on all ranks together (their mean with `batches`), steps an epoch, steps in all."""
    if batches is None:
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
        steps_an_epoch = math.ceil(num_records / batch)
    else:
        steps_an_epoch = math.ceil(len(batches) / config.gradient_accumulation_steps)
        batch = num_records / steps_an_epoch
    steps = config.max_steps if config.max_steps > 0 else math.ceil(steps_an_epoch * config.num_train_epochs)
    return batch, steps_an_epoch, steps


def _statistics(selection: Selection) -> str:
    totals, counts = np.sort(selection.counts.total), selection.counts
    return (
        f"median {totals[len(totals) // 2]}, longest {totals[-1]}, all {totals.sum():,} "
        f"(mean image {counts.image.mean():.0f}, answer {counts.answer.mean():.0f})"
    )
