"""SIGTERM and Ctrl-C on the real command: a checkpoint, no traceback, and the losses of an uninterrupted run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from latexocr.metrics_file import read_metrics

pytestmark = pytest.mark.slow


def words(tiny, records, output, *extra: str) -> list[str]:
    return [
        "-m", "latexocr", "train", "--model_name_or_path", str(tiny), "--train_json",
        str(records["train"]), "--output_dir", str(output), "--use_cpu", "--max_steps", "24",
        "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--logging_steps", "1",
        "--lora_dropout", "0.1", "--dataloader_num_workers", "1", "--swanlab_mode", "disabled",
        "--save_strategy", "no", *extra,
    ]  # fmt: skip


def run_until(step: int, arguments: list[str], output) -> subprocess.Popen:
    """Start training and return once it has logged `step`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "metrics.jsonl").is_file() and len(read_metrics(output / "metrics.jsonl")) >= step:
            return process
        time.sleep(0.005)
    process.kill()
    raise AssertionError(process.communicate()[1])


def steps_and_losses(output) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(output / "metrics.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def whole(launch, tiny, records, tmp_path_factory) -> list[tuple[float, float]]:
    """Steps and losses of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    launch(*words(tiny, records, output))
    return steps_and_losses(output)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_that_continues(number, status, whole, launch, tiny, records, tmp_path):
    """The process that is stopped has started as a user starts it."""
    parts = tmp_path / "parts"
    process = run_until(3, [sys.executable, *words(tiny, records, parts)], parts)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err, err
    assert f"stopped by signal {int(number)}" in out and "--resume_from_checkpoint true" in out
    (checkpoint,) = parts.glob("checkpoint-*")
    assert {"adapter_model.safetensors", "latexocr.json", "optimizer.pt", "trainer_state.json"} <= {
        path.name for path in checkpoint.iterdir()
    }
    stopped_at = int(checkpoint.name.split("-")[1])
    assert 3 <= stopped_at < 24 and not (parts / "adapter").exists()
    launch(*words(tiny, records, parts, "--resume_from_checkpoint", "true"))
    assert steps_and_losses(parts) == whole
    assert (parts / "adapter/latexocr.json").is_file()


def test_a_signal_during_validation(python, tiny, records, tmp_path):
    """Validation can be long: the checkpoint is written at once, not after it."""
    arguments = words(tiny, records, tmp_path, "--val_json", str(records["train"]), "--eval_strategy", "steps",
                      "--eval_steps", "2", "--per_device_eval_batch_size", "1", "--max_new_tokens", "512",
                      "--eval_generate_samples", "24", "--generate_batch_size", "1")  # fmt: skip
    process = run_until(2, [python, *arguments], tmp_path)
    time.sleep(1.0)  # inside the first validation, which takes tens of seconds
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert (tmp_path / "checkpoint-2/latexocr.json").is_file()


def test_the_checkpoint_stays_where_only_one_is_kept(python, tiny, records, tmp_path):
    """transformers deletes the last one at the end of training unless it is the best, which has been evaluated."""
    arguments = words(tiny, records, tmp_path, "--val_json", str(records["val"]), "--eval_strategy", "steps",
                      "--eval_steps", "3", "--save_steps", "3", "--save_total_limit", "1",
                      "--eval_generate_samples", "0")  # fmt: skip
    arguments[arguments.index("--save_strategy") + 1] = "steps"
    process = run_until(5, [python, *arguments], tmp_path)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    last = max(row["step"] for row in read_metrics(tmp_path / "metrics.jsonl"))
    assert (tmp_path / f"checkpoint-{last}/latexocr.json").is_file()


def test_metrics_survive_a_kill(python, tiny, records, tmp_path):
    process = run_until(4, [python, *words(tiny, records, tmp_path)], tmp_path)
    process.kill()
    process.communicate()
    steps = [step for step, _ in steps_and_losses(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 4
