"""What the benchmarks share: a model of random weights, training in a process of its own, the machine, JSON out."""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(1, str(ROOT))  # the checkout, behind the benchmarks themselves
LINES = 12  # log lines of a run; the figures are medians over all but the first ones (start-up, compilation)
LINES_LEFT_OUT = 2
KEPT = ("peak_memory_gib", "reserved_memory_gib", "train_runtime", "preparing", "eval_loss")  # the last of each
SCRIPTS = {
    "tutorial": HERE / "tutorial.py",
    "trl": HERE / "sfttrainer.py",
    "llamafactory": HERE / "llamafactory_sft.py",
}
SITES: dict[str, Path] = {}  # system -> folder of packages that it alone sees (pip install --target)
# how this library trains: name -> options of `latexocr train`
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "padded": {"flatten": False, "fused_layers": False},
    "flattened": {"fused_layers": False, "fused_lora": False},
    "float32": {"bf16": False, "flatten": False, "fused_layers": False},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "checkpointing": {"gradient_checkpointing": True},
    "packing": {"neat_packing": True},  # llamafactory
}
SHARDED = ("fsdp2", "zero3")  # files in scripts/accelerate
LAUNCHER = "torch/distributed/elastic/multiprocessing/api.py"  # speaks after the ranks have said what is wrong
# every benchmark's work: pictures at 504 x 112, nothing saved, nothing tracked
WORK = {"image_mode": "fixed", "save_strategy": "no", "swanlab_mode": "disabled", "disable_tqdm": True}


class Failed(Exception):
    """A command that did not end well; the message is the end of its output."""


def parser(doc: str) -> argparse.ArgumentParser:
    """The arguments that all training benchmarks take."""
    found = argparse.ArgumentParser(description=doc.split("\n")[0])
    found.add_argument("--data", type=Path, required=True, help="train.json of real formulas")
    found.add_argument("--size", choices=["tiny", "2b"], default="2b")
    found.add_argument("--model", type=Path, help="folder of the model: used again when it is there, else built")
    found.add_argument("--output", type=Path, help="file for the JSON, which is printed in any case")
    return found


@contextmanager
def workplace(arguments: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """The model's folder, and one for whatever a run leaves."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.model or folder / "model"
        if not (model / "config.json").is_file():
            texts = [
                row["conversations"][1]["value"] for row in json.loads(arguments.data.read_text(encoding="utf-8"))
            ]
            (folder / "formulas.txt").write_text("\n".join(" ".join(text.split()) for text in texts), encoding="utf-8")
            dtype = "bfloat16" if arguments.size == "2b" else "float32"
            script("build", "--output", model, "--size", arguments.size, "--dtype", dtype, "--corpus",
                   folder / "formulas.txt")  # fmt: skip
        yield model, folder


def script(verb: str, *words: Any) -> str:
    """Run `scripts/VERB.py`."""
    return run([sys.executable, ROOT / f"scripts/{verb}.py", *words])


def run(command: list[Any], site: Path | None = None) -> str:
    """A command's output; packages are found in `site` first.

    Raises:
        Failed: an exit status other than 0.
    """
    # NVLink multicast can put GPUs that are shared with others out of service
    environment = {"NCCL_NVLS_ENABLE": "0", **os.environ}
    if site:
        environment["PYTHONPATH"] = os.pathsep.join([str(site), environment.get("PYTHONPATH", "")])
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        said = done.stderr.split(LAUNCHER)[0] or done.stderr
        raise Failed(f"{' '.join(map(str, command))}\n{done.stdout[-1000:]}\n{said[-3000:]}")
    return done.stdout


def flags(options: dict[str, Any]) -> list[str]:
    """
    >>> flags({"lora_dropout": 0, "flatten": False})
    ['--lora_dropout', '0', '--flatten', 'false']
    """
    return [word for name, value in options.items() for word in (f"--{name}", str(value).lower())]


def train(
    variant: str,
    model: Path,
    data: Path,
    output: Path,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    ranks: int = 1,
    sharded: str | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train one variant in a process of its own and read its metrics.

    Args:
        variant: system, samples x micro-batches of a step, options: "tutorial 4x4", "ours 16x1 checkpointing".
        steps: optimiser steps, or
        epochs: passes over all of `data`.
        ranks: processes, one a GPU; this library only.
        sharded: by what the weights are spread over the ranks, one of `SHARDED`.
        options: more options of `latexocr train`.

    Raises:
        Failed: for example out of memory.
    """
    system, shape, *extras = variant.split()
    batch, accumulation = map(int, shape.split("x"))
    steps_known = steps or epochs * len(json.loads(data.read_text(encoding="utf-8"))) // (batch * accumulation)
    given = {
        "model_name_or_path": model, "train_json": data, "output_dir": output, "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation, "logging_steps": max(1, steps_known // LINES),
        **({"max_steps": steps} if steps else {"num_train_epochs": epochs}),
    }  # fmt: skip
    for extra in extras:
        given |= OPTIONS[extra]
    if system in SCRIPTS:
        command = [sys.executable, SCRIPTS[system], *_flags(given)]
    else:
        started = [sys.executable] if ranks == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks]  # fmt: skip
        if sharded:
            started = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
                       ROOT / f"scripts/accelerate/{sharded}.yaml", "--num_processes", ranks]  # fmt: skip
        command = [*started, ROOT / "scripts/train.py", *_flags({**given, **WORK, **OURS[system], **(options or {})})]
    begun = time.perf_counter()
    run(command, SITES.get(system))
    found = {"variant": variant, **summary(output / "metrics.jsonl"), "process_seconds": _seconds_since(begun)}
    print(json.dumps({"ranks": ranks, **found}), file=sys.stderr, flush=True)  # nothing is lost if a later one fails
    return found


