"""QLoRA for real, on the CPU: bitsandbytes has kernels for it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import MODEL_TYPES, SAMPLE, requires, untied

from latexocr import quantization
from latexocr.adapters import add_lora
from latexocr.contract import Contract
from latexocr.errors import InputError
from latexocr.families import family_of
from latexocr.lora import FusedLora, FusedLoras
from latexocr.merge import merge
from latexocr.metrics_file import read_metrics
from latexocr.modeling import family_in, fresh_base, inner_model, load_base
from latexocr.predict import LatexOCR
from latexocr.quantization import Quantization, kept_modules, num_weights
from latexocr.train import train

PICTURE = str(SAMPLE / "images/000000.png")
requires_bitsandbytes = requires("bitsandbytes")


def logged(folder, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(folder / "metrics.jsonl") if key in row]


def rounded_layers(model) -> list[str]:
    return [name for name, part in model.named_modules() if type(part).__module__.startswith("bitsandbytes")]


def test_what_stays_whole(tiny_models):
    """The fewest names that cover all linear layers outside the parts that are rounded."""
    model, targets = fresh_base(tiny_models["qwen2_vl"]), family_of("qwen2_vl").target_regex
    assert kept_modules(model, targets(["language"])) == ["model.visual", "lm_head"]
    assert kept_modules(model, targets(["language", "vision"])) == ["model.visual.merger", "lm_head"]
    assert kept_modules(model, targets(["vision", "merger"])) == ["model.language_model", "lm_head"]


@requires_bitsandbytes
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_only_the_decoder_is_rounded(model_type, tiny_models):
    """3 layers of 7; a byte holds two weights, which are within an eighth of their block's largest."""
    folder = tiny_models[model_type]
    model = load_base(folder, dtype=torch.float32, device="cpu", quantization=Quantization())
    whole = load_base(folder, dtype=torch.float32)
    assert len(rounded_layers(model)) == 21
    assert all(".language_model.layers." in name for name in rounded_layers(model))
    layer, original = (each.model.language_model.layers[0].mlp.up_proj for each in (model, whole))
    assert layer.weight.numel() == 128 * 256 // 2 and num_weights(layer.weight) == 128 * 256
    errors = (quantization.weights(layer, torch.float32) - original.weight.data).view(-1, 64).abs()
    assert 0 < float((errors / original.weight.data.view(-1, 64).abs().amax(1, keepdim=True)).max()) < 0.16


@requires_bitsandbytes
def test_what_is_rounded_is_said(tiny_models, caplog):
    """21 layers of 8,192 to 32,768 weights are 59% of the tiny Qwen2-VL; ERNIE's experts stay as they are."""
    caplog.set_level("INFO", logger="latexocr")
    for model_type, share, warned in (("qwen2_vl", "59%", 0), ("ernie4_5_vl_moe", "26%", 1)):
        caplog.clear()
        load_base(tiny_models[model_type], dtype=torch.float32, device="cpu", quantization=Quantization())
        assert caplog.messages[0] == f"4 bits: {share} of the weights"
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == warned
        assert all(f"only {share} of the weights are in 4 bits" in text for text in warnings)


@requires_bitsandbytes
def test_qlora_end_to_end(config, records, tmp_path):
    """Trained, evaluated, resumed bit for bit, loaded as it was trained, merged into whole weights."""
    options = dict(load_in_4bit=True, optim="adamw_8bit", val_json=str(records["val"]), eval_strategy="steps",
                   eval_steps=1, lora_r=16, save_strategy="steps", save_steps=1, max_new_tokens=2,
                   load_best_model_at_end=False)  # fmt: skip
    run = tmp_path / "run"
    result = train(config(**options))
    found = logged(run)
    assert len(found) == 3 and len(logged(run, "eval_loss")) == 3
    train(config(**options, resume_from_checkpoint=str(run / "checkpoint-2")))
    assert logged(run) == found
    state = torch.load(run / "checkpoint-2/optimizer.pt", weights_only=True)["state"]
    assert len(state) == 1  # all adapters are stepped together
    assert Contract.load(result.adapter_dir).quantization == Quantization(4, ("language",))

    ocr = LatexOCR.from_pretrained(result.adapter_dir)
    assert len(rounded_layers(inner_model(ocr.model))) == 21
    assert not rounded_layers(LatexOCR.from_pretrained(result.adapter_dir, base_bits=16).model)
    merged = merge(result.adapter_dir, tmp_path / "merged", images=[PICTURE])
    assert merged.merged.mean < 1e-4 < merged.rounded_base.mean < 0.5 and "rounded base" in str(merged)
    assert not rounded_layers(LatexOCR.from_pretrained(tmp_path / "merged").model)
    with pytest.raises(InputError, match="another load_in_4bit, load_in_8bit or quantized_parts"):
        train(config(**{**options, "load_in_4bit": False}, resume_from_checkpoint=str(run / "checkpoint-2")))


