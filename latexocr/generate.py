"""Batched generation, the same for validation during training and for inference afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from latexocr.families import Family
from latexocr.preprocess import Preprocessor


@dataclass(frozen=True)
class Generated:
    """One answer: its text, its length in tokens, and whether it ended by itself (False: a runaway)."""

    text: str
    num_tokens: int
    finished: bool


def collate_prompts(features: Sequence[dict[str, Any]], family: Family, pad_id: int) -> dict[str, torch.Tensor]:
    """Prompts -> one batch padded on the left, so that all answers start in the same column."""
    padding = {"input_ids": pad_id, "attention_mask": 0, **dict(family.padded)}
    batch = {
        key: pad_sequence([f[key] for f in features], batch_first=True, padding_value=value, padding_side="left")
        for key, value in padding.items()
    }
    for key in family.concatenated:
        batch[key] = torch.cat([feature[key] for feature in features])
    return batch


@torch.no_grad()
def generate(
    model: Any,
    batch: dict[str, torch.Tensor],
    preprocessor: Preprocessor,
    config: GenerationConfig,
    **options: Any,
) -> list[Generated]:
    """Generate one answer a row of `batch` (from `collate_prompts`).

    Args:
        model: the model or the adapter around it, in evaluation mode.
        batch: tensors of shape (rows, length) and the images' patches; moved to the model's device.
        preprocessor: gives tokenizer and end token.
        config: greedy or sampling settings with `max_new_tokens`.
        options: passed on to `model.generate` (streamer, synced_gpus).
    """
    tokenizer = preprocessor.processor.tokenizer
    end_id = tokenizer.convert_tokens_to_ids(preprocessor.family.end_token)
    length = batch["input_ids"].shape[1]
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    output = model.generate(**inputs, generation_config=config, **options)[:, length:].tolist()
    answers = []
    for row in output:
        finished = end_id in row
        ids = row[: row.index(end_id)] if finished else row
        # clean_up_tokenization_spaces would eat the spaces before punctuation that LaTeX_OCR's texts have
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        answers.append(Generated(text, len(ids) + finished, finished))
    return answers
