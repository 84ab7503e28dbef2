"""What the scripts of the peers share: their arguments, LoRA settings and metrics.jsonl in this library's format."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

PROMPT = "Write the LaTeX of the formula in this image."
PICTURE_SIZE = (504, 112)
LORA = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none", "task_type": "CAUSAL_LM"}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parse_arguments(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    for name in ("model_name_or_path", "train_json", "output_dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--per_device_train_batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=4)
    parser.add_argument("--gradient_checkpointing", default="false")
    parser.add_argument("--neat_packing", default="false", help="LLaMA-Factory only")
    parser.add_argument("--logging_steps", type=int, default=2)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--num_train_epochs", type=float, default=2)
    parser.add_argument("--num_samples", type=int, default=None, help="first records only; all with epochs")
    arguments = parser.parse_args()
    if arguments.max_steps > 0 and arguments.num_samples is None:
        seen = arguments.max_steps * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        arguments.num_samples = min(320, seen)
    return arguments


def shape(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part of the Trainer's arguments that the caller chooses."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "max_steps",
             "num_train_epochs")  # fmt: skip
    return {"output_dir": str(arguments.output_dir), **{name: getattr(arguments, name) for name in names}}


def read_rows(arguments: argparse.Namespace) -> list[dict[str, str]]:
    rows = json.loads(arguments.train_json.read_text(encoding="utf-8"))[: arguments.num_samples]
    pairs = [[turn["value"] for turn in row["conversations"]] for row in rows]
    return [{"image": str(arguments.train_json.parent / image), "text": text} for image, text in pairs]


class Meter(TrainerCallback):
    """Samples a second since the last log line."""

    def __init__(self, output_dir: Path, samples_a_step: int) -> None:
        self.path, self.samples_a_step = output_dir / "metrics.jsonl", samples_a_step
        self.since, self.step = time.perf_counter(), 0

    def write(self, **line: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        if "train_runtime" in logs:
            self.write(train_runtime=logs["train_runtime"])
        if "loss" not in logs or state.global_step == self.step:
            return
        now = time.perf_counter()  # logging has fetched the loss, so the GPU is done with these steps
        samples = (state.global_step - self.step) * self.samples_a_step
        line = {"step": state.global_step, "loss": float(logs["loss"]),
                "samples_per_second": samples / (now - self.since)}  # fmt: skip
        if torch.cuda.is_available():
            line["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.since, self.step = now, state.global_step
        self.write(**line)
