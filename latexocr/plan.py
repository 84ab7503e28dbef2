"""What a training will need and how long it will take, found by running its worst batch on the machine at hand.

from latexocr.plan import plan
from latexocr.train import TrainConfig

print(plan(TrainConfig(train_json="train.json")))
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainingArguments

from latexocr.memory import GIB, OutOfMemory, peak_gib, total_gib
from latexocr.preprocess import Selection, TokenCounts
from latexocr.stopping import StopSignal
from latexocr.train import Data, TrainConfig, build_trainer, count_steps, load_data, load_model
from latexocr.trainer import FormulaTrainer

logger = logging.getLogger(__name__)
FULL = 0.9  # share of the memory above which a training is not safe: later batches fragment it
WORTH_IT = 1.05  # smaller gains are noise
ROOMY = 0.8  # a larger batch is tried when it should need less than this share
WARM_UP, MEASURED = 3, 10  # typical steps
MOST_SECONDS = 60  # measuring ends after this, however few steps were done


@dataclass(frozen=True)
class Trial:
    """Some real steps with one configuration; without memory and speed if it did not fit.

    Args:
        base_gib: memory before the first step, weights only.
        peak_gib: most memory of the worst steps and of the typical ones.
        seconds_per_step: of a typical step, data loading and optimiser included.
    """

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    base_gib: float | None = None
    peak_gib: float | None = None
    seconds_per_step: float | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None

    @property
    def flags(self) -> str:
        """The configuration as it is typed."""
        flags = (
            f"--per_device_train_batch_size {self.per_device_train_batch_size} "
            f"--gradient_accumulation_steps {self.gradient_accumulation_steps}"
        )
        return f"{flags} --gradient_checkpointing {str(self.gradient_checkpointing).lower()}"

    def fits(self, total: float) -> bool:
        return self.peak_gib is not None and self.peak_gib <= FULL * total


@dataclass(frozen=True)
class Plan:
    """What `plan` found; print it, or take it as JSON.

    Args:
        worst_batches: the heaviest batch by language tokens, and the heaviest by patches when it is another.
        trials: the configuration as given, then the ones that were tried instead.
        num_steps: optimiser steps of the whole run.
        hours: `num_steps` typical steps of the first configuration that ran; start-up and validation not counted.
        advice: what to change, best first.
    """

    device: str
    total_gib: float
    worst_batches: list[str]
    trials: list[Trial]
    num_steps: int
    hours: float | None
    validation: str
    advice: list[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        lines = [f"device       {self.device}, {self.total_gib:.1f} GiB"]
        lines += [f"worst batch  {batch}" for batch in self.worst_batches]
        lines += [f"{name:<13}{self._row(trial)}" for name, trial in self._named_trials()]
        time_needed = "unknown" if self.hours is None else _duration(self.hours)
        lines.append(f"whole run    {self.num_steps:,} steps: {time_needed}; start-up not counted, {self.validation}")
        return "\n".join([*lines, *(f"advice       {line}" for line in self.advice)])

    def _named_trials(self) -> Iterator[tuple[str, Trial]]:
        yield "as given", self.trials[0]
        for trial in self.trials[1:]:
            yield "tried", trial

    def _row(self, trial: Trial) -> str:
        shape = f"{trial.per_device_train_batch_size} x {trial.gradient_accumulation_steps}"
        shape += ", checkpointing" * trial.gradient_checkpointing
        if trial.peak_gib is None:
            return f"{shape}: out of memory"
        return (
            f"{shape}: {trial.peak_gib:.1f} GiB ({100 * trial.peak_gib / self.total_gib:.0f}%), "
            f"{trial.samples_per_second:,.1f} samples/s, {trial.tokens_per_second:,.0f} tokens/s, "
            f"{trial.seconds_per_step:.3f} s a step"
        )


def plan(config: TrainConfig) -> Plan:
    """Run the worst batch of a training and some typical ones, and say what it needs and what would be better.

    The trainer, its optimiser and its data loader are those of `train`; nothing is kept, nothing is tracked. What
    does not fit is tried with half the batch until it does; where there is room, the largest batch that should fit
    is tried as well, without checkpointing. None of this changes the result: samples a step stay the same.

    Args:
        config: as for `train`.

    Raises:
        InputError: data, model or options that cannot be used.
    """
    data = load_data(config)
    counts = data.training.counts
    shape = (config.per_device_train_batch_size, config.gradient_accumulation_steps, config.gradient_checkpointing)
    trials = [_trial(config, data, shape)]
    total = total_gib(config.device)
    while not trials[-1].fits(total) and (shape := smaller(shape)):
        trials.append(_trial(config, data, shape))
    if trials[0].fits(total):
        trials += _faster(config, data, trials[0], total)
    _, _, num_steps = count_steps(config, len(counts))
    seconds = next((trial.seconds_per_step for trial in trials if trial.seconds_per_step), None)
    on_gpu = config.device.type == "cuda"
    return Plan(
        device=torch.cuda.get_device_name(config.device) if on_gpu else "CPU, memory of the whole process",
        total_gib=total,
        worst_batches=[
            describe([counts[row] for row in rows], data) for rows in worst_batches(
                counts, config.per_device_train_batch_size)
        ],
        trials=trials,
        num_steps=num_steps,
        hours=None if seconds is None else seconds * num_steps / 3600,
        validation=_validation(config, data),
        advice=advise(trials, total, data.training, config),
    )  # fmt: skip


def _faster(config: TrainConfig, data: Data, given: Trial, total: float) -> list[Trial]:
    """What memory to spare can buy: no checkpointing, then a larger batch."""
    trials = [given]
    if given.gradient_checkpointing:
        shape = (given.per_device_train_batch_size, given.gradient_accumulation_steps, False)
        trials.append(_trial(config, data, shape))
    largest = roomier([trial for trial in trials if trial.fits(total)][-1], total)
    return [*trials[1:], *([_trial(config, data, largest)] if largest else [])]


def worst_batches(counts: Sequence[TokenCounts], batch_size: int) -> list[list[int]]:
    """Rows of the heaviest batch by language tokens, and of the heaviest by patches when it is another one.

    >>> short, long, large = TokenCounts(9, 20, 1), TokenCounts(9, 20, 90), TokenCounts(9, 64, 5)
    >>> worst_batches([short, long, large], 1)
    [[1], [2]]
    """
    rows = range(len(counts))
    by_tokens = sorted(rows, key=lambda row: counts[row].total, reverse=True)
    by_patches = sorted(rows, key=lambda row: (counts[row].image, counts[row].total), reverse=True)
    found = []
    for order in (by_tokens, by_patches):
        batch = [order[place % len(order)] for place in range(batch_size)]  # again from the start in a tiny data set
        if set(batch) not in [set(other) for other in found]:
            found.append(batch)
    return found


def smaller(shape: tuple[int, int, bool]) -> tuple[int, int, bool] | None:
    """The next thing to try when a configuration does not fit; None when there is nothing that keeps the result.

    >>> smaller((12, 1, False)), smaller((1, 12, False)), smaller((1, 12, True))
    ((6, 2, False), (1, 12, True), None)
    """
    batch, accumulation, checkpointing = shape
    samples = batch * accumulation
    if batch > 1:
        half = max(size for size in range(1, batch // 2 + 1) if samples % size == 0)
        return half, samples // half, checkpointing
    return None if checkpointing else (1, samples, True)


def roomier(trial: Trial, total: float) -> tuple[int, int, bool] | None:
    """The largest batch with the same samples a step that should fit: activations grow with the batch.

    >>> roomier(Trial(4, 4, False, base_gib=4, peak_gib=6), total=140)
    (16, 1, False)
    """
    batch, samples = trial.per_device_train_batch_size, (
        trial.per_device_train_batch_size * trial.gradient_accumulation_steps)  # fmt: skip
    grows = (trial.peak_gib - trial.base_gib) / batch
    fitting = [
        size for size in range(batch + 1, samples + 1)
        if samples % size == 0 and trial.base_gib + grows * size <= ROOMY * total
    ]  # fmt: skip
    return (max(fitting), samples // max(fitting), trial.gradient_checkpointing) if fitting else None


def advise(trials: Sequence[Trial], total: float, training: Selection, config: TrainConfig) -> list[str]:
    """What to change, best first."""
    given, fitting = trials[0], [trial for trial in trials if trial.fits(total)]
    if given in fitting:
        best = max(fitting, key=lambda trial: trial.samples_per_second)
        faster = best.samples_per_second / given.samples_per_second
        if faster < WORTH_IT:
            return ["it fits, and nothing that was tried is faster"]
        return [f"use {best.flags}: {faster:.1f} times as fast, the same result"]
    reason = "out of memory" if given.peak_gib is None else f"more than {FULL:.0%} of the memory"
    if fitting:
        return [f"{reason}: use {fitting[0].flags}, which fits, the same result"]
    longest = sorted(count.total for count in training.counts)
    bound = longest[int(0.99 * (len(longest) - 1))]
    beyond = sum(length > bound for length in longest)
    images = max(count.image for count in training.counts)
    return [
        f"{reason}, with one sample at a time and checkpointing too; what is left changes the result:",
        f"--max_length {bound} instead of {longest[-1]} at most drops {beyond} of {len(longest):,} records",
        f"--max_visual_tokens {images // 2} halves the largest picture ({images} tokens)",
        f"--lora_r {max(1, config.lora_r // 2)} instead of {config.lora_r} halves the adapter and its optimiser state",
    ]


def describe(counts: Sequence[TokenCounts], data: Data) -> str:
    """A batch in numbers, from its records' lengths."""
    patches = sum(count.image for count in counts) * data.preprocessor.processor.image_processor.merge_size**2
    return (
        f"{len(counts)} samples, {sum(count.total for count in counts):,} language tokens (longest record "
        f"{max(count.total for count in counts):,}), {patches:,} patches"
    )


