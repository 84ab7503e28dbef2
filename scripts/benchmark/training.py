"""Training speed and peak memory, this library against the tutorial's script, in one run; prints JSON.

    python scripts/benchmark/training.py --data outputs/data/train.json --size 2b

The work: Qwen2-VL-2B's shape with random bfloat16 weights (or `--size tiny` on a CPU), LoRA r 64 / alpha 16 /
dropout 0.05 on the language model's linear layers, AdamW, clipping, every picture at 504 x 112, through
`latexocr.train` itself: data loading, optimiser and logging included. Each variant runs in a process of its own;
its figure is the median over the log lines after the first two (start-up and compilation).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LINES_LEFT_OUT = 2
# name -> options of `latexocr train`; batch x accumulation is 16 unless the name says otherwise
VARIANTS = {
    "padded 4x4": {"flatten": False, "compile_layers": False},
    "padded 16x1": {"flatten": False, "compile_layers": False, "batch": 16},
    "flattened 16x1": {"compile_layers": False, "batch": 16},
    "flattened, compiled 4x4": {},
    "flattened, compiled 16x1": {"batch": 16},
    "flattened, compiled 64x1": {"batch": 64},
    "flattened, compiled, checkpointing 16x1": {"batch": 16, "gradient_checkpointing": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="train.json of real formulas")
    parser.add_argument("--size", choices=["tiny", "2b"], default="2b")
    parser.add_argument("--steps", type=int, default=60, help="steps of 16 samples; fewer for larger batches")
    parser.add_argument("--only", nargs="+", help="names of variants; 'tutorial' is the baseline")
    arguments = parser.parse_args()
    chosen = arguments.only or ["tutorial", *VARIANTS]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        dtype = "bfloat16" if arguments.size == "2b" else "float32"
        _run([sys.executable, str(ROOT / "scripts/build.py"), "--output", str(model), "--size", arguments.size,
              "--dtype", dtype])  # fmt: skip
        results = [_measure(name, model, arguments, Path(folder)) for name in chosen]
    baseline = next((row["samples_per_second"] for row in results if row["variant"] == "tutorial"), None)
    for row in results:
        row["over_tutorial"] = round(row["samples_per_second"] / baseline, 1) if baseline else None
    print(json.dumps({"machine": _machine(), "results": results}, indent=2))


def _measure(name: str, model: Path, arguments: argparse.Namespace, folder: Path) -> dict:
    output = folder / name.replace(" ", "_").replace(",", "")
    common = ["--model_name_or_path", str(model), "--train_json", str(arguments.data), "--output_dir", str(output)]
    if name == "tutorial":
        _run([sys.executable, str(ROOT / "scripts/benchmark/tutorial.py"), *common])
    else:
        options = {"batch": 4, **VARIANTS[name]}
        batch = options.pop("batch")
        options |= {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": max(1, 16 // batch),
            "max_steps": max(10, arguments.steps * 16 // max(16, batch)),
            "image_mode": "fixed",
            "logging_steps": 5,
            "save_strategy": "no",
            "swanlab_mode": "disabled",
            "disable_tqdm": True,
        }
        flags = [word for key, value in options.items() for word in (f"--{key}", str(value).lower())]
        _run([sys.executable, str(ROOT / "scripts/train.py"), *common, *flags])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "samples_per_second" in line]
    return {
        "variant": name,
        "samples_per_second": round(
            statistics.median(line["samples_per_second"] for line in lines[LINES_LEFT_OUT:]), 2
        ),
        "peak_memory_gib": lines[-1].get("peak_memory_gib"),
        "losses": [round(line["loss"], 4) for line in lines],
    }


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def _machine() -> dict:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    packages = ("torch", "transformers", "peft", "accelerate")
    return {"device": device, **{package: importlib.metadata.version(package) for package in packages}}


if __name__ == "__main__":
    main()