@requires_bitsandbytes
def test_fused_equals_stock(config, tmp_path):
    """Adapters on rounded and on whole layers; losses and gradient norms of three steps, checkpointed or not."""
    variants = {"stock": {}, "fused": {"fused_lora": True},
                "checkpointing": {"fused_lora": True, "gradient_checkpointing": True}}  # fmt: skip
    for name, more in variants.items():
        train(config(output_dir=str(tmp_path / name), load_in_4bit=True, lora_components=["language", "vision"],
                     lora_r=16, **more))  # fmt: skip
    for name in ("fused", "checkpointing"):
        for key in ("loss", "grad_norm"):
            assert logged(tmp_path / name, key) == pytest.approx(logged(tmp_path / "stock", key), rel=1e-4), name


@requires_bitsandbytes
def test_fused_groups_keep_the_weights_in_4_bits(tiny):
    base = load_base(tiny, dtype=torch.float32, device="cpu", quantization=Quantization())
    model = add_lora(base, family_in(tiny), components=["language"], r=16, alpha=16, dropout=0.0)
    loras = FusedLoras(model)
    assert sum(isinstance(module, FusedLora) for module in model.modules()) == 21
    (group,) = [group for group in loras._groups if group.num_columns == 256][:1]  # down_proj of the first layer
    (block,) = group.blocks()
    assert block.shape == (128, 256 + 16)
    assert torch.equal(block[:, :256], quantization.weights(group.bases[0], torch.float32))
    assert group.bases[0].weight.dtype == torch.uint8


@requires_bitsandbytes
def test_8_bits_and_more_parts(config, tmp_path):
    result = train(config(load_in_8bit=True, quantized_parts=["language", "vision"], max_steps=2))
    assert len(logged(tmp_path / "run")) == 2
    names = rounded_layers(inner_model(LatexOCR.from_pretrained(result.adapter_dir).model))
    assert len(names) == 21 + 8 and not [name for name in names if "merger" in name]


@requires_bitsandbytes
def test_a_base_that_is_stored_in_4_bits(config, tiny, tmp_path):
    """The same losses as when it is rounded while loading; merged into whole weights."""
    stored = tmp_path / "stored"
    shutil.copytree(tiny, stored)
    load_base(tiny, dtype=torch.float32, device="cpu", quantization=Quantization()).save_pretrained(stored)
    result = train(config(model_name_or_path=str(stored), output_dir=str(tmp_path / "one")))
    train(config(load_in_4bit=True, output_dir=str(tmp_path / "two")))
    assert logged(tmp_path / "one") == pytest.approx(logged(tmp_path / "two"), rel=1e-6)
    merge(result.adapter_dir, tmp_path / "merged", images=[PICTURE])
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    for bits in (4, 8):
        with pytest.raises(InputError, match=f"leave load_in_{bits}bit out"):
            train(config(**{"model_name_or_path": str(stored), f"load_in_{bits}bit": True}))
    with pytest.raises(InputError, match=r"stored rounded \(bitsandbytes\) already; leave --base-bits out"):
        LatexOCR.from_pretrained(stored, base_bits=4)
    trained = replace(Contract.load(result.adapter_dir), quantization=Quantization())  # says no option that was given
    trained.save(result.adapter_dir)
    assert len(rounded_layers(LatexOCR.from_pretrained(stored, adapter=result.adapter_dir).model)) == 21


@requires_bitsandbytes
def test_the_head_in_4_bits(config, tiny, tmp_path, monkeypatch):
    """Of a model whose head is not its table of embeddings; made whole 100 tokens at a time, the loss is the same."""
    with pytest.raises(InputError, match="its table of embeddings, too; leave head out"):
        train(config(load_in_4bit=True, quantized_parts=["language", "head"]))
    base = untied(tiny, tmp_path / "untied")
    monkeypatch.setattr("latexocr.loss.CHUNK_ELEMENTS", 128 * 100)
    for name, more in {"fused": {"fused_loss": True, "fused_lora": True}, "stock": {"fused_loss": False}}.items():
        result = train(config(model_name_or_path=str(base), output_dir=str(tmp_path / name), load_in_4bit=True,
                              quantized_parts=["language", "head"], lora_r=16, **more))  # fmt: skip
    for key in ("loss", "grad_norm"):
        assert logged(tmp_path / "fused", key) == pytest.approx(logged(tmp_path / "stock", key), rel=1e-4)
    assert "lm_head" in rounded_layers(inner_model(LatexOCR.from_pretrained(result.adapter_dir).model))


