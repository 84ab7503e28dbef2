"""Tiny models of the real architectures, built offline, and records over the bundled sample."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences a warning in forked data-loader workers

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "ernie4_5_vl_moe", "paddleocr_vl")


requires_tex = pytest.mark.skipif(
    not (shutil.which("latex") and shutil.which("dvipng")), reason="needs the programs latex and dvipng"
)


def requires(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs: pip install {package}")


def as_words(options: dict[str, Any]) -> list[str]:
    """Options as on a command line."""
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    from latexocr.build import build

    folder = tmp_path_factory.mktemp("models")
    for model_type in MODEL_TYPES:
        build(folder / model_type, corpus=SAMPLE / "metadata.jsonl", model_type=model_type)
    return {model_type: folder / model_type for model_type in MODEL_TYPES}


@pytest.fixture(scope="session")
def tiny(tiny_models) -> Path:
    return tiny_models["qwen2_vl"]


def write_records(path: Path, rows: list[tuple[str, str]]) -> Path:
    """A train.json of (image path, text) pairs."""
    records = [
        {
            "id": f"identity_{number}",
            "conversations": [{"role": "user", "value": image}, {"role": "assistant", "value": text}],
        }
        for number, (image, text) in enumerate(rows, 1)
    ]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def untied(tiny: Path, folder: Path) -> Path:
    """A base whose head has weights of its own, as those of 7B and above."""
    import torch

    from latexocr.modeling import load_base, load_processor

    model = load_base(tiny, dtype=torch.float32)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    model.save_pretrained(folder, save_original_format=True)
    load_processor(tiny).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> dict[str, Path]:
    """train.json of 24 and val.json of 7 bundled formulas."""
    lines = (SAMPLE / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:31]
    rows = [(str(SAMPLE / row["file_name"]), row["text"]) for row in map(json.loads, lines)]
    folder = tmp_path_factory.mktemp("records")
    return {
        "train": write_records(folder / "train.json", rows[:24]),
        "val": write_records(folder / "val.json", rows[24:]),
    }


@contextmanager
def warm_python(folder: Path, **environment: str) -> Iterator[str]:
    """A program for the place of sys.executable that takes torch and its friends from a server: see warm.py."""
    if sys.platform != "linux" or Path("/dev/nvidiactl").exists():  # a GPU's driver does not survive a fork
        yield sys.executable
        return
    warm, program = ROOT / "tests/warm.py", folder / "python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{warm}" ask "{folder}/socket" "$@"\n')
    program.chmod(0o755)
    command = [sys.executable, str(warm), "serve", f"{folder}/socket"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as server:
        assert server.stdout.readline() == b"ready\n"
        yield str(program)
        server.stdin.close()


@pytest.fixture(scope="session")
def python(tmp_path_factory) -> Iterator[str]:
    """For processes whose start is not the point."""
    with warm_python(tmp_path_factory.mktemp("python")) as program:
        yield program


def launch_by(python: str, script: Path | str, *words: object, ranks: int = 1, **environment: str) -> CompletedProcess:
    """Run a script in a process, or in as many gloo ranks by torch's launcher; it must succeed."""
    start = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [python, *start, *map(str, (script, *words))], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def launch(python) -> Callable[..., CompletedProcess]:
    return partial(launch_by, python)


@pytest.fixture
def config(tiny, records, tmp_path):
    """A TrainConfig of three steps on the CPU without dropout; keywords override."""
    from latexocr.train import TrainConfig

    def make(**options) -> TrainConfig:
        return TrainConfig(
            **{
                "model_name_or_path": str(tiny),
                "train_json": str(records["train"]),
                "output_dir": str(tmp_path / "run"),
                "use_cpu": True,
                "max_steps": 3,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 4,
                "learning_rate": 1e-3,
                "lora_r": 8,
                "lora_dropout": 0.0,
                "logging_steps": 1,
                "dataloader_num_workers": 0,
                "max_new_tokens": 8,
                "swanlab_mode": "disabled",
                "disable_tqdm": True,
                **options,
            }
        )

    return make


@pytest.fixture
def batch_of(tiny_models, config, records):
    """Two records of the sample for a family, padded or flattened."""
    from latexocr.collate import FormulaCollator
    from latexocr.records import read_records
    from latexocr.train import load_preprocessor

    def make(model_type: str, collator: type = FormulaCollator) -> dict[str, Any]:
        _, preprocessor = load_preprocessor(config(model_name_or_path=str(tiny_models[model_type])))
        samples = [preprocessor(record) for record in read_records(records["train"])[:2]]
        return collator(tokenizer=preprocessor.processor.tokenizer, family=preprocessor.family)(samples)

    return make


def chromium() -> str | None:
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; without it a test is skipped, on CI it fails, so that nobody loses these tests unseen."""
    if not chromium() or find_spec("playwright") is None:
        what = "needs: pip install playwright; apt-get install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(what)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_FLAGS)
        yield browser
        browser.close()
