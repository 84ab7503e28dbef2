"""Training every weight: what it must share with LoRA training, and what whole checkpoints must be."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from latexocr.errors import InputError
from latexocr.metrics_file import read_metrics
from latexocr.modeling import PlaceholderMask, load_base
from latexocr.train import train

MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json",
               "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "latexocr.json"}  # fmt: skip


@pytest.fixture
def full(config):
    """`config` for training every weight."""

    def make(**options):
        return config(**{"finetuning": "full", "learning_rate": 1e-4, **options})

    return make


def logged(result, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(result.adapter_dir.parent / "metrics.jsonl") if key in row]


def test_every_weight_moves_and_the_result_is_an_ordinary_checkpoint(full, tiny, tmp_path):
    result = train(full(max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-2))  # seen in 16 bits
    assert result.adapter_dir == tmp_path / "run/model"
    for folder in (result.adapter_dir, tmp_path / "run/checkpoint-1"):
        assert {path.name for path in folder.iterdir()} >= MODEL_FILES
    before, after = load_file(tiny / "model.safetensors"), load_file(result.adapter_dir / "model.safetensors")
    assert before.keys() == after.keys()  # the hub's names
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert [name for name in after if torch.equal(before[name].bfloat16(), after[name])] == []
    resumable = load_file(tmp_path / "run/checkpoint-1/model.safetensors")
    assert {value.dtype for value in resumable.values()} == {torch.float32}
    from transformers import AutoModelForImageTextToText

    assert AutoModelForImageTextToText.from_pretrained(result.adapter_dir, dtype="auto").dtype == torch.bfloat16


def test_resumed_equals_uninterrupted(full, records, tmp_path):
    """Random answer tokens, evaluations on the way: the same numbers to the last bit, and the same weights."""
    options = dict(max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
                   val_json=str(records["val"]), token_corruption=0.3, save_total_limit=None, logging_steps=3,
                   logging_first_step=False, max_new_tokens=2, load_best_model_at_end=False)  # fmt: skip
    whole = train(full(output_dir=str(tmp_path / "whole"), **options))
    weights = (whole.adapter_dir / "model.safetensors").read_bytes()
    resumed = train(
        full(
            output_dir=str(tmp_path / "whole"), resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"), **options
        )
    )
    assert logged(resumed) == logged(whole) and logged(resumed, "eval_loss") == logged(whole, "eval_loss")
    assert (resumed.adapter_dir / "model.safetensors").read_bytes() == weights
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors, so not a checkpoint of --finetuning lora"):
        train(full(finetuning="lora", output_dir=str(tmp_path / "whole"),
                   resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4")))  # fmt: skip


@pytest.mark.parametrize("change", ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
                                    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
                                    {"flatten": False}), ids=("8x1", "1x8", "padded"))  # fmt: skip
def test_the_split_into_batches_changes_nothing(change, full, tmp_path):
    """2 x 4 records flattened, against 8 x 1, 1 x 8 and padded batches: the same losses and gradients."""
    usual = train(full(output_dir=str(tmp_path / "usual")))
    other = train(full(output_dir=str(tmp_path / "other"), **change))
    assert logged(other) == pytest.approx(logged(usual), rel=1e-5)
    assert logged(other, "grad_norm") == pytest.approx(logged(usual, "grad_norm"), rel=1e-4)


def test_fresh_weights_need_only_a_configuration(full, tiny, tmp_path):
    """The loss begins near log(vocabulary), falls, and the weights are another seed's."""
    shape = tmp_path / "shape"
    shape.mkdir()
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (shape / path.name).write_bytes(path.read_bytes())
    result = train(full(model_name_or_path=str(shape), init_from_config=True, max_steps=8, learning_rate=1e-3))
    losses = logged(result)
    assert losses[0] > 6 and losses[-1] < 0.8 * losses[0]
    assert load_base(result.adapter_dir, dtype=torch.float32).dtype == torch.float32
    with pytest.raises(InputError, match="init_from_config makes random weights: nothing to adapt"):
        full(init_from_config=True, finetuning="lora")


def test_a_trained_model_is_the_base_of_the_next_training(full, tiny, tmp_path):
    """Two stages of full training, then an adapter on the result."""
    first = train(full(output_dir=str(tmp_path / "1"), max_steps=6, learning_rate=1e-3))
    second = train(full(output_dir=str(tmp_path / "2"), model_name_or_path=str(first.adapter_dir), max_steps=1))
    assert logged(second)[0] < 0.9 * logged(first)[0]
    third = train(full(output_dir=str(tmp_path / "3"), model_name_or_path=str(second.adapter_dir), max_steps=1,
                       finetuning="lora"))  # fmt: skip
    contract = json.loads((third.adapter_dir / "latexocr.json").read_text())
    assert contract["base_model"] == str(second.adapter_dir) and third.adapter_dir.name == "adapter"


def test_features_in_their_places_and_their_gradients():
    """Two places for three features: the third has none, and gets no gradient; the others get that of their place."""
    embeddings = torch.zeros(1, 4, 2, requires_grad=True)
    features = torch.tensor([[1.0, 2], [3, 4], [5, 6]], requires_grad=True)
    mask = torch.tensor([False, True, False, True])[None, :, None].as_subclass(PlaceholderMask)
    placed = embeddings.masked_scatter(mask, features)
    assert type(placed) is torch.Tensor and placed.tolist() == [[[0, 0], [1, 2], [0, 0], [3, 4]]]
    (placed * torch.tensor([[1.0], [2], [3], [4]])).sum().backward()
    assert features.grad.tolist() == [[2, 2], [4, 4], [0, 0]]
    assert embeddings.grad.tolist() == [[[1, 1], [0, 0], [3, 3], [0, 0]]]
