"""Micro-batches by a budget of tokens and patches: bounds, coverage, balance, resuming, real ranks."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from latexocr.dataset import Selection, select
from latexocr.errors import InputError
from latexocr.metrics_file import read_metrics
from latexocr.preprocess import TokenCounts, TokenTable
from latexocr.records import Record, read_records
from latexocr.sampling import BudgetSampler, halved
from latexocr.train import load_preprocessor, train

BUDGET = {"max_tokens_per_batch": 500, "max_patches_per_batch": 1500, "per_device_train_batch_size": 4}


def table(counts: list[TokenCounts]) -> TokenTable:
    prompt = counts[0].prompt
    return TokenTable(prompt, *np.array([[c.image for c in counts], [c.answer for c in counts]], np.int32))


def skewed(num_records: int) -> Selection:
    """Most records are short, a few ten times as long; picture and answer vary on their own."""
    chance = random.Random(0)
    counts = [
        TokenCounts(30, max(16, int(chance.lognormvariate(4.2, 0.7))), max(3, int(chance.lognormvariate(3.8, 0.9))))
        for _ in range(num_records)
    ]
    records = [Record.of_picture(str(index), Path("x.png"), "x", f"record {index}") for index in range(num_records)]
    return Selection(records, table(counts), [])


def sampler(selection: Selection, *, rank: int = 0, world_size: int = 1, **limits: int | None) -> BudgetSampler:
    limits = {"max_tokens": 8192, "max_patches": 24000, **limits}
    return BudgetSampler(selection, patches_per_token=4, rank=rank, world_size=world_size, seed=42, **limits)


def test_a_plan_to_check_by_hand():
    """Tokens 6 4 3 3 2 (patches 4 a token of the image, which is 1): 18 tokens need two batches of at most 10."""
    counts = [TokenCounts(0, 1, total - 1) for total in (6, 4, 3, 3, 2)]
    records = [Record.of_picture(str(index), Path("x.png"), "x", f"record {index}") for index in range(5)]
    batches = list(sampler(Selection(records, table(counts), []), max_tokens=10, max_patches=None))
    assert sorted(sample for batch in batches for sample in batch) == [0, 1, 2, 3, 4]
    assert len(batches) == 2
    assert len(list(sampler(Selection(records, table(counts), []), max_tokens=None, max_patches=4))) == 5


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_an_epoch_holds_each_sample_once_within_both_bounds(world_size):
    selection = skewed(3000)
    ranks = [sampler(selection, rank=rank, world_size=world_size) for rank in range(world_size)]
    orders = []
    for epoch in (0, 1, 7):
        for each in ranks:
            each.epoch = epoch
        epochs = [list(each) for each in ranks]
        assert {len(batches) for batches in epochs} == {len(ranks[0])}
        samples = [sample for batches in epochs for batch in batches for sample in batch if sample != -1]
        assert sorted(samples) == list(range(3000))
        for batch in (batch for batches in epochs for batch in batches if batch != [-1]):
            assert sum(selection.counts[sample].total for sample in batch) <= 8192
            assert 4 * sum(selection.counts[sample].image for sample in batch) <= 24000
        orders.append(samples)
    assert orders[0] != orders[1] != orders[2]


def test_the_order_is_not_sorted_by_length():
    """Batches of short and of long records alike: the mean length of a batch is near the mean of all."""
    selection = skewed(3000)
    mean = sum(count.total for count in selection.counts) / 3000
    for batch in list(sampler(selection))[:-1]:
        assert 0.7 < sum(selection.counts[sample].total for sample in batch) / len(batch) / mean < 1.5


def test_batches_are_full():
    selection = skewed(3000)
    tokens = sum(count.total for count in selection.counts)
    assert len(sampler(selection)) <= tokens / 8192 / 0.98 + 1
    assert len(sampler(selection, world_size=4)) <= tokens / 4 / 8192 / 0.97 + 1


@pytest.mark.parametrize("world_size", [2, 8])
def test_ranks_have_equal_work_in_every_step(world_size):
    """Tokens and patches of the least and the most loaded rank differ by at most 10%, the epoch's last step aside."""
    selection = skewed(6000)
    for step in list(sampler(selection, world_size=world_size).plan(0))[:-1]:
        for size in (lambda count: count.total, lambda count: count.image):
            loads = [sum(size(selection.counts[sample]) for sample in batch) for batch in step]
            assert min(loads) >= 0.9 * max(loads)


def test_every_epoch_is_equally_long():
    """Small epochs, whose greedy plans differ in length: all are brought to the length that the schedule counts on."""
    each = sampler(skewed(100), max_tokens=500, max_patches=None)
    greedy = [len(each._pack(each._order(epoch, 0))) for epoch in range(100)]
    assert max(greedy) > len(each) > min(greedy)  # some are stretched, some shuffled again
    for epoch in range(100):
        steps = list(each.plan(epoch))
        assert len(steps) == len(each) and all(map(any, steps))
        assert sorted(sample for step in steps for batch in step for sample in batch) == list(range(100))


