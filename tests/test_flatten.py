"""Flattened batches: positions as the models compute them, losses and gradients as with padding."""

from __future__ import annotations

import pytest
import torch
from conftest import MODEL_TYPES

from latexocr.collate import rope_positions
from latexocr.metrics_file import read_metrics
from latexocr.modeling import load_base
from latexocr.records import read_records
from latexocr.train import load_preprocessor, train


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_positions_equal_the_models_own(model_type, tiny_models, config, records):
    folder, preprocessor = load_preprocessor(config(model_name_or_path=str(tiny_models[model_type])))
    model = load_base(folder, dtype=torch.float32)
    for record in read_records(records["train"])[:6]:
        sample = preprocessor(record)
        theirs, _ = model.model.get_rope_index(
            sample["input_ids"][None], mm_token_type_ids=sample["mm_token_type_ids"][None],
            image_grid_thw=sample["image_grid_thw"],
        )  # fmt: skip
        ours = rope_positions(sample["mm_token_type_ids"], sample["image_grid_thw"], 2)
        assert torch.equal(ours, theirs[:, 0])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_flattened_equals_padded(model_type, tiny_models, config, tmp_path):
    found = {}
    for flatten in (False, True):
        output = tmp_path / str(flatten)
        train(config(model_name_or_path=str(tiny_models[model_type]), output_dir=str(output), flatten=flatten,
                     per_device_train_batch_size=4, gradient_accumulation_steps=2,
                     lora_components=["language", "vision", "merger"]))  # fmt: skip
        found[flatten] = [row for row in read_metrics(output / "metrics.jsonl") if "loss" in row]
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        padded, flattened = ([row[key] for row in found[flatten]] for flatten in (False, True))
        assert len(padded) == 3 and flattened == pytest.approx(padded, rel=tolerance), key
