"""Training every weight: what it must share with LoRA training, and what whole checkpoints must be."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SAMPLE
from safetensors.torch import load_file

from latexocr.dataset import FormulaDataset, Variation
from latexocr.errors import InputError
from latexocr.merge import merge
from latexocr.metrics_file import read_metrics
from latexocr.modeling import load_base
from latexocr.placeholders import PlaceholderMask
from latexocr.predict import LatexOCR
from latexocr.records import Record
from latexocr.train import load_preprocessor, train
from latexocr.trainer import FormulaTrainer

MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json",
               "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "latexocr.json"}  # fmt: skip


@pytest.fixture
def full(config):
    """`config` for training every weight."""

    def make(**options):
        return config(**{"finetuning": "full", "learning_rate": 1e-4, **options})

    return make


def logged(result, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(result.trained_dir.parent / "metrics.jsonl") if key in row]


def test_every_weight_moves_and_the_result_is_an_ordinary_checkpoint(full, tiny, tmp_path):
    result = train(full(max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-2))  # seen in 16 bits
    assert result.model_dir == tmp_path / "run/model"
    for folder in (result.model_dir, tmp_path / "run/checkpoint-1"):
        assert {path.name for path in folder.iterdir()} >= MODEL_FILES
    before, after = load_file(tiny / "model.safetensors"), load_file(result.model_dir / "model.safetensors")
    assert before.keys() == after.keys()  # the hub's names
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert [name for name in after if torch.equal(before[name].bfloat16(), after[name])] == []
    resumable = load_file(tmp_path / "run/checkpoint-1/model.safetensors")
    assert {value.dtype for value in resumable.values()} == {torch.float32}
    from transformers import AutoModelForImageTextToText

    assert AutoModelForImageTextToText.from_pretrained(result.model_dir, dtype="auto").dtype == torch.bfloat16


def test_resumed_equals_uninterrupted(full, records, tmp_path):
    """Random answer tokens, evaluations on the way: the same numbers to the last bit, and the same weights."""
    options = dict(max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
                   val_json=str(records["val"]), token_corruption=0.3, save_total_limit=None, logging_steps=3,
                   logging_first_step=False, max_new_tokens=2, load_best_model_at_end=False)  # fmt: skip
    whole = train(full(output_dir=str(tmp_path / "whole"), **options))
    weights = (whole.model_dir / "model.safetensors").read_bytes()
    resumed = train(
        full(
            output_dir=str(tmp_path / "whole"), resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"), **options
        )
    )
    assert logged(resumed) == logged(whole) and logged(resumed, "eval_loss") == logged(whole, "eval_loss")
    assert (resumed.model_dir / "model.safetensors").read_bytes() == weights
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
    assert load_base(result.model_dir, dtype=torch.float32).dtype == torch.float32
    with pytest.raises(InputError, match="init_from_config makes random weights: nothing to adapt"):
        full(init_from_config=True, finetuning="lora")


def test_a_trained_model_is_the_base_of_the_next_training(full, tiny, tmp_path):
    """Two stages of full training, then an adapter on the result."""
    first = train(full(output_dir=str(tmp_path / "1"), max_steps=6, learning_rate=1e-3))
    second = train(full(output_dir=str(tmp_path / "2"), model_name_or_path=str(first.model_dir), max_steps=1))
    assert logged(second)[0] < 0.9 * logged(first)[0]
    third = train(full(output_dir=str(tmp_path / "3"), model_name_or_path=str(second.model_dir), max_steps=1,
                       finetuning="lora"))  # fmt: skip
    contract = json.loads((third.adapter_dir / "latexocr.json").read_text())
    assert contract["base_model"] == str(second.model_dir) and third.adapter_dir.name == "adapter"


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


def test_corrupted_tokens_are_shown_and_not_asked_for(config, tiny):
    """Half of what the decoder is shown of an answer is wrong, in other places in every epoch; labels, prompt and end
    token stay; half of a long answer, so a count far from half is a mistake."""
    _, preprocessor = load_preprocessor(config())
    record = Record.of_picture("1", SAMPLE / "images/000000.png", "x + " * 100 + "y", "record 1")
    (answer,) = preprocessor.answers([record.text], [None])
    dataset = FormulaDataset([record] * 2, preprocessor, variation=Variation(token_corruption=0.5, seed=7))
    first, again = dataset[0], dataset[0]
    plain = FormulaDataset([record], preprocessor)[0]
    shown = first["input_ids"][-len(answer) :]
    wrong = shown != torch.tensor(answer)
    assert 0.35 * len(answer) < wrong.sum() < 0.65 * len(answer) and not wrong[-1]
    assert torch.equal(first["labels"], plain["labels"]) and torch.equal(first["pixel_values"], plain["pixel_values"])
    assert torch.equal(first["input_ids"][: -len(answer)], plain["input_ids"][: -len(answer)])
    assert set(shown.tolist()).isdisjoint(preprocessor._special_ids - set(answer))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], dataset[1]["input_ids"])
    dataset.set_epoch(1)
    assert not torch.equal(first["input_ids"], dataset[0]["input_ids"])


def test_pictures_vary_from_epoch_to_epoch(full, tiny, tmp_path):
    """The same picture again in the same epoch, another one in the next and for another record; a style must exist."""
    _, preprocessor = load_preprocessor(full())
    record = Record.of_picture("1", SAMPLE / "images/000000.png", "x", "record 1")
    dataset = FormulaDataset([record] * 2, preprocessor, variation=Variation(augment="print", seed=7))
    first, again, other = dataset[0], dataset[0], dataset[1]
    assert all(torch.equal(first[key], again[key]) for key in first)
    dataset.set_epoch(1)
    for sample in (other, dataset[0], FormulaDataset([record], preprocessor)[0]):
        assert not torch.equal(sample["pixel_values"], first["pixel_values"])
    assert len(train(full(augment="print", max_steps=1)).metrics) == 1
    with pytest.raises(InputError, match="prints"):
        train(full(augment="prints", output_dir=str(tmp_path / "other")))


@pytest.mark.slow
def test_variations_do_not_depend_on_the_number_of_workers(full, tmp_path):
    """Two epochs with workers that live as long as the run and without any: the same losses."""
    options = dict(token_corruption=0.5, max_steps=-1, num_train_epochs=2)
    without = train(full(output_dir=str(tmp_path / "0"), **options))
    with_two = train(full(output_dir=str(tmp_path / "2"), dataloader_num_workers=2, dataloader_persistent_workers=True,
                          **options))  # fmt: skip
    assert len(logged(without)) == 6 and logged(with_two) == pytest.approx(logged(without), rel=1e-6)
    usual = train(full(output_dir=str(tmp_path / "usual"), **{**options, "token_corruption": 0.0}))
    assert logged(usual)[0] != pytest.approx(logged(without)[0], rel=1e-4)


def test_whole_models_are_taken_where_models_are(full, records, tmp_path):
    """Evaluated and asked; merge says that there is nothing to merge."""
    result = train(full(max_steps=1))
    picture = SAMPLE / "images/000000.png"
    assert isinstance(LatexOCR.from_pretrained(result.model_dir)(picture, max_new_tokens=4), str)
    with pytest.raises(InputError, match=r"model: no adapter_config\.json, .* \(a whole model, which --model takes"):
        merge(result.model_dir, tmp_path / "merged")


def test_only_matrices_decay(tiny_models):
    """`norm1` of Qwen2.5-VL's vision tower is a norm that stock Trainer lets decay."""
    model = load_base(tiny_models["qwen2_5_vl"], dtype=torch.float32)
    decaying = set(FormulaTrainer.get_decay_parameter_names(None, model))
    assert {"model.visual.patch_embed.proj.weight", "model.visual.blocks.0.attn.qkv.weight"} < decaying
    kept = {
        "model.visual.blocks.0.norm1.weight",
        "model.visual.blocks.0.attn.qkv.bias",
        "model.language_model.norm.weight",
    }
    assert kept < {name for name, _ in model.named_parameters()} and kept.isdisjoint(decaying)


