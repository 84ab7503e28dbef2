"""What a training will need and how long it will take, found by running its worst batch on the machine at hand.

from latexocr.plan import plan
from latexocr.train import TrainConfig

print(plan(TrainConfig(train_json="train.json")))
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import logging
import math
import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback

from latexocr.announcement import count_steps
from latexocr.dataset import Selection
from latexocr.errors import InputError
from latexocr.memory import GIB, OutOfMemory, peak_gib, total_gib
from latexocr.preprocess import TokenCounts, TokenTable
from latexocr.stopping import StopSignal
from latexocr.train import Data, TrainConfig, build_trainer, load_data, load_model

logger = logging.getLogger(__name__)
FULL = 0.9  # share of the memory above which a training is not safe: later batches fragment it
WORTH_IT = 1.05  # smaller gains are noise
ROOMY = 0.8  # a larger batch is tried when it should need less than this share
WARM_UP, MEASURED = 4, 10  # typical steps
DIFFERENT = 2  # typical steps, taken in turn: each is captured as a CUDA graph before measuring begins
MOST_SECONDS = 60  # measuring ends after this, however few steps were done

Shape = tuple[int | None, int, bool]  # samples a device and micro-batch, micro-batches a step, checkpointing


@dataclass(frozen=True)
class Trial:
    """Some real steps with one configuration; without memory and speed if it did not fit.

    Args:
        per_device_train_batch_size: None where a budget of tokens or patches says how large a micro-batch is.
        base_gib: memory before the first step, weights only.
        peak_gib: most memory of the worst steps and of the typical ones.
        seconds_per_step: of a typical step, data loading and optimiser included.
    """

    per_device_train_batch_size: int | None
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
        options = {
            "per_device_train_batch_size": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "gradient_checkpointing": str(self.gradient_checkpointing).lower(),
        }
        return " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)

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
        shape = f"{trial.per_device_train_batch_size or 'budget'} x {trial.gradient_accumulation_steps}"
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
    is tried as well, without checkpointing. None of this changes the result: samples a step stay the same. Batches
    by budget keep their budget: with them only checkpointing is tried.

    Args:
        config: as for `train`.

    Raises:
        InputError: data, model or options that cannot be used.
    """
    if config.streaming:
        raise InputError(
            "plan looks for the worst batch among all records, which a stream does not show; leave it out"
        )
    config = copy.copy(config)  # what it leaves open is filled in
    data = load_data(config)
    counts = data.training.counts
    batch_size = None if config.by_budget else config.per_device_train_batch_size
    shape = (batch_size, config.gradient_accumulation_steps, config.gradient_checkpointing)
    trials = [_trial(config, data, shape)]
    total = total_gib(config.device)
    while not trials[-1].fits(total) and (shape := smaller(shape)):
        trials.append(_trial(config, data, shape))
    if trials[0].fits(total):
        trials += _faster(config, data, trials[0], total)
    _, _, num_steps = count_steps(config, len(counts), data.batches)
    seconds = next((trial.seconds_per_step for trial in trials if trial.seconds_per_step), None)
    on_gpu = config.device.type == "cuda"
    return Plan(
        device=torch.cuda.get_device_name(config.device) if on_gpu else "CPU, memory of the whole process",
        total_gib=total,
        worst_batches=[describe([counts[row] for row in rows], data) for rows in _worst(config, data)],
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


def worst_batches(
    counts: TokenTable, batch_size: int | None, *, max_tokens: float = math.inf, max_image_tokens: float = math.inf
) -> list[list[int]]:
    """Rows of the heaviest micro-batch by language tokens, and of the heaviest by patches when it is another one.

    Args:
        counts: lengths of all rows.
        batch_size: rows of a micro-batch; None for as many as fit into `max_tokens` and `max_image_tokens`.

    >>> table = TokenTable(9, np.array([20, 20, 64]), np.array([1, 90, 5]))
    >>> worst_batches(table, 1)
    [[1], [2]]
    """
    total, image = counts.total, counts.image
    found: list[list[int]] = []
    for order in (np.argsort(-total, kind="stable"), np.lexsort((-total, -image))):
        if batch_size is None:
            batch = _as_fit(order.tolist(), total.tolist(), image.tolist(), max_tokens, max_image_tokens)
        else:
            batch = np.resize(order, batch_size).tolist()  # again from the start in a tiny data set
        if set(batch) not in [set(other) for other in found]:
            found.append(batch)
    return found


def _as_fit(
    order: list[int], total: list[int], image: list[int], max_tokens: float, max_image_tokens: float
) -> list[int]:
    batch: list[int] = []
    for row in order:
        max_tokens, max_image_tokens = max_tokens - total[row], max_image_tokens - image[row]
        if max_tokens < 0 or max_image_tokens < 0:
            break
        batch.append(row)
    return batch


def smaller(shape: Shape) -> Shape | None:
    """The next thing to try when a configuration does not fit; None when there is nothing that keeps the result.

    >>> smaller((12, 1, False)), smaller((1, 12, False)), smaller((1, 12, True))
    ((6, 2, False), (1, 12, True), None)
    """
    batch, accumulation, checkpointing = shape
    if batch is not None and batch > 1:
        samples = batch * accumulation
        half = max(size for size in range(1, batch // 2 + 1) if samples % size == 0)
        return half, samples // half, checkpointing
    return None if checkpointing else (batch, accumulation, True)


def roomier(trial: Trial, total: float) -> Shape | None:
    """The largest batch with the same samples a step that should fit: activations grow with the batch.

    >>> roomier(Trial(4, 4, False, base_gib=4, peak_gib=6), total=140)
    (16, 1, False)
    """
    batch = trial.per_device_train_batch_size
    if batch is None:
        return None
    samples = batch * trial.gradient_accumulation_steps
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
    if config.by_budget:
        bounds = {"tokens": config.max_tokens_per_batch, "patches": config.max_patches_per_batch}
        halves = " ".join(f"--max_{name}_per_batch {bound // 2}" for name, bound in bounds.items() if bound)
        steps = 2 * config.gradient_accumulation_steps
        return [f"{reason}, with checkpointing too: use {halves} --gradient_accumulation_steps {steps}"]
    longest = np.sort(training.counts.total)
    bound = longest[int(0.99 * (len(longest) - 1))]
    images = int(training.counts.image.max())
    return [
        f"{reason}, with one sample at a time and checkpointing too; what is left changes the result:",
        f"--max_length {bound} instead of {longest[-1]} at most drops {(longest > bound).sum()} of {len(longest):,} "
        "records",
        f"--max_visual_tokens {images // 2} halves the largest picture ({images} tokens)",
        f"--lora_r {max(1, config.lora_r // 2)} instead of {config.lora_r} halves the adapter and its optimiser state"
        if config.finetuning == "lora"
        else "--finetuning lora keeps one copy of the weights instead of four",
    ]


def describe(counts: Sequence[TokenCounts], data: Data) -> str:
    """A batch in numbers, from its records' lengths."""
    patches = sum(count.image for count in counts) * data.preprocessor.patches_per_token
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


class _Batches(Sampler[list[int]]):
    """Chosen micro-batches in a chosen order, the same on every rank."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches, self.epoch = batches, 0  # FormulaTrainer sets the epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches


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


def _trial(config: TrainConfig, data: Data, shape: Shape) -> Trial:
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
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    return found or Trial(*shape)


def _quiet(config: TrainConfig, folder: str, shape: Shape) -> TrainConfig:
    """The configuration with another batch, writing and showing nothing."""
    options = copy.copy(config)
    batch_size, options.gradient_accumulation_steps, checkpointing = shape
    options.set_checkpointing(checkpointing)
    if batch_size is not None:
        options.per_device_train_batch_size = batch_size
    options.cache_vision_features = False  # its pass over all images is not what is planned for
    options.output_dir, options.report_to, options.disable_tqdm = folder, [], True
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        setattr(options, name, type(getattr(options, name))("no"))
    options.logging_first_step = options.load_best_model_at_end = options.push_to_hub = False
    return options


def _measure(options: TrainConfig, data: Data, shape: Shape) -> Trial:
    worst, typical = _micro_batches(options, data)
    accumulated = options.gradient_accumulation_steps
    options.max_steps = (len(worst) + len(typical)) // accumulated
    model, contract = load_model(options, data)
    watch = _Stopwatch(options.device, num_worst=len(worst) // accumulated)
    trainer = build_trainer(
        options, replace(data, batches=_Batches(worst + typical)), model, contract, stop=StopSignal(),
        on_board=lambda *_: None, callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    first = WARM_UP * accumulated
    measured = [row for batch in typical[first : first + watch.steps * accumulated] for row in batch]
    tokens = sum(data.training.counts[row].total for row in measured)
    return Trial(
        *shape,
        base_gib=watch.base_gib,
        peak_gib=peak_gib(options.device),
        seconds_per_step=watch.seconds / watch.steps,
        samples_per_second=options.world_size * len(measured) / watch.seconds,
        tokens_per_second=options.world_size * tokens / watch.seconds,
    )


def _micro_batches(options: TrainConfig, data: Data) -> tuple[list[list[int]], list[list[int]]]:
    """The worst ones as whole steps, twice, and typical ones: rows drawn at random, or as the budget fills them."""
    accumulated = options.gradient_accumulation_steps
    worst = [batch for batch in _worst(options, data) for _ in range(accumulated)]
    num_typical, different = (WARM_UP + MEASURED) * accumulated, DIFFERENT * accumulated
    if data.batches is not None:
        return [*worst, *worst], _repeated(itertools.islice(data.batches, different), num_typical)
    draw, rows = random.Random(options.seed), range(len(data.training.counts))
    batch_size = options.per_device_train_batch_size
    return [*worst, *worst], _repeated((draw.choices(rows, k=batch_size) for _ in range(different)), num_typical)


def _repeated(batches: Iterable[list[int]], number: int) -> list[list[int]]:
    return list(itertools.islice(itertools.cycle(batches), number))


def _worst(config: TrainConfig, data: Data) -> list[list[int]]:
    counts = data.training.counts
    if not config.by_budget:
        return worst_batches(counts, config.per_device_train_batch_size)
    max_tokens, max_patches = config.max_tokens_per_batch or math.inf, config.max_patches_per_batch or math.inf
    max_image_tokens = max_patches / data.preprocessor.patches_per_token
    return worst_batches(counts, None, max_tokens=max_tokens, max_image_tokens=max_image_tokens)