def test_halves_of_a_step():
    assert halved([[1], [2]]) == [[[1], []], [[], [2]]]
    assert halved([[1, 2, 3, 4], []]) == [[[1, 3], []], [[2, 4], []]]


def test_a_record_above_the_budget_is_named():
    counts = [TokenCounts(10, 20, 30), TokenCounts(10, 20, 300)]
    records = [Record.of_picture(str(index), Path("x.png"), "x", f"record {index}") for index in range(2)]
    with pytest.raises(InputError, match="record 1 has 330 tokens, more than max_tokens_per_batch 300"):
        sampler(Selection(records, table(counts), []), max_tokens=300)
    with pytest.raises(InputError, match="record 0 has 80 patches, more than max_patches_per_batch 79"):
        sampler(Selection(records, table(counts), []), max_patches=79)
    assert len(sampler(Selection(records, table(counts), []), max_tokens=330)) == 2


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(folder / "metrics.jsonl") if key in row]


def test_training_by_budget(config, tmp_path, capsys):
    """The first loss is the token mean over the planned samples; the epochs are whole; the run is announced."""
    options = config(**BUDGET, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=2)
    _, preprocessor = load_preprocessor(options)
    selection = select(read_records(options.train_json), preprocessor, max_length=2048)
    num_batches = len(sampler(selection, max_tokens=500, max_patches=1500))
    steps = -(-num_batches // 2)
    assert steps >= 3
    train(options)
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 2 * steps + 1))
    assert rows[steps - 1]["epoch"] == 1 and rows[-1]["epoch"] == 2
    expected = f"of about {24 / steps:.1f} records (at most 500 tokens and 1,500 patches a device x 2 accumulated x 1"
    assert expected in capsys.readouterr().out


def test_equals_fixed_batches_of_the_same_samples(config, tmp_path):
    """A budget that holds all 24 records in one micro-batch: the losses of fixed batches of 24."""
    train(config(output_dir=str(tmp_path / "fixed"), per_device_train_batch_size=24, gradient_accumulation_steps=1))
    train(config(output_dir=str(tmp_path / "budget"), per_device_train_batch_size=4, max_tokens_per_batch=10**6,
                 gradient_accumulation_steps=1))  # fmt: skip
    assert losses(tmp_path / "budget") == pytest.approx(losses(tmp_path / "fixed"), rel=1e-5)


def test_resumed_equals_uninterrupted_by_budget(config, tmp_path):
    """From the middle of the first epoch and of the second, dropout on: the same numbers to the last bit."""
    options = dict(BUDGET, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=1, save_strategy="steps",
                   save_steps=1, save_total_limit=None, lora_dropout=0.1,
                   output_dir=str(tmp_path / "run"))  # fmt: skip
    train(config(**options))
    whole = losses(tmp_path / "run")
    assert len(whole) % 2 == 0 and len(whole) >= 8
    for step in (2, len(whole) // 2, len(whole) // 2 + 2):
        train(config(**options, resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{step}")))
        assert losses(tmp_path / "run") == whole


def test_options_that_do_not_go_together(config):
    with pytest.raises(
        InputError, match="per_device_train_batch_size is set to 2, but has no effect here: leave it out; the budget"
    ):
        config(max_tokens_per_batch=1000)
    with pytest.raises(InputError, match="max_patches_per_batch is 0, needs at least 1"):
        config(**{**BUDGET, "max_patches_per_batch": 0})
    with pytest.raises(InputError, match="count no padding: they need flatten"):
        config(**BUDGET, flatten=False)


@pytest.mark.slow
def test_two_real_ranks(launch, tiny, records, tmp_path):
    """An epoch in one step, as one micro-batch and as two or three on each of two gloo ranks: equal losses."""
    for ranks, tokens, accumulation in ((1, 10**6, 1), (2, 700, 16)):
        output = tmp_path / str(ranks)
        launch(
            ROOT / "scripts/train.py", "--model_name_or_path", tiny, "--train_json", records["train"],
            "--output_dir", output, "--use_cpu", "--num_train_epochs", 2, "--max_tokens_per_batch", tokens,
            "--gradient_accumulation_steps", accumulation, "--logging_steps", 1, "--lora_dropout", 0,
            "--save_strategy", "no", "--learning_rate", 1e-3, "--dataloader_num_workers", 1,
            "--swanlab_mode", "disabled", ranks=ranks,
        )  # fmt: skip
    one, two = (losses(tmp_path / name) for name in ("1", "2"))
    assert len(one) == len(two) == 2
    assert two == pytest.approx(one, rel=2e-5)
