"""What only a GPU can show: the fast path (kernels, CUDA graphs, 16 bits) against stock layers, for every recipe."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from conftest import MODEL_TYPES

from latexocr.metrics_file import read_metrics
from latexocr.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STOCK = {"flatten": False, "fused_lora": False, "fused_layers": False, "fused_loss": False, "cuda_graphs": False}
RECIPES = {
    "language": {},
    "all parts": {"lora_components": ["language", "vision", "merger"]},
    "checkpointing": {"lora_components": ["language", "vision"], "gradient_checkpointing": True},
    "dropout": {"lora_dropout": 0.1},
    "cached": {"cache_vision_features": True},
    "new tokens": {"new_tokens": [r"\frac", r"\alpha"]},
    "every weight": {"finetuning": "full", "lora_components": None},
    "4 bits": {"load_in_4bit": True, "optim": "adamw_8bit"},
    "4 bits, checkpointing": {"load_in_4bit": True, "gradient_checkpointing": True},
    "4 bits, all parts": {"load_in_4bit": True, "quantized_parts": ["language", "vision", "merger"]},
    "4 bits, experts": {"load_in_4bit": True, "quantized_parts": ["language", "experts"]},
}
CASES = [
    (model_type, name)
    for model_type in MODEL_TYPES
    for name in RECIPES
    if "experts" not in name or model_type == "ernie4_5_vl_moe"
]


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_fast_path_equals_stock(model_type, name, tiny_models, config, tmp_path):
    """The same losses up to rounding in 16 bits; shapes repeat, so that steps are replayed where that is possible."""
    options = {key: value for key, value in RECIPES[name].items() if value is not None}
    if "load_in_4bit" in options and find_spec("bitsandbytes") is None:
        pytest.skip("needs: pip install bitsandbytes")
    if options.get("finetuning") == "full":
        options["learning_rate"] = 1e-4
    options |= dict(model_name_or_path=str(tiny_models[model_type]), use_cpu=False, max_steps=8,
                    lora_r=16, gradient_accumulation_steps=2)  # fmt: skip
    losses = {}
    for path, more in (("fast", {}), ("stock", STOCK)):
        train(config(**options, **more, output_dir=str(tmp_path / path)))
        losses[path] = [row["loss"] for row in read_metrics(tmp_path / path) if "loss" in row]
    assert len(losses["fast"]) == 8
    tolerance = 0.1 if "lora_dropout" in options else 0.03  # other masks
    assert losses["fast"] == pytest.approx(losses["stock"], rel=tolerance)


def test_float16_is_scaled(config, tmp_path):
    """Without overflow at the end: finite gradients, and the losses of bfloat16."""
    losses = {}
    for name in ("fp16", "bf16"):
        train(config(use_cpu=False, max_steps=8, output_dir=str(tmp_path / name), **{name: True}))
        rows = [row for row in read_metrics(tmp_path / name) if "loss" in row]
        losses[name] = [row["loss"] for row in rows]
        assert math.isfinite(rows[-1]["grad_norm"])
    assert losses["fp16"] == pytest.approx(losses["bf16"], rel=0.05)
