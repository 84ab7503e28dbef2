"""What a vision tower is told instead of the grids: the same logits and gradients, whatever fills a batch up."""

from __future__ import annotations

import pytest
import torch
from conftest import MODEL_TYPES, SAMPLE, write_records
from PIL import Image

from latexocr.attention import VARLEN, set_attention
from latexocr.collate import FlattenedCollator, rounded
from latexocr.loss import supervised_loss, supervised_targets
from latexocr.modeling import load_base
from latexocr.placeholders import trusted_placeholders
from latexocr.records import read_records
from latexocr.tower import Tower
from latexocr.train import load_preprocessor

NOT_TOLD = ("labels", "num_samples", "num_tokens")


def test_what_two_pictures_are_told():
    """2 x 6 and 4 x 2 patches, two a side of a token, windows of one token by one; then a filler of 8 patches."""
    grids = torch.tensor([[1, 2, 6], [1, 4, 2]])
    told = Tower(needs_grids=False, window=1).told(grids, filler=8, round_up=lambda number: 8)
    assert told["image_cu_seqlens"].tolist() == [0, 12, 20, 28] and told["image_max_seqlen"] == 512
    assert told["image_position_ids"][:8].tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3],
    ]  # fmt: skip
    assert told["image_position_ids"][20:].abs().sum() == 0 and len(told["image_position_ids"]) == 28
    assert told["image_window_index"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert told["image_cu_window_seqlens"].tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 28]
    assert told["image_max_window_seqlen"] == 4


def test_windows_and_table():
    """4 x 6 patches are 2 x 3 tokens: windows of two a side hold four tokens and two. The corners of a picture are
    those of the table, whose side is 5."""
    told = Tower(needs_grids=False, window=2, table=5).told(torch.tensor([[1, 4, 6]]))
    assert told["image_window_index"].tolist() == [0, 1, 3, 4, 2, 5]
    assert told["image_cu_window_seqlens"].tolist() == [0, 16, 24]
    indices, weights = told["image_interp_indices"], told["image_interp_weights"]
    assert indices.shape == weights.shape == (24, 4) and weights.sum(1).tolist() == pytest.approx([1] * 24)
    assert (indices[0, 0], weights[0, 0]) == (0, 1) and (indices[23, 0], weights[23, 0]) == (24, 1)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_filled_up_batches(model_type, tiny_models, config, tmp_path):
    """Every gradient of the whole model, against the batch whose grids the tower looks at itself."""
    Image.open(SAMPLE / "images/000000.png").resize((420, 260)).save(tmp_path / "large.png")  # several windows high
    folder, preprocessor = load_preprocessor(config(model_name_or_path=str(tiny_models[model_type])))
    model = load_base(folder, dtype=torch.float32)
    set_attention(model, VARLEN)
    rows = [(str(tmp_path / "large.png"), "x ^ 2"), (str(SAMPLE / "images/000001.png"), "a + b")]
    samples = [preprocessor(record) for record in read_records(write_records(tmp_path / "train.json", rows))]
    found = {}
    for tower in (Tower(raster=preprocessor.family.raster), Tower.of(preprocessor.family, model.config)):
        told = not tower.needs_grids
        collate = FlattenedCollator(preprocessor.processor.tokenizer, family=preprocessor.family, tower=tower)
        collate.round_up = told
        batch = collate(samples)
        patches = sum(len(sample["pixel_values"]) for sample in samples)
        assert len(batch["pixel_values"]) == (rounded(patches) if told else patches)
        assert isinstance(batch["image_grid_thw"], tuple) == told
        targets = supervised_targets(batch["labels"], batch["logits_to_keep"])
        inputs = {key: value for key, value in batch.items() if key not in NOT_TOLD}
        inputs["image_grid_thw"] = torch.as_tensor(inputs["image_grid_thw"])
        with trusted_placeholders(model):
            loss = supervised_loss(model(**inputs, use_cache=False).logits, targets, 1)
        model.zero_grad()
        loss.backward()
        found[told] = loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == ({False} if model_type == "paddleocr_vl" else {False, True})
    for loss, gradients in found.values():
        assert loss == pytest.approx(found[False][0], rel=1e-5)
        assert set(gradients) == set(found[False][1])
        for name, gradient in gradients.items():
            assert (gradient - found[False][1][name]).norm() <= 1e-4 * gradient.norm() + 1e-6, name
