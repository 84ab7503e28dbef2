"""Variants of LoRA, what is trained, and how fast: the recipes of the tutorials, each alone and together."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from latexocr.errors import InputError
from latexocr.merge import merge
from latexocr.metrics_file import read_metrics
from latexocr.modeling import add_lora, family_in, freeze, load_adapter, load_base, trainable_parameters
from latexocr.optimizers import learning_rates
from latexocr.train import build_trainer, load_data, load_model, train

VARIANTS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"lora_init": "pissa"},
    "loraplus": {"loraplus_lr_ratio": 16},
    "together": {"lora_init": "pissa", "use_dora": True, "use_rslora": True, "loraplus_lr_ratio": 4,
                 "lora_components": ["attention", "merger"], "learning_rates": {"vision": 1e-4}},
}  # fmt: skip


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_is_uninterrupted_and_merged_is_the_adapter(name, config, tmp_path):
    """Four steps at once and two after two; the adapter fits the original base, and merged it answers the same."""
    options = dict(save_strategy="steps", save_steps=2, max_steps=4, lora_dropout=0.1, learning_rate=1e-2,
                   **VARIANTS[name])  # fmt: skip
    whole = train(config(**options))
    before = losses(tmp_path / "run")
    weights = (whole.adapter_dir / "adapter_model.safetensors").read_bytes()
    resumed = train(config(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"), **options))
    assert len(before) == 4 and losses(tmp_path / "run") == before
    assert (resumed.adapter_dir / "adapter_model.safetensors").read_bytes() == weights
    result = merge(whole.adapter_dir, tmp_path / "merged")
    assert result.merged.mean < 1e-4 and result.stored.mean < 1e-4
