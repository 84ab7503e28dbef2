"""The baseline: training as the widespread Qwen2-VL tutorial does it, written afresh from its description.

`Dataset.map` prepares every record one by one: each tensor becomes a list, a tensor again, and then Arrow on the
disk; training reads lists back. Stock Trainer and collator, logits at every position, 4 samples x 4 accumulated,
gradient checkpointing, LoRA on every layer with a listed name, a pad token behind the answer. Only
`mm_token_type_ids` is added, because transformers 5 needs it. Pictures are 504 x 112, as in its test code. Without
the package `datasets` the same lists are kept in memory. Writes metrics.jsonl like `latexocr train`.
"""

from __future__ import annotations

import importlib.util
import time

import peers
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

MAX_LENGTH = 8192


def main() -> None:
    arguments = peers.parse_arguments(__doc__)
    processor = AutoProcessor.from_pretrained(arguments.model_name_or_path)
    processor.tokenizer.padding_side = "right"
    model = AutoModelForImageTextToText.from_pretrained(
        arguments.model_name_or_path, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32
    )
    model.enable_input_require_grads()
    started, rows = time.perf_counter(), peers.read_rows(arguments)
    has_datasets = importlib.util.find_spec("datasets") is not None
    if has_datasets:
        import datasets

        source = arguments.output_dir / "rows.json"
        source.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_json(source)
        dataset = datasets.Dataset.from_json(str(source), cache_dir=str(arguments.output_dir / "cache"))
        samples = dataset.map(prepare, fn_kwargs={"processor": processor}, remove_columns=["image", "text"])
    else:
        samples = [{key: value.tolist() for key, value in prepare(row, processor).items()} for row in rows]
    seconds = time.perf_counter() - started
    options = peers.shape(arguments)
    batch = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    meter = peers.Meter(arguments.output_dir, batch)
    meter.write(preparing={"dataset_map": has_datasets, "samples_per_second": round(len(rows) / seconds, 1)})
    Trainer(
        model=get_peft_model(model, LoraConfig(target_modules=peers.LAYERS, **peers.LORA)),
        args=TrainingArguments(
            **options, learning_rate=1e-4, gradient_checkpointing=True, save_steps=100, report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=samples,
        data_collator=Collator(tokenizer=processor.tokenizer, padding=True),
        callbacks=[meter],
    ).train()  # fmt: skip


def prepare(row: dict, processor) -> dict[str, torch.Tensor]:
    """One sample: prompt and picture through the processor, answer and pad token appended."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": peers.PROMPT}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    picture = Image.open(row["image"]).convert("RGB").resize(peers.PICTURE_SIZE)
    inputs = processor(text=[text], images=[picture], padding=True, return_tensors="pt")
    inputs = {key: value.tolist() for key, value in inputs.items()}
    prompt_ids = inputs["input_ids"][0]
    answer_ids = processor.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
    answer_ids = [*answer_ids, processor.tokenizer.pad_token_id]
    sample = {
        "input_ids": prompt_ids + answer_ids,
        "attention_mask": inputs["attention_mask"][0] + [1] * len(answer_ids),
        "labels": [-100] * len(prompt_ids) + answer_ids,
        "mm_token_type_ids": inputs["mm_token_type_ids"][0] + [0] * len(answer_ids),
    }
    return {
        **{key: torch.tensor(value[:MAX_LENGTH]) for key, value in sample.items()},
        "pixel_values": torch.tensor(inputs["pixel_values"]),
        "image_grid_thw": torch.tensor(inputs["image_grid_thw"]).squeeze(0),
    }


class Collator(DataCollatorForSeq2Seq):
    """The stock collator; it cannot pad `mm_token_type_ids`, and the tutorial, older than they are, had none."""

    def __call__(self, features, return_tensors=None):
        types = [torch.tensor(feature["mm_token_type_ids"]) for feature in features]
        rest = [{key: value for key, value in feature.items() if key != "mm_token_type_ids"} for feature in features]
        batch = super().__call__(rest, return_tensors)
        batch["mm_token_type_ids"] = torch.nn.utils.rnn.pad_sequence(types, batch_first=True)
        return batch


if __name__ == "__main__":
    main()
