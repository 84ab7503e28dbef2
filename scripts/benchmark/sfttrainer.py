"""The peer to beat: TRL's SFTTrainer on the same work, tuned as far as its options go.

Loss on the completion only (its own chunked loss, no full logits), bfloat16, SDPA attention, fused AdamW, pictures
decoded and prepared in workers that stay alive, pinned memory, DDP without the search for unused parameters. Packing
and padding-free batches are refused for pictures by TRL 1.16 itself. Named after the class: a file trl.py would hide
the package. Needs `trl` and `datasets`. Writes metrics.jsonl like `latexocr train`.
"""

from __future__ import annotations

import os

import datasets
import peers
import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

MAX_WORKERS = 8


def main() -> None:
    arguments = peers.parse_arguments(__doc__)
    on_gpu = torch.cuda.is_available()
    processor = AutoProcessor.from_pretrained(arguments.model_name_or_path)
    width, height = peers.PICTURE_SIZE
    processor.image_processor.size = {"shortest_edge": width * height, "longest_edge": width * height}
    model = AutoModelForImageTextToText.from_pretrained(
        arguments.model_name_or_path, dtype=torch.bfloat16 if on_gpu else torch.float32, attn_implementation="sdpa"
    )
    options = peers.shape(arguments)
    workers = min(MAX_WORKERS, os.cpu_count() or 1) if on_gpu else 0
    meter = peers.Meter(
        arguments.output_dir, options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    )
    SFTTrainer(
        model=model,
        args=SFTConfig(
            **options, learning_rate=1e-4, gradient_checkpointing=arguments.gradient_checkpointing == "true",
            bf16=on_gpu, optim="adamw_torch_fused", max_length=None, completion_only_loss=True,
            dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0, dataloader_pin_memory=on_gpu,
            logging_nan_inf_filter=False, ddp_find_unused_parameters=False, save_strategy="no", report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=as_conversations(peers.read_rows(arguments)),
        processing_class=processor,
        peft_config=LoraConfig(target_modules=rf".*language_model.*\.(?:{'|'.join(peers.LAYERS)})", **peers.LORA),
        callbacks=[meter],
    ).train()  # fmt: skip


def as_conversations(rows: list[dict[str, str]]) -> datasets.Dataset:
    """Prompt, completion and picture; pictures are decoded and resized when they are asked for, in a worker."""
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": peers.PROMPT}]}]
    dataset = datasets.Dataset.from_list(
        [{"images": [row["image"]], "prompt": question,
          "completion": [{"role": "assistant", "content": [{"type": "text", "text": row["text"]}]}]} for row in rows]
    ).cast_column("images", datasets.List(datasets.Image()))  # fmt: skip
    return dataset.with_transform(resized)


def resized(batch: dict) -> dict:
    pictures = [[image.convert("RGB").resize(peers.PICTURE_SIZE) for image in images] for images in batch["images"]]
    return {**batch, "images": pictures}


if __name__ == "__main__":
    main()
