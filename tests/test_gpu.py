"""What only a GPU can show: the fast path (kernels, CUDA graphs, 16 bits) against stock layers, for every recipe."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from conftest import MODEL_TYPES, untied

from latexocr.decoding import unsupported
from latexocr.host_embedding import host_tables
from latexocr.metrics_file import read_metrics
from latexocr.stopping import StopSignal
from latexocr.train import build_trainer, load_data, load_model, train

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


@pytest.mark.parametrize("name", ["language", "4 bits"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_embeddings_on_the_host(model_type, name, tiny_models, config, records, tmp_path):
    """The same losses and scores as with a table on the GPU, from as many captured steps and our own decoder."""
    if name == "4 bits" and find_spec("bitsandbytes") is None:
        pytest.skip("needs: pip install bitsandbytes")
    options = dict(model_name_or_path=str(untied(tiny_models[model_type], tmp_path / "base")), use_cpu=False,
                   max_steps=8, lora_r=16, gradient_accumulation_steps=2, val_json=str(records["val"]),
                   eval_strategy="steps", eval_steps=4, load_best_model_at_end=False)  # fmt: skip
    found, captured = {}, {}
    for host in (False, True):
        made = config(**options, **RECIPES[name], offload_embeddings=host, output_dir=str(tmp_path / f"host-{host}"))
        data = load_data(made)
        model, contract = load_model(made, data)
        trainer = build_trainer(made, data, model, contract, stop=StopSignal(), on_board=lambda *_: None)
        trainer.train()
        rows = trainer.state.log_history
        found[host] = [row[key] for row in rows for key in ("loss", "eval_loss", "eval_edit_distance") if key in row]
        captured[host] = len(trainer._graphs._graphs) if trainer._graphs else 0
        assert (captured[host] > 0) is made.cuda_graphs
        assert model.device.type == "cuda" and unsupported(model.eval(), trainer.generation) is None
        assert [(table.is_pinned(), table.device.type) for table in host_tables(model)] == [(True, "cpu")] * host
        assert not any(hasattr(part, "_hf_hook") for part in model.modules())  # which would copy it, every step
    assert len(found[True]) == 8 + 2 + 2 and found[True] == pytest.approx(found[False], rel=0.01, abs=0.05)
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    assert captured[True] == captured[False]


def test_rows_of_pinned_memory():
    """Read from there by a kernel, and again by a replayed graph."""
    from latexocr import kernels

    table = torch.randn(1000, 3584, dtype=torch.bfloat16).pin_memory()
    ids, others = torch.randint(1000, (2, 4, 60), device="cuda")
    assert torch.equal(kernels.take_rows(table, ids).cpu(), table[ids.cpu()])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = kernels.take_rows(table, ids)
    ids.copy_(others)
    graph.replay()
    assert torch.equal(rows.cpu(), table[others.cpu()])
