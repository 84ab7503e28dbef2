"""A mixture of experts without waits: what transformers' layers compute, for whatever comes to them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from latexocr.adapters import add_lora
from latexocr.experts import apply_experts
from latexocr.families import family_of
from latexocr.layers import fuse_layers
from latexocr.modeling import load_base

ERNIE = "ernie4_5_vl_moe"


def test_two_experts_by_hand():
    """Expert e answers (e + 1) * x; rows choose 0 and 1, only 1, and none at all (an index of 2)."""
    gate_up = torch.stack([torch.eye(4), 2 * torch.eye(4)])
    down = torch.eye(4).repeat(2, 1, 1)
    rows = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]], requires_grad=True)
    index = torch.tensor([[1, 0], [1, 2], [2, 2]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 1.0], [1.0, 1.0]], requires_grad=True)
    answers = apply_experts(rows, index, weights, gate_up, down, lambda pairs: pairs, 2)
    assert answers.tolist() == [[1.25, 2.5, 3.75, 5], [10, 12, 14, 16], [0, 0, 0, 0]]
    answers.sum().backward()
    assert rows.grad[:, 0].tolist() == [1.25, 2, 0]
    assert weights.grad.tolist() == [[20, 10], [52, 0], [0, 0]]


def test_experts_that_nobody_chose_are_not_read():
    """Also where no row has an expert: text only, and the experts of images."""
    gate_up, down = torch.full((2, 4, 4), float("nan")), torch.full((2, 4, 4), float("nan"))
    answers = apply_experts(torch.ones(3, 4), torch.full((3, 2), 2), torch.ones(3, 2), gate_up, down, silu, 2)
    assert answers.tolist() == [[0] * 4] * 3


@pytest.mark.parametrize("components", [["language", "merger"], ["experts"]])
@pytest.mark.parametrize("text_only", [False, True])
def test_layers_equal_stock(components, text_only, tiny_models, batch_of):
    """Loss and all gradients: adapters inside and outside the experts, routers too."""
    folder = tiny_models[ERNIE]
    model = add_lora(
        load_base(folder, dtype=torch.float32), family_of(ERNIE), components=components, r=4, alpha=8, dropout=0.0
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "gate.weight" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    batch = {key: value for key, value in batch_of(ERNIE).items() if key != "logits_to_keep"}
    if text_only:
        batch = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        batch["moe_mm_token_type_ids"] = torch.zeros_like(batch["input_ids"])
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        fuse_layers(model)
    (stock_loss, stock), (loss, gradients) = found
    assert loss == pytest.approx(stock_loss, rel=1e-6)
    assert any("gate.weight" in name for name in gradients) and any("lora_" in name for name in gradients)
    none = torch.zeros(())
    for name in stock.keys() | gradients.keys():  # experts that nobody chose: zeros here, nothing there
        expected = stock.get(name, none)
        assert (gradients.get(name, none) - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name