def _validation(config: TrainConfig, data: Data) -> str:
    if data.validation is None:
        return "no validation"
    rows = len(data.validation.records)
    generated = min(rows, config.eval_generate_samples)
    return f"nor validation ({rows:,} rows, {generated:,} of them generated)"


def _duration(hours: float) -> str:
    minutes = round(60 * hours)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 1 else f"{3600 * hours:.0f} s"


class _Rows(Sampler[int]):
    """Chosen rows in a chosen order."""

    def __init__(self, rows: list[int]) -> None:
        self.rows, self.epoch = rows, 0  # FormulaTrainer sets the epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        yield from self.rows


class _PlannedTrainer(FormulaTrainer):
    """The real trainer on `planned_rows` in their order."""

    planned_rows: list[int]

    def _get_train_sampler(self, train_dataset: Any = None) -> _Rows:
        self._sampler = _Rows(self.planned_rows)
        return self._sampler


class _Stopwatch(TrainerCallback):
    """Times the typical steps; the GPU is waited for at both ends only."""

    def __init__(self, device: torch.device, num_worst: int) -> None:
        self.device, self.first = device, num_worst + WARM_UP
        self.base_gib = self.seconds = 0.0
        self.steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        on_gpu = self.device.type == "cuda"
        self.base_gib = torch.cuda.memory_allocated(self.device) / GIB if on_gpu else peak_gib(self.device)
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step == self.first + MEASURED or time.perf_counter() - self._begun > MOST_SECONDS
        if state.global_step == self.first or (last and state.global_step > self.first):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            if state.global_step == self.first:
                self._since = self._begun = now
            else:
                self.seconds, self.steps = now - self._since, state.global_step - self.first
                control.should_training_stop = True