def first_rows(data: Path, target: Path, number: int) -> Path:
    """The first records of a train.json as a file of their own; the pictures stay where they are."""
    rows = json.loads(data.read_text(encoding="utf-8"))[:number]
    for row in rows:
        turn = row["conversations"][0]
        turn["value"] = str((data.parent / turn["value"]).resolve())
    target.write_text(json.dumps(rows), encoding="utf-8")
    return target


def _flags(options: dict[str, Any]) -> list[str]:
    paths = {name: value for name, value in options.items() if isinstance(value, Path)}
    others = {name: value for name, value in options.items() if name not in paths}
    return [*(word for name, path in paths.items() for word in (f"--{name}", str(path))), *flags(others)]


def _seconds_since(begun: float) -> float:
    return round(time.perf_counter() - begun, 1)


def summary(metrics: Path) -> dict[str, Any]:
    """Medians and losses of a run's metrics.jsonl."""
    from latexocr.metrics_file import read_metrics

    lines = read_metrics(metrics)
    logs = [line for line in lines if "samples_per_second" in line]
    counted = logs[LINES_LEFT_OUT:] or logs
    found: dict[str, Any] = {}
    for name in ("samples_per_second", "tokens_per_second", "waiting_for_data"):
        values = [line[name] for line in counted if name in line]
        if values:
            found[name] = round(statistics.median(values), 4)
    for line in lines:
        found |= {name: line[name] for name in KEPT if name in line}
    return {**found, "losses": [round(line["loss"], 5) for line in logs]}


def steps_for(variant: str, samples: int = 2400, least: int = 16, most: int = 150) -> int:
    """So many steps that about `samples` samples are seen; fewer of the slow peers'.

    >>> steps_for("ours 16x1"), steps_for("ours 64x1"), steps_for("tutorial 4x4")
    (150, 37, 16)
    """
    system, shape, *_ = variant.split()
    batch, accumulation = map(int, shape.split("x"))
    return least if system in SCRIPTS else min(most, max(least, samples // (batch * accumulation)))


def matmul_tflops() -> float:
    """TFLOP/s of an 8192^3 bfloat16 product, measured on random numbers in a process of its own."""
    return float(run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(HERE)!r}); import common; "
                                            "print(common._matmul_tflops())"]))  # fmt: skip


def _matmul_tflops(repeats: int = 20) -> float:
    import torch

    on_gpu = torch.cuda.is_available()
    size, device = (8192, "cuda") if on_gpu else (512, "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        a @ b
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / statistics.median(seconds[repeats // 4 :]) / 1e12


def flop_per_sample(model: Path, data: Path) -> float:
    """Work of one training sample on average: 4 FLOP per frozen language-model parameter and token (forward, and the
    gradient of the activations), 2 per vision parameter and patch (forward), 4 per weight of the head at every
    supervised position. Attention, adapters and recomputation are not counted."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from latexocr.train import TrainConfig, load_data

    loaded = load_data(
        TrainConfig(model_name_or_path=str(model), train_json=str(data), image_mode="fixed", use_cpu=True)
    )
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        parameters = dict(AutoModelForImageTextToText.from_config(config).named_parameters())
    language = sum(value.numel() for name, value in parameters.items() if ".language_model.layers." in name)
    vision = sum(value.numel() for name, value in parameters.items() if ".visual." in name)
    head = config.text_config.vocab_size * config.text_config.hidden_size
    patches_per_token = loaded.preprocessor.processor.image_processor.merge_size**2
    counts = loaded.training.counts
    total = sum(
        4 * language * count.total + 2 * vision * count.image * patches_per_token + 4 * head * count.answer
        for count in counts
    )
    return total / len(counts)


def read_formulas(path: Path) -> list[str]:
    """The last tab-separated column of a text file, gzipped or not."""
    content = path.read_bytes()
    lines = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8").splitlines()
    return [line.split("\t")[-1] for line in lines]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    on_gpu = torch.cuda.is_available()
    packages = ("torch", "transformers", "peft", "accelerate")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "num_devices": torch.cuda.device_count() if on_gpu else 1,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def report(arguments: argparse.Namespace, results: Any, **more: Any) -> None:
    """Print the JSON, and write it to `--output`."""
    command = " ".join(["python", f"scripts/benchmark/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    text = json.dumps({"command": command, "machine": machine(), **more, "results": results}, indent=2)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")
