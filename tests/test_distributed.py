"""Two real gloo ranks on the CPU against one process: same losses, same validation, one tracked run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, as_words, launch_by

from latexocr.metrics_file import read_metrics
from latexocr.train import train

pytestmark = pytest.mark.slow


def train_on(launch, ranks: int, batch: int, tiny, records, output: Path, *extra: str) -> None:
    arguments = [
        str(ROOT / "scripts/train.py"), "--model_name_or_path", str(tiny), "--train_json", str(records["train"]),
        "--val_json", str(records["val"]), "--output_dir", str(output), "--use_cpu", "--num_train_epochs", "2",
        "--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", "2", "--logging_steps", "1",
        "--lora_dropout", "0", "--learning_rate", "1e-3", "--dataloader_num_workers", "0", "--max_new_tokens", "8",
        "--per_device_eval_batch_size", "2", "--swanlab_mode", "offline", *extra,
    ]  # fmt: skip
    done = launch(*arguments, ranks=ranks)
    assert done.stdout.count("trainable   ") == 1  # only the main process speaks


def test_two_ranks_equal_one_process(tiny, records, tmp_path):
    """24 records in steps of 10 (one rank of 10, two of 5) do not divide: no sample twice, none lost. Real starts."""
    launch = partial(launch_by, sys.executable)
    train_on(launch, 1, 10, tiny, records, tmp_path / "one", "--gradient_accumulation_steps", "1")
    train_on(launch, 2, 5, tiny, records, tmp_path / "two", "--gradient_accumulation_steps", "1")
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_edit_distance", "eval_exact_match"):
        found = {name: [row[key] for row in rows if key in row] for name, rows in (("one", one), ("two", two))}
        assert len(found["one"]) == (2 if key.startswith("eval") else 6), key
        assert found["two"] == pytest.approx(found["one"], rel=2e-5), key
    for name in ("one", "two"):
        contract = json.loads((tmp_path / name / "adapter/latexocr.json").read_text())
        assert contract["training"]["evaluation"]["eval_num_rows"] == 7
        assert len(list((tmp_path / name / "swanlog").glob("run-*"))) == 1


def test_two_ranks_equal_one_process_with_every_weight(launch, tiny, records, tmp_path):
    """From fresh weights, with corrupted answers: what becomes of a record does not depend on its rank."""
    options = ["--gradient_accumulation_steps", "1", "--finetuning", "full", "--init_from_config", "true",
               "--token_corruption", "0.3"]  # fmt: skip
    train_on(launch, 1, 10, tiny, records, tmp_path / "one", *options)
    train_on(launch, 2, 5, tiny, records, tmp_path / "two", *options)
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for key, count in {"loss": 6, "grad_norm": 6, "eval_loss": 2, "eval_edit_distance": 2}.items():
        found = {name: [row[key] for row in rows if key in row] for name, rows in (("one", one), ("two", two))}
        assert len(found["one"]) == count and found["two"] == pytest.approx(found["one"], rel=1e-4), key
    assert (tmp_path / "two/model/model.safetensors").is_file()


def test_accumulation_on_two_ranks(launch, tiny_models, records, tmp_path):
    """2 ranks x 2 records x 2 micro-batches are one process's 8 records; 5 generated rows on 2 ranks. Qwen2.5-VL."""
    tiny = tiny_models["qwen2_5_vl"]
    options = ["--eval_generate_samples", "5", "--metric_for_best_model", "glyph_f1"]  # rendered by one rank only
    train_on(launch, 1, 8, tiny, records, tmp_path / "one", "--gradient_accumulation_steps", "1", *options)
    train_on(launch, 2, 2, tiny, records, tmp_path / "two", *options)
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for key, count in {"loss": 6, "eval_glyph_f1": 2, "eval_render_rate": 2}.items():
        found = {name: [row[key] for row in rows if key in row] for name, rows in (("one", one), ("two", two))}
        assert len(found["one"]) == count and found["two"] == pytest.approx(found["one"], rel=2e-5), key


def test_two_nodes_equal_one_process(python, config, tiny, records, tmp_path):
    """Two launchers that meet at a port, as on two machines, with one rank each; they share the output folder."""
    options = {"max_steps": 3, "gradient_accumulation_steps": 1, "lora_r": 8, "lora_dropout": 0, "logging_steps": 1,
               "learning_rate": 1e-3, "dataloader_num_workers": 0, "max_new_tokens": 8}  # fmt: skip
    if find_spec("bitsandbytes"):
        options["load_in_4bit"] = True  # each rank rounds its own copy
    train_words = [
        str(ROOT / "scripts/train.py"), "--model_name_or_path", str(tiny), "--train_json", str(records["train"]),
        "--output_dir", str(tmp_path / "two"), "--use_cpu", "--per_device_train_batch_size", "4",
        "--swanlab_mode", "disabled", *as_words(options),
    ]  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [
        subprocess.Popen(
            [python, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank",
             str(rank), "--master_addr", "127.0.0.1", "--master_port", port, *train_words],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    assert ["trainable   " in printed for printed, _ in outputs] == [True, False]
    train(config(**options, per_device_train_batch_size=8, output_dir=str(tmp_path / "one")))
    one, two = ([row for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    for key in ("loss", "grad_norm"):
        assert len(two) == 3 and [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=2e-5)
    names = {path.name for path in (tmp_path / "two/checkpoint-3").iterdir()}
    assert {"adapter_model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= names


def test_two_ranks_stop_together(python, tiny, records, tmp_path):
    """SIGTERM to one rank only: both leave after the same step, with one checkpoint."""
    import signal
    import time

    from latexocr.metrics_file import METRICS_FILE

    arguments = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "scripts/train.py"),
        "--model_name_or_path", str(tiny), "--train_json", str(records["train"]), "--output_dir", str(tmp_path),
        "--use_cpu", "--max_steps", "500", "--logging_steps", "1", "--dataloader_num_workers", "0",
        "--swanlab_mode", "disabled", "--save_strategy", "no",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / METRICS_FILE).is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGTERM)
    process.communicate(timeout=120)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert (checkpoint / "latexocr.json").is_file() and (checkpoint / "rng_state_1.pth").is_file()


def test_two_ranks_equal_one_process_with_every_variant(launch, tiny, records, config, tmp_path):
    """PiSSA, DoRA, LoRA+, new tokens and rates of parts, together."""
    options = {"lora_init": "pissa", "use_dora": True, "loraplus_lr_ratio": 4, "new_tokens": [r"\frac"],
               "max_steps": 3, "gradient_accumulation_steps": 1, "lora_components": ["attention", "merger"],
               "learning_rates": {"new_tokens": 1e-2, "merger": 1e-4}}  # fmt: skip
    train(config(per_device_train_batch_size=10, lora_r=64, output_dir=str(tmp_path / "one"), **options))
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({**options, "eval_strategy": "no"}))
    train_on(launch, 2, 5, tiny, records, tmp_path / "two", "--config", str(tmp_path / "options.yaml"),
             "--gradient_accumulation_steps", "1")  # fmt: skip
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for key in ("loss", "grad_norm"):
        found = [[row[key] for row in rows if key in row] for rows in (one, two)]
        assert len(found[0]) == 3 and found[1] == pytest.approx(found[0], rel=1e-4), key
