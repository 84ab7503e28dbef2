"""Samples -> batch: text keys padded, vision keys concatenated, logits asked for only where they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForSeq2Seq

from latexocr.families import Family


@dataclass
class FormulaCollator(DataCollatorForSeq2Seq):
    """`DataCollatorForSeq2Seq` for images and text.

    Rows are padded on the left (`load_processor` sets the tokenizer so): generation needs it, and in training it
    lines the answers up, so that fewer columns of logits are needed.

    The stock collator pads input_ids, attention_mask and labels, but fails on ragged per-token inputs that the
    tokenizer does not know (`mm_token_type_ids`) and cannot join `pixel_values`; the family says which are which.

    `logits_to_keep` (columns,) lists the columns from which any row predicts a supervised token. The vocabulary
    has 151,936 entries, so logits over prompt and image tokens would be most of a step's memory. It is found here,
    on the CPU, because finding it on the GPU would stall the step.
    """

    family: Family | None = None

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        apart = [*(key for key, _ in self.family.padded), *self.family.concatenated]
        # lists, because the stock collator pads labels as arrays and converts them one by one, slowly
        text = [{key: value.tolist() for key, value in feature.items() if key not in apart} for feature in features]
        batch = dict(super().__call__(text, return_tensors))
        for key, value in self.family.padded:
            padded = pad_sequence(
                [f[key] for f in features], batch_first=True, padding_value=value, padding_side="left"
            )
            extra = batch["input_ids"].shape[1] - padded.shape[1]  # pad_to_multiple_of
            batch[key] = torch.nn.functional.pad(padded, (extra, 0), value=value)
        for key in self.family.concatenated:
            batch[key] = torch.cat([feature[key] for feature in features])
        if "labels" in text[0]:
            supervised = (batch["labels"][:, 1:] != self.label_pad_token_id).any(dim=0)
            batch["logits_to_keep"] = supervised.nonzero()[:, 0]
        else:
            del batch["labels"]  # the stock collator invents `labels: None`
        return batch
