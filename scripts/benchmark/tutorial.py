"""The baseline: training as the widespread Qwen2-VL tutorial does it, written afresh from its description.

Stock Trainer, stock padding, logits at every position, pictures prepared up front and kept as tensors, 4 samples x 4
accumulated, gradient checkpointing, LoRA on every layer with a listed name. Only `mm_token_type_ids` is added, because
transformers 5 needs it. Pictures are 504 x 112, as in its test code. Writes metrics.jsonl like `latexocr train`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

NUM_SAMPLES, STEPS = 192, 12
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = "Write the LaTeX of the formula in this image."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", type=Path, required=True)
    parser.add_argument("--train_json", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    processor = AutoProcessor.from_pretrained(arguments.model_name_or_path)
    processor.tokenizer.padding_side = "right"
    rows = json.loads(arguments.train_json.read_text(encoding="utf-8"))[:NUM_SAMPLES]
    samples = [prepare(row["conversations"], arguments.train_json.parent, processor) for row in rows]
    on_gpu = torch.cuda.is_available()
    model = AutoModelForImageTextToText.from_pretrained(
        arguments.model_name_or_path, dtype=torch.bfloat16 if on_gpu else torch.float32
    )
    model.enable_input_require_grads()
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=TARGETS, r=64, lora_alpha=16, lora_dropout=0.05, bias="none"
    )
    meter = Meter(arguments.output_dir / "metrics.jsonl")
    Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(
            output_dir=str(arguments.output_dir), per_device_train_batch_size=4, gradient_accumulation_steps=4,
            max_steps=STEPS, logging_steps=1, learning_rate=1e-4, gradient_checkpointing=True, report_to="none",
            save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=samples,
        data_collator=Collator(tokenizer=processor.tokenizer, padding=True),
        callbacks=[meter],
    ).train()  # fmt: skip


def prepare(conversation: list[dict], folder: Path, processor) -> dict:
    """One sample: prompt and picture through the processor, answer and pad token appended."""
    image_path, answer = (turn["value"] for turn in conversation)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    picture = Image.open(folder / image_path).convert("RGB").resize((504, 112))
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    prompt_ids = inputs["input_ids"][0].tolist()
    answer_ids = [
        *processor.tokenizer(answer, add_special_tokens=False)["input_ids"],
        processor.tokenizer.pad_token_id,
    ]
    return {
        "input_ids": prompt_ids + answer_ids,
        "attention_mask": [1] * (len(prompt_ids) + len(answer_ids)),
        "labels": [-100] * len(prompt_ids) + answer_ids,
        "mm_token_type_ids": inputs["mm_token_type_ids"][0].tolist() + [0] * len(answer_ids),
        "pixel_values": inputs["pixel_values"],
        "image_grid_thw": inputs["image_grid_thw"],
    }


class Collator(DataCollatorForSeq2Seq):
    def __call__(self, features, return_tensors=None):
        apart = ("mm_token_type_ids", "pixel_values", "image_grid_thw")
        text = [{key: value for key, value in feature.items() if key not in apart} for feature in features]
        batch = super().__call__(text, return_tensors)
        types = [torch.tensor(feature["mm_token_type_ids"]) for feature in features]
        batch["mm_token_type_ids"] = torch.nn.utils.rnn.pad_sequence(types, batch_first=True)
        for key in apart[1:]:
            batch[key] = torch.cat([feature[key] for feature in features])
        return batch


class Meter(TrainerCallback):
    """Samples a second of each step after the first ones, in the format of metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path, self.since = path, time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs:
            return
        now = time.perf_counter()
        line = {"step": state.global_step, "loss": logs["loss"], "samples_per_second": 16 / (now - self.since)}
        if torch.cuda.is_available():
            line["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.since = now
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