def _trial(config: TrainConfig, data: Data, shape: tuple[int, int, bool]) -> Trial:
    """Worst steps twice (the optimiser's state exists from the first on), then typical ones."""
    with tempfile.TemporaryDirectory() as folder:
        options = _quiet(config, folder, shape)
        logger.info(f"trying {Trial(*shape).flags}")
        found: Trial | None = None
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(options.device)
        # one rank of several must not go on alone
        with suppress(OutOfMemory, torch.OutOfMemoryError) if options.world_size == 1 else nullcontext():
            found = _measure(options, data, shape)
    gc.collect()  # a trainer and its accelerator refer to each other
    torch.compiler.reset()
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    return found or Trial(*shape)


def _quiet(config: TrainConfig, folder: str, shape: tuple[int, int, bool]) -> TrainConfig:
    """The configuration with another batch, writing and showing nothing."""
    options = copy.copy(config)
    options.per_device_train_batch_size, options.gradient_accumulation_steps, options.gradient_checkpointing = shape
    options.output_dir, options.report_to, options.disable_tqdm = folder, [], True
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        setattr(options, name, type(getattr(options, name))("no"))
    options.logging_first_step = options.load_best_model_at_end = options.push_to_hub = False
    return options


def _measure(options: TrainConfig, data: Data, shape: tuple[int, int, bool]) -> Trial:
    rows, counts = _rows(options, data.training.counts), data.training.counts
    samples = options.per_device_train_batch_size * options.gradient_accumulation_steps * options.world_size
    options.max_steps = len(rows) // samples
    num_worst = options.max_steps - WARM_UP - MEASURED
    model, contract = load_model(options, data)
    watch = _Stopwatch(options.device, num_worst)
    trainer = build_trainer(
        options, data, model, contract, stop=StopSignal(), on_board=lambda *_: None, callbacks=[watch],
        trainer_class=_PlannedTrainer,
    )  # fmt: skip
    trainer.planned_rows = rows
    trainer.train()
    first = (num_worst + WARM_UP) * samples
    measured = rows[first : first + watch.steps * samples]
    return Trial(
        *shape,
        base_gib=watch.base_gib,
        peak_gib=peak_gib(options.device),
        seconds_per_step=watch.seconds / watch.steps,
        samples_per_second=len(measured) / watch.seconds,
        tokens_per_second=sum(counts[row].total for row in measured) / watch.seconds,
    )


def _rows(options: TrainingArguments, counts: Sequence[TokenCounts]) -> list[int]:
    """The worst batches as whole steps, twice, then typical steps: rows drawn at random."""
    batch = options.per_device_train_batch_size
    repeats = options.gradient_accumulation_steps * options.world_size
    worst = [row for rows in worst_batches(counts, batch) for row in rows * repeats]
    typical = random.Random(options.seed).choices(range(len(counts)), k=(WARM_UP + MEASURED) * batch * repeats)
    return [*worst, *worst, *typical]
