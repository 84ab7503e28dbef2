"""Preprocessing speed on one core, this library against the tutorial's function, in one run; prints JSON.

    python scripts/benchmark/preprocessing.py --data outputs/data/train.json

The tutorial's function, written afresh from its description: the picture resized to 504 x 112 by
`qwen_vl_utils.process_vision_info`, the processor's call, everything through `.tolist()` and back, rows through
`datasets.Dataset.map` into an Arrow file. Where a package is missing, PIL and a list stand in; "tutorial_through" says
what was there. Ours gives the same arrays one by one ("as arrays"), or what training makes the workers do: pixels as
bytes, normalised on the GPU ("as in training", with the collator). One process, one thread; CPU seconds, because other
work on the machine disturbs them least.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import common
import torch
from peers import PROMPT

HEIGHT, WIDTH, MAX_LENGTH, BATCH = 112, 504, 8192, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="train.json of real formulas")
    parser.add_argument("--model", type=Path, help="folder with a processor; a tiny Qwen2-VL is built by default")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--tutorial_samples", type=int, default=100)
    parser.add_argument("--output", type=Path, help="file for the JSON, which is printed in any case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or Path(folder) / "model"
        if not arguments.model:
            common.script("build", "--output", model)
        tutorial = _tutorial(arguments.data, model, arguments.tutorial_samples, Path(folder))
        ours = _ours(arguments.data, model, arguments.samples)
    results = {"tutorial": tutorial, **ours}
    rates = {name: {"samples_per_second": round(rate, 1), "over_tutorial": round(rate / tutorial, 1)}
             for name, rate in results.items()}  # fmt: skip
    through = [package for package in ("qwen_vl_utils", "datasets") if _has(package)]
    common.report(arguments, rates, tutorial_through=through)


def _ours(data: Path, model: Path, num_samples: int) -> dict[str, float]:
    from transformers import AutoConfig

    from latexocr.collate import FlattenedCollator
    from latexocr.dataset import FormulaDataset
    from latexocr.records import read_records
    from latexocr.tower import Tower
    from latexocr.train import TrainConfig, load_preprocessor

    options = {"image_mode": "fixed", "image_height": HEIGHT, "image_width": WIDTH}
    folder, preprocessor = load_preprocessor(TrainConfig(model_name_or_path=str(model), use_cpu=True, **options))
    records = read_records(data)[:num_samples]
    dataset = FormulaDataset(records, preprocessor, as_bytes=True)
    tower = Tower.of(preprocessor.family, AutoConfig.from_pretrained(folder))
    collate = FlattenedCollator(tokenizer=preprocessor.processor.tokenizer, family=preprocessor.family, tower=tower)

    def batches() -> None:
        for start in range(0, len(records), BATCH):
            collate([dataset[index] for index in range(start, min(start + BATCH, len(records)))])

    return {
        "as arrays": len(records) / _seconds(lambda: [preprocessor(record) and None for record in records]),
        "as in training": len(records) / _seconds(batches),
    }


def _tutorial(data: Path, model: Path, num_samples: int, folder: Path) -> float:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    rows = json.loads(data.read_text(encoding="utf-8"))[:num_samples]
    for row in rows:
        row["conversations"][0]["value"] = str(data.parent / row["conversations"][0]["value"])
    if not _has("datasets"):
        return len(rows) / _seconds(lambda: [prepare(row, processor) for row in rows])
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    table, runs = Dataset.from_list(rows), itertools.count()

    def run() -> None:
        table.map(lambda row: prepare(row, processor), cache_file_name=str(folder / f"{next(runs)}.arrow"))

    return len(rows) / _seconds(run)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _pictures(messages: list[dict[str, Any]]) -> tuple[list[Any], Any]:
    """Pictures and videos of a conversation, resized."""
    if _has("qwen_vl_utils"):
        from qwen_vl_utils import process_vision_info

        return process_vision_info(messages)
    from PIL import Image

    picture = messages[0]["content"][0]
    size = (picture["resized_width"], picture["resized_height"])
    return [Image.open(picture["image"]).convert("RGB").resize(size)], None


def prepare(row: dict[str, Any], processor: Any) -> dict[str, Any]:
    """One row as the tutorial makes it."""
    image_path, answer = (turn["value"] for turn in row["conversations"])
    picture = {"type": "image", "image": image_path, "resized_height": HEIGHT, "resized_width": WIDTH}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": PROMPT}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos = _pictures(messages)
    inputs = processor(text=[text], images=images, videos=videos, padding=True, return_tensors="pt")
    inputs = {key: value.tolist() for key, value in inputs.items()}
    response = processor.tokenizer(answer, add_special_tokens=False)["input_ids"] + [processor.tokenizer.pad_token_id]
    prompt_ids = inputs["input_ids"][0]
    return {
        "input_ids": torch.tensor((prompt_ids + response)[:MAX_LENGTH]),
        "attention_mask": torch.tensor((inputs["attention_mask"][0] + [1] * len(response))[:MAX_LENGTH]),
        "labels": torch.tensor(([-100] * len(prompt_ids) + response)[:MAX_LENGTH]),
        "pixel_values": torch.tensor(inputs["pixel_values"]),
        "image_grid_thw": torch.tensor(inputs["image_grid_thw"]).squeeze(0),
    }


def _seconds(work: Callable[[], Any], rounds: int = 3) -> float:
    """CPU seconds, the best of a few rounds: other work on the machine disturbs them least."""
    found = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


if __name__ == "__main__":
    main()