@requires_bitsandbytes
def test_stacked_experts_in_4_bits(config, tiny_models, caplog, tmp_path):
    """Logits and gradients are those of the model whose weights have the rounded values; a run trains, is loaded as it
    was trained, and is merged. 21 layers and 8 stacks are half of the tiny ERNIE."""
    ernie, both = tiny_models["ernie4_5_vl_moe"], Quantization(4, ("language", "experts"))
    caplog.set_level("INFO", logger="latexocr")
    rounded = load_base(ernie, dtype=torch.float32, device="cpu", quantization=both)
    assert caplog.messages == ["4 bits: 52% of the weights"]
    whole = load_base(ernie, dtype=torch.float32)
    for name, parameter in rounded.named_parameters():
        if quantization.is_rounded(parameter):
            whole.get_parameter(name).data.copy_(quantization.whole(parameter))
    stacks = [
        name for name, each in rounded.named_parameters() if ".experts." in name and quantization.is_rounded(each)
    ]
    assert len(stacks) == 8 and num_weights(rounded.get_parameter(stacks[0])) == whole.get_parameter(stacks[0]).numel()
    found = []
    for model in (rounded, whole):
        embeddings = model.get_input_embeddings()(torch.arange(12)[None]).detach().requires_grad_()
        logits = model.model.language_model(inputs_embeds=embeddings).last_hidden_state
        logits.square().sum().backward()
        found.append((logits, embeddings.grad))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()

    options = dict(model_name_or_path=str(ernie), load_in_4bit=True, quantized_parts=["language", "experts"])
    with pytest.raises(
        InputError, match=r"experts of ERNIE-4\.5-VL in 4 bits cannot be adapted: leave experts out of"
    ):
        train(config(**options, lora_components=["experts"], lora_dropout=0))
    result = train(config(**options))
    assert len(logged(tmp_path / "run")) == 3
    again = inner_model(LatexOCR.from_pretrained(result.adapter_dir).model)
    assert quantization.is_rounded(again.get_parameter(stacks[0]))
    merged = merge(result.adapter_dir, tmp_path / "merged", images=[PICTURE])
    assert merged.merged.mean < 1e-4 < merged.rounded_base.mean


def test_what_cannot_be_had_is_refused(config, tiny, monkeypatch):
    with pytest.raises(InputError, match="exclude each other"):
        config(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(InputError, match="load_in_4bit rounds weights that --finetuning full trains"):
        config(load_in_4bit=True, finetuning="full")
    with pytest.raises(
        InputError, match=r"quantized_parts: 'tail' is none of \['language', 'vision', 'merger', 'head', 'experts'\]"
    ):
        config(load_in_4bit=True, quantized_parts=["tail"])
    with pytest.raises(InputError, match="experts are no layers, and can be in 4 bits only"):
        config(load_in_8bit=True, quantized_parts=["experts"])
    with pytest.raises(InputError, match="quantized_parts: Qwen2-VL has no experts; leave experts out"):
        train(config(load_in_4bit=True, quantized_parts=["experts"]))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    for options in ({"load_in_4bit": True}, {"optim": "adamw_8bit"}, {"optim": "paged_adamw_8bit"}):
        with pytest.raises(InputError, match="needs bitsandbytes, which is not installed: pip install"):
            config(**options)
    with pytest.raises(InputError, match=r"in 8 bits needs bitsandbytes, .*; or --base-bits 16"):
        LatexOCR.from_pretrained(tiny, base_bits=8)
    with pytest.raises(InputError, match=r"in 4 bits needs bitsandbytes, .*; or leave it out"):
        load_base(tiny, dtype=torch.float32, quantization=Quantization())


@requires_bitsandbytes
def test_sharded_weights_are_refused(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="load_in_4bit needs weights that are not sharded"):
        config(load_in_4bit=True)
    with pytest.raises(InputError, match="optim adamw_8bit cannot step weights that FSDP shards; leave it out"):
        config(optim="adamw_8bit")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    config(optim="adamw_8bit")
