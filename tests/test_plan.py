"""What a training needs, found before it starts; and an out-of-memory error that says what to do."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import latexocr.plan as planning
from latexocr.cli import main
from latexocr.dataset import Selection
from latexocr.errors import InputError
from latexocr.memory import OutOfMemory, explain_out_of_memory
from latexocr.plan import Trial, advise, plan, roomier, smaller, worst_batches
from latexocr.preprocess import TokenTable
from latexocr.train import TrainConfig, load_data
from latexocr.trainer import FormulaTrainer

FITS = Trial(4, 4, False, base_gib=4.0, peak_gib=6.0, seconds_per_step=0.4, samples_per_second=40.0)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(planning, "WARM_UP", 1)
    monkeypatch.setattr(planning, "MEASURED", 2)


def test_worst_batches():
    # tokens 30, 119, 78; image tokens 20, 20, 64
    table = TokenTable(9, np.array([20, 20, 64]), np.array([1, 90, 5]))
    assert worst_batches(table, 1) == [[1], [2]]
    assert worst_batches(table, 2) == [[1, 2]]  # the same two by either measure
    assert worst_batches(table.take(np.array([0])), 3) == [[0, 0, 0]]
    assert worst_batches(table, None, max_tokens=200) == [[1, 2]]  # 197
    assert worst_batches(table, None, max_tokens=150) == [[1], [2]]
    assert worst_batches(table, None, max_tokens=200, max_image_tokens=70) == [[1], [2]]


def test_what_is_tried_next_keeps_the_samples_a_step():
    tried, shape = [], (16, 1, False)
    while shape:
        tried.append(shape)
        shape = smaller(shape)
    assert tried == [(16, 1, False), (8, 2, False), (4, 4, False), (2, 8, False), (1, 16, False), (1, 16, True)]
    assert smaller((12, 1, False)) == (6, 2, False) and smaller((6, 2, False)) == (3, 4, False)
    # 4 GiB of weights and 0.5 GiB a sample: 16 need 12 GiB, 8 need 8 GiB; up to 80% may be used
    assert roomier(FITS, 15.1) == (16, 1, False)
    assert roomier(FITS, 14.9) == (8, 2, False)
    assert roomier(FITS, 9.9) is None
    assert roomier(replace(FITS, per_device_train_batch_size=16, gradient_accumulation_steps=1), 140) is None


def test_advice(config):
    training = Selection([], TokenTable(20, np.full(101, 64), np.arange(1, 102)), [])
    options = config(lora_r=64)
    faster = replace(FITS, per_device_train_batch_size=16, gradient_accumulation_steps=1, samples_per_second=70.0)
    assert advise([FITS, faster], 140, training, options) == [
        "use --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --gradient_checkpointing false: "
        "1.8 times as fast, the same result"
    ]
    assert advise([FITS], 140, training, options) == ["it fits, and nothing that was tried is faster"]
    assert advise([Trial(4, 4, False), Trial(2, 8, False), replace(FITS, per_device_train_batch_size=1)], 7, training,
                  options) == ["out of memory: use --per_device_train_batch_size 1 --gradient_accumulation_steps 4 "
                               "--gradient_checkpointing false, which fits, the same result"]  # fmt: skip
    nothing = advise([FITS, Trial(1, 16, True)], 6.5, training, options)  # 6.0 GiB is more than 90% of 6.5
    assert nothing[0].startswith("more than 90% of the memory, with one sample at a time and checkpointing too")
    assert nothing[1] == "--max_length 184 instead of 185 at most drops 1 of 101 records"
    assert nothing[2] == "--max_visual_tokens 32 halves the largest picture (64 tokens)"
    assert nothing[3].startswith("--lora_r 32 instead of 64")


@pytest.mark.slow
def test_plan_runs_the_real_thing_and_leaves_nothing(config, few_steps, tmp_path):
    options = config(max_steps=-1, num_train_epochs=10.0)
    before = options.resolved()
    found = plan(options)
    assert not Path(options.output_dir).exists() and options.resolved() == before
    given, tried = found.trials
    assert (given.per_device_train_batch_size, given.gradient_accumulation_steps) == (2, 4)
    assert (tried.per_device_train_batch_size, tried.gradient_accumulation_steps) == (8, 1)
    assert 0 < given.base_gib <= given.peak_gib < found.total_gib
    assert found.num_steps == 30  # 24 records in steps of 8, ten epochs
    assert found.hours == pytest.approx(30 * given.seconds_per_step / 3600)
    assert given.samples_per_second == pytest.approx(8 / given.seconds_per_step)
    assert given.tokens_per_second > 64 * given.samples_per_second  # every picture alone has 64 tokens
    text = str(found)
    assert (
        text.startswith("device       CPU") and "\nas given     2 x 4: " in text and "\ntried        8 x 1: " in text
    )
    assert "\nwhole run    30 steps: " in text and "no validation" in text and "\nadvice       " in text
    assert json.loads(found.to_json())["trials"][1]["gradient_accumulation_steps"] == 1


@pytest.mark.slow
def test_plan_halves_the_batch_until_it_fits(config, few_steps, monkeypatch):
    """More than one sample at a time runs out of memory here, as torch reports it."""
    compute_loss = FormulaTrainer.compute_loss

    def too_large(self, model, inputs, *rest, **options):
        if len(inputs["text_cu_seqlens"]) - 1 > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return compute_loss(self, model, inputs, *rest, **options)

    monkeypatch.setattr(FormulaTrainer, "compute_loss", too_large)
    found = plan(config(per_device_train_batch_size=4, gradient_accumulation_steps=1))
    assert [trial.peak_gib is None for trial in found.trials] == [True, True, False]
    assert found.advice == [
        "out of memory: use --per_device_train_batch_size 1 --gradient_accumulation_steps 4 "
        "--gradient_checkpointing false, which fits, the same result"
    ]
    assert "as given     4 x 1: out of memory" in str(found)
    assert found.hours == pytest.approx(3 * found.trials[2].seconds_per_step / 3600)  # three steps


@pytest.mark.slow
def test_plan_when_nothing_fits(config, few_steps, monkeypatch):
    monkeypatch.setattr(planning, "total_gib", lambda device: 0.01)
    found = plan(config(gradient_accumulation_steps=1))
    shapes = [(t.per_device_train_batch_size, t.gradient_accumulation_steps, t.gradient_checkpointing)
              for t in found.trials]  # fmt: skip
    assert shapes == [(2, 1, False), (1, 2, False), (1, 2, True)]
    assert len(found.advice) == 4


@pytest.mark.slow
def test_plan_by_budget(config, few_steps, monkeypatch):
    """The worst micro-batch is as full as the budget allows; the whole run is counted in micro-batches."""
    options = config(max_steps=-1, num_train_epochs=2.0, gradient_accumulation_steps=1, max_tokens_per_batch=600,
                     per_device_train_batch_size=4)  # fmt: skip
    found = plan(options)
    (trial,) = found.trials
    assert trial.per_device_train_batch_size is None and "\nas given     budget x 1: " in str(found)
    tokens = int(found.worst_batches[0].split(" samples, ")[1].split(" ")[0])
    assert 600 - 190 < tokens <= 600  # no further record fits
    assert found.num_steps == 2 * len(load_data(options).batches)
    assert 0 < trial.tokens_per_second * trial.seconds_per_step <= 600
    monkeypatch.setattr(planning, "total_gib", lambda device: 0.01)
    short = plan(options)
    assert [trial.gradient_checkpointing for trial in short.trials] == [False, True]
    assert short.advice == [
        "more than 90% of the memory, with checkpointing too: use --max_tokens_per_batch 300 "
        "--gradient_accumulation_steps 2"
    ]


@pytest.mark.slow
def test_plan_tries_without_checkpointing(config, few_steps):
    found = plan(config(per_device_train_batch_size=2, gradient_accumulation_steps=1, gradient_checkpointing=True))
    assert [trial.gradient_checkpointing for trial in found.trials] == [True, False]


@pytest.mark.slow
def test_command(config, few_steps, tiny, records, capsys, tmp_path):
    arguments = ["plan", "--use_cpu", "--model_name_or_path", str(tiny), "--train_json", str(records["train"]),
                 "--output_dir", str(tmp_path / "none"), "--per_device_train_batch_size", "2",
                 "--gradient_accumulation_steps", "1"]  # fmt: skip
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_steps"] == 24 and len(found["trials"]) == 1 and not (tmp_path / "none").exists()
    assert main([*arguments, "--lora_rank", "2"]) == 2
    assert "did you mean 'lora_r'?" in capsys.readouterr().err


def batches(config) -> dict[str, dict]:
    from latexocr.collate import FormulaCollator
    from latexocr.dataset import FormulaDataset
    from latexocr.train import _training_collator, load_data

    data = load_data(config())
    dataset = FormulaDataset(data.training.records, data.preprocessor)
    padded = FormulaCollator(tokenizer=data.preprocessor.processor.tokenizer, family=data.preprocessor.family)
    flattened = _training_collator(config(), padded)
    rows = [dataset[0], dataset[1]]
    return {"padded": padded(rows), "flattened": flattened(rows), "one": flattened(rows[:1])}


def test_out_of_memory_names_the_batch(config):
    found = batches(config)
    lengths = [int(count) for count in found["flattened"]["text_cu_seqlens"].diff()]
    patches = len(found["padded"]["pixel_values"])
    sizes = {
        "flattened": f"{sum(lengths)} language tokens",
        "padded": f"{2 * max(lengths)} language tokens with padding",
    }
    for kind, tokens in sizes.items():
        with pytest.raises(OutOfMemory) as raised, explain_out_of_memory(found[kind]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        message = str(raised.value)
        assert message.startswith(
            f"out of memory with 2 samples ({tokens}, longest record {max(lengths)}, {patches} patches)"
        )
        assert (
            "halve --per_device_train_batch_size and double --gradient_accumulation_steps (the same result)" in message
        )
        assert "\n" not in message and isinstance(raised.value, InputError)
    with (
        pytest.raises(OutOfMemory, match=r"1 sample .*--gradient_checkpointing true"),
        explain_out_of_memory(found["one"]),
    ):
        raise torch.OutOfMemoryError
    with pytest.raises(RuntimeError, match="something else"), explain_out_of_memory(found["one"]):
        raise RuntimeError("something else")


def test_training_that_runs_out_of_memory_ends_in_one_line(config, monkeypatch):
    from latexocr.train import train

    def no_room(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(FormulaTrainer, "compute_loss", no_room)
    with pytest.raises(OutOfMemory, match="out of memory with 2 samples"):
        train(config())


@pytest.mark.parametrize("on", [False, True])
def test_a_trial_checkpoints_as_its_shape_says(on, config, tmp_path):
    """Under the name that Trainer reads, which transformers 5.23 changed; the given configuration stays."""
    given = config(fused_lora=True, lora_r=16, gradient_checkpointing=not on)
    tried = planning._quiet(given, str(tmp_path), (2, 1, on))
    names = {item.name for item in fields(TrainConfig)} & {"gradient_checkpointing", "activation_checkpointing"}
    assert [(getattr(tried, name), getattr(given, name)) for name in names] == [(on, not on)] * len(names)
    if on:
        assert all(getattr(tried, f"{name}_kwargs")["preserve_rng_state"] is False for name in names)
