"""Fused LoRA layers, the loss without logits and rounded-up batches: the same losses and gradients as stock."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import MODEL_TYPES
from peft.tuners.lora import Linear as LoraLinear

from latexocr.adapters import add_lora
from latexocr.collate import FlattenedCollator, rounded
from latexocr.errors import InputError
from latexocr.lora import FusedLora, FusedLoras, keep_mask
from latexocr.loss import detach_head, head_loss, supervised_loss
from latexocr.metrics_file import read_metrics
from latexocr.modeling import load_base
from latexocr.records import read_records
from latexocr.train import load_preprocessor, train
from latexocr.trainer import FormulaTrainer


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fused_equals_stock(model_type, tiny_models, config, tmp_path):
    """Losses and gradient norms of three steps, adapters on every component, checkpointed or not."""
    found = {}
    variants = {
        "stock": {"fused_loss": False},
        "loss": {"fused_loss": True},
        "lora": {"fused_loss": True, "fused_lora": True},
        "checkpointing": {"fused_loss": True, "fused_lora": True, "gradient_checkpointing": True},
    }
    for name, options in variants.items():
        train(config(model_name_or_path=str(tiny_models[model_type]), output_dir=str(tmp_path / name), lora_r=16,
                     lora_components=["language", "vision", "merger"], **options))  # fmt: skip
        found[name] = [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
    for name in ("loss", "lora", "checkpointing"):
        for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
            assert [row[key] for row in found[name]] == pytest.approx(
                [row[key] for row in found["stock"]], rel=tolerance
            ), (name, key)


@pytest.mark.parametrize("components", [["language"], ["language", "vision"]])
def test_a_frozen_tower_is_not_differentiated(components, config, monkeypatch, tmp_path):
    """transformers makes its patches require gradients when it checkpoints."""
    seen = []
    whole = FormulaTrainer._loss

    def watched(self, model, inputs, num_items):
        (tower,) = [part for name, part in self.model.named_modules() if name.endswith(".visual.blocks.0")]
        hook = tower.register_forward_hook(lambda module, given, output: seen.append(output.requires_grad))
        found = whole(self, model, inputs, num_items)
        hook.remove()
        return found

    monkeypatch.setattr(FormulaTrainer, "_loss", watched)
    train(config(gradient_checkpointing=True, lora_components=components, output_dir=str(tmp_path), max_steps=1))
    assert seen and set(seen) == {"vision" in components}


def test_resumed_equals_uninterrupted(config, tmp_path):
    """With dropout: its masks depend on the step, not on what was drawn before."""
    options = {"fused_lora": True, "lora_r": 16, "lora_dropout": 0.2, "save_strategy": "steps", "save_steps": 2}
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    train(config(output_dir=whole, max_steps=4, **options))
    train(config(output_dir=parts, max_steps=4, **options))
    (tmp_path / "parts/metrics.jsonl").unlink()
    train(
        config(output_dir=parts, max_steps=4, resume_from_checkpoint=str(tmp_path / "parts/checkpoint-2"), **options)
    )
    wanted, found = ([row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
                     for name in ("whole", "parts"))  # fmt: skip
    assert len(wanted) == 4 and found == wanted[2:]


def test_what_cannot_be_had_is_refused(config, monkeypatch):
    with pytest.raises(InputError, match="use_reentrant"):
        config(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(InputError, match="cuda_graphs needs a GPU"):
        config(cuda_graphs=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert config().fused_loss is False
    with pytest.raises(InputError, match="fused_lora needs weights that are not sharded"):
        config(fused_lora=True)
    with pytest.raises(InputError, match="new_tokens beside adapters needs weights that are not sharded"):
        config(new_tokens=[r"\frac"])
    assert config(new_tokens=[r"\frac"], finetuning="full").new_tokens
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(InputError, match="fused_loss needs weights that are not sharded"):
        config(fused_loss=True, fsdp="full_shard")


def fused_and_stock(tiny, config, dropout: float = 0.0):
    """A fused adapter with values in its B, and the stock one with the same values."""
    folder, preprocessor = load_preprocessor(config())
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = load_base(folder, dtype=torch.float32)
        models.append(add_lora(model, preprocessor.family, components=["language"], r=16, alpha=16, dropout=dropout))
    for parameters in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if parameters[0].requires_grad:
            with torch.no_grad():
                parameters[0].normal_(std=0.05)
                parameters[1].copy_(parameters[0])
    return preprocessor, models[0], models[1]


def test_layers_with_one_input_are_one_group(tiny, config):
    _, model, stock = fused_and_stock(tiny, config)
    loras = FusedLoras(model)
    assert len(loras._groups) == 3 * 4  # layers of the tiny model: qkv, o, gate and up, down
    assert sum(isinstance(module, FusedLora) for module in model.modules()) == 3 * 7
    assert sum(type(module) is LoraLinear for module in stock.modules()) == 3 * 7
    assert set(model.state_dict()) == set(stock.state_dict())


def test_every_gradient_equals_stock(tiny, config, records):
    """Parameter by parameter, on a batch rounded up with a filler against the plain one."""
    preprocessor, model, stock = fused_and_stock(tiny, config)
    loras = FusedLoras(model)
    loras.prepare()
    features = [preprocessor(record) for record in read_records(records["train"])[:3]]
    tokenizer = preprocessor.processor.tokenizer
    grads = {}
    for name, which, round_up in (("fused", model, True), ("stock", stock, False)):
        batch = FlattenedCollator(tokenizer=tokenizer, family=preprocessor.family, round_up=round_up)(features)
        length = batch["input_ids"].shape[1]
        assert length == (rounded(batch["num_tokens"] + 2) if round_up else batch["num_tokens"])
        grads[name] = gradients(which, batch)
    assert grads["fused"][0] == pytest.approx(grads["stock"][0], rel=1e-6)
    assert len(grads["stock"][1]) == 2 * 3 * 7
    for key, value in grads["stock"][1].items():
        assert torch.allclose(grads["fused"][1][key], value, rtol=1e-4, atol=1e-6), key


def gradients(model, batch: dict) -> tuple[float, dict[str, torch.Tensor]]:
    from latexocr.attention import VARLEN, set_attention
    from latexocr.loss import supervised_targets
    from latexocr.placeholders import trusted_placeholders

    set_attention(model, VARLEN)
    model.train()
    batch = {key: value for key, value in batch.items() if key not in ("num_samples", "num_tokens")}
    targets = supervised_targets(batch.pop("labels"), batch["logits_to_keep"])
    batch["image_grid_thw"] = torch.tensor(batch["image_grid_thw"])
    with trusted_placeholders(model):
        logits = model(**batch, use_cache=False).logits
    loss = supervised_loss(logits, targets, 7)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_dropout_in_forward_and_backward_is_one_mask(tiny, config):
    """With the mask written out, y and all gradients are plain arithmetic."""
    _, model, _ = fused_and_stock(tiny, config, dropout=0.25)
    loras = FusedLoras(model)
    loras.prepare()
    loras.reseed(5)
    layer = next(module for module in model.modules() if isinstance(module, FusedLora) and module.place == 1).train()
    (group,) = layer.group
    x = torch.randn(9, 128, requires_grad=True)
    weighting = torch.randn(9, layer.base_layer.out_features)
    (group(x)[1] * weighting).sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    found = x.grad, a.grad, b.grad
    x2, a2, b2 = (tensor.detach().clone().requires_grad_() for tensor in (x, a, b))
    keep = keep_mask(9, 128, group.seeds[1], round(0.25 * 2**16))
    y = layer.base_layer(x2) + (keep * x2 / 0.75) @ a2.T @ b2.T * (16 / 16)
    (y * weighting).sum().backward()
    for ours, plain in zip(found, (x2.grad, a2.grad, b2.grad), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_float32_input_of_a_16_bit_layer(tiny, config):
    """What autocast hands to vision layers after a layer norm; peft casts it too."""
    _, model, _ = fused_and_stock(tiny, config)
    model.bfloat16()
    loras = FusedLoras(model)
    loras.prepare()
    layer = next(module for module in model.modules() if isinstance(module, FusedLora)).train()
    assert layer(torch.randn(3, 128)).dtype == torch.bfloat16


def test_a_second_trainer_on_one_model(tiny, config):
    _, model, _ = fused_and_stock(tiny, config)
    first, second = FusedLoras(model), FusedLoras(model)
    assert [id(group) for group in second._groups] == [id(group) for group in first._groups]
    assert detach_head(model) is detach_head(model) is not None


def test_masks_have_the_right_share_and_differ():
    seeds = torch.tensor([1, 2])
    first, second = (keep_mask(1000, 256, seed, round(0.05 * 2**16)) for seed in seeds)
    for mask in (first, second):
        assert mask.float().mean().item() == pytest.approx(0.95, abs=0.002)
        assert mask.float().mean(0).min() > 0.92 and mask.float().mean(1).min() > 0.87
    both_dropped = (~first & ~second).float().mean().item()
    assert both_dropped == pytest.approx(0.05**2, rel=0.1)  # independent
    neighbours = (~first[:, :-1] & ~first[:, 1:]).float().mean().item()
    assert neighbours == pytest.approx(0.05**2, rel=0.1)
    assert torch.equal(first, keep_mask(1000, 256, seeds[0], round(0.05 * 2**16)))


def head_of(weight: torch.Tensor):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    layer.weight.data = weight
    return detach_head(SimpleNamespace(get_output_embeddings=lambda: layer))


def test_head_loss_equals_loss_over_logits(monkeypatch):
    monkeypatch.setattr("latexocr.loss.CHUNK_ELEMENTS", 40)  # four rows of ten a chunk
    torch.manual_seed(0)
    weight, targets = torch.randn(10, 6), torch.tensor([3, -100, 0, 9, 9, -100, 2])
    ours, theirs = (torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    found = head_loss(ours, head_of(weight), targets, 4)
    wanted = supervised_loss(theirs @ weight.T, targets, 4)
    (found * 3).backward()
    (wanted * 3).backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_a_batch_without_supervised_tokens_costs_nothing():
    hidden, weight = torch.randn(1, 2, 6), torch.randn(10, 6)
    nothing = torch.tensor([-100, -100])
    assert head_loss(hidden, head_of(weight), nothing, 0).item() == 0
    assert supervised_loss(hidden @ weight.T, nothing, 0).item() == 0


def test_rounded_wastes_at_most_a_sixteenth():
    assert all(size <= rounded(size) <= max(size * 17 / 16, size + 64) for size in range(1, 20000, 7))
    assert len({rounded(size) for size in range(2048, 4096)}) == 17
