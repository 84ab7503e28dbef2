"""Batched generation, the same for validation during training and for inference afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from latexocr.decoding import Decoder, Normalise
from latexocr.preprocess import Preprocessor
from latexocr.records import Record


@dataclass(frozen=True)
class Generated:
    """One answer: its text, its length in tokens, and whether it ended by itself (False: a runaway)."""

    text: str
    num_tokens: int
    finished: bool

    def as_row(self, record: Record) -> dict[str, Any]:
        """A line of predictions.jsonl: the answer to this record's image."""
        return {
            "id": record.id,
            "image_path": str(record.image_path),
            **({} if record.source is None else {"source": record.source}),
            "reference": record.text,
            "prediction": self.text,
            "num_tokens": self.num_tokens,
            "finished": self.finished,
        }


def generate(
    model: Any,
    batches: Sequence[dict[str, torch.Tensor]],
    preprocessor: Preprocessor,
    config: GenerationConfig,
    *,
    decoder: Decoder | None = None,
    **options: Any,
) -> list[Generated]:
    """Generate one answer a row of `batches` (prompts, each batch collated).

    Args:
        model: the model or the adapter around it, in evaluation mode.
        batches: tensors of shape (rows, length) and the images' patches; moved to the model's device.
        preprocessor: gives tokenizer and end token.
        config: greedy or sampling settings with `max_new_tokens`.
        decoder: for the same model and settings, from `decoder_for`: decodes all batches at once, and fast. Without
            it `model.generate` decodes one after the other.
        options: passed on to `model.generate` (streamer, synced_gpus).
    """
    tokenizer = preprocessor.processor.tokenizer
    end_id = tokenizer.convert_tokens_to_ids(preprocessor.family.end_token)
    normalise = partial(preprocessor.normalise, dtype=model.dtype)
    rows = (
        decoder(batches, normalise)
        if decoder
        else [row for batch in batches for row in _stock(model, batch, normalise, config, options)]
    )
    answers = []
    for row in rows:
        finished = end_id in row
        ids = row[: row.index(end_id)] if finished else row
        # clean_up_tokenization_spaces would eat the spaces before punctuation that LaTeX_OCR's texts have
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        answers.append(Generated(text, len(ids) + finished, finished))
    return answers


@torch.no_grad()
def _stock(
    model: Any, batch: dict[str, torch.Tensor], normalise: Normalise, config: GenerationConfig, options: dict[str, Any]
) -> list[list[int]]:
    length = batch["input_ids"].shape[1]
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    inputs["pixel_values"] = normalise(inputs["pixel_values"]).to(model.dtype)
    return model.generate(**inputs, generation_config=config, **options)[:, length:].tolist()