def test_bfloat16_arithmetic_keeps_float32_weights(full, records, tmp_path):
    """On the CPU under autocast: losses near those in float32, checkpoints in float32, answers generated."""
    options = dict(val_json=str(records["val"]), eval_strategy="steps", eval_steps=3, save_strategy="steps",
                   save_steps=3, eval_generate_samples=2, max_new_tokens=2)  # fmt: skip
    exact = train(full(output_dir=str(tmp_path / "32"), **options))
    rounded = train(full(output_dir=str(tmp_path / "16"), bf16=True, **options))
    assert logged(rounded) == pytest.approx(logged(exact), rel=5e-3) and logged(rounded) != logged(exact)
    weights = load_file(tmp_path / "16/checkpoint-3/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())


def test_options_that_do_not_go_together(full):
    for options, message in (
        ({"fused_lora": True}, "fused_lora needs frozen weights"),
        ({"token_corruption": 1.0}, "needs a share from 0 to below 1"),
        ({"init_from_config": True, "freeze": ["vision"]}, "init_from_config makes random weights, freeze keeps them"),
    ):
        with pytest.raises(InputError, match=message):
            full(**options)
    with pytest.raises(InputError, match="needs frozen vision and merger, but this trains vision and merger"):
        train(full(cache_vision_features=True))


def test_prompt_and_pictures_are_those_of_the_base(full, tmp_path):
    """A whole model of ours is trained on with the prompt and sizes that it knows, unless others are given."""
    first = train(full(output_dir=str(tmp_path / "1"), max_steps=1, min_visual_tokens=16, prompt="Read it."))
    config = full(model_name_or_path=str(first.model_dir), max_visual_tokens=512)
    _, preprocessor = load_preprocessor(config)
    policy = preprocessor.policy
    assert (preprocessor.prompt, policy.min_visual_tokens, policy.max_visual_tokens) == ("Read it.", 16, 512)
    assert config.resolved()["prompt"] == "Read it." and config.resolved()["min_visual_tokens"] == 16
    _, preprocessor = load_preprocessor(full(model_name_or_path=str(first.model_dir), prompt="Another."))
    assert preprocessor.prompt == "Another."
