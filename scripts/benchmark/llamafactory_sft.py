"""The other peer: LLaMA-Factory on the same work, with its fastest options (`neat_packing`) or plain batches.

Pictures are given to it ready at 504 x 112. `--neat_packing true`: records are packed into rows of as many tokens as
`per_device_train_batch_size` records have on average, one row a micro-batch. Version 0.9.5 asks for older versions of
transformers and peft than this library needs; DISABLE_VERSION_CHECK=1, which this script sets, lets it run with newer
ones. Needs `llamafactory` and `datasets`. Writes metrics.jsonl like `latexocr train`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ["DISABLE_VERSION_CHECK"] = "1"  # read when it is imported

import peers
import torch
from llamafactory.train.tuner import run_exp
from PIL import Image

MEAN_TOKENS = 176  # of a record: 72 of the picture, 31 of prompt and template, the answer


def main() -> None:
    arguments = peers.parse_arguments(__doc__)
    options = peers.shape(arguments)
    batch = options["per_device_train_batch_size"]
    packed = arguments.neat_packing == "true"
    rows = peers.read_rows(arguments)
    folder = write_dataset(rows, arguments.output_dir / "data")
    if packed:
        options["per_device_train_batch_size"] = 1
    on_gpu = torch.cuda.is_available()
    items = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    meter = PackMeter(arguments.output_dir, items, num_rows=len(rows))
    settings = {
        **options, "model_name_or_path": str(arguments.model_name_or_path), "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "lora_rank": 64, "lora_alpha": 16, "lora_dropout": 0.05,
        "lora_target": ",".join(peers.LAYERS), "template": "qwen2_vl", "dataset": "formulas",
        "dataset_dir": str(folder), "cutoff_len": batch * MEAN_TOKENS if packed else 2048, "packing": packed,
        "neat_packing": packed, "flash_attn": "sdpa", "bf16": on_gpu, "use_cpu": not on_gpu,
        "disable_gradient_checkpointing": arguments.gradient_checkpointing != "true",
        "dataloader_num_workers": 8 if on_gpu else 0, "preprocessing_num_workers": 8 if on_gpu else 1,
        "learning_rate": 1e-4, "save_strategy": "no", "report_to": "none", "overwrite_output_dir": True,
    }  # fmt: skip
    run_exp(settings, callbacks=[meter])


class PackMeter(peers.Meter):
    """Counts records, of which one item of the packed data set holds several."""

    def __init__(self, output_dir: Path, items_a_step: int, *, num_rows: int) -> None:
        super().__init__(output_dir, items_a_step)
        self.num_rows = num_rows

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        self.samples_a_step *= self.num_rows / len(train_dataloader.dataset)
        self.write(preparing={"records_an_item": round(self.num_rows / len(train_dataloader.dataset), 2)})


def write_dataset(rows: list[dict[str, str]], folder: Path) -> Path:
    """Its ShareGPT format, with its index file."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, row in enumerate(rows):
        picture = folder / f"{number}.png"
        Image.open(row["image"]).convert("RGB").resize(peers.PICTURE_SIZE).save(picture)
        turns = [("user", "<image>" + peers.PROMPT), ("assistant", row["text"])]
        records.append({"messages": [{"role": role, "content": text} for role, text in turns],
                        "images": [str(picture)]})  # fmt: skip
    (folder / "formulas.json").write_text(json.dumps(records), encoding="utf-8")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    index = {"formulas": {"file_name": "formulas.json", "formatting": "sharegpt", "columns": columns, "tags": tags}}
    (folder / "dataset_info.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
