"""Vision features kept on disk: the losses of training from pixels, resuming, real ranks, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import MODEL_TYPES, ROOT, SAMPLE, write_records

from latexocr.attention import VARLEN, set_attention
from latexocr.collate import FlattenedCollator, rounded
from latexocr.dataset import FormulaDataset
from latexocr.errors import InputError
from latexocr.metrics_file import read_metrics
from latexocr.modeling import load_base
from latexocr.placeholders import trusted_placeholders
from latexocr.records import read_records
from latexocr.stopping import StopSignal
from latexocr.train import load_preprocessor, train
from latexocr.vision_cache import FeatureFile, GivenFeatures, VisionCache, image_features


def values(folder: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(folder / "metrics.jsonl") if key in row]


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_losses_equal_training_from_pixels(model_type, flatten, tiny_models, config, records, tmp_path, capsys):
    """Two epochs with dropout and a validation from pixels in between; then nothing is left of the features."""
    for cached in (False, True):
        train(config(model_name_or_path=str(tiny_models[model_type]), output_dir=str(tmp_path / str(cached)),
                     cache_vision_features=cached, flatten=flatten, max_steps=-1, num_train_epochs=2,
                     lora_dropout=0.1, val_json=str(records["val"]), eval_generate_samples=2))  # fmt: skip
    pixels, features = tmp_path / "False", tmp_path / "True"
    for key, number, tolerance in (("loss", 6, 1e-5), ("grad_norm", 6, 1e-4), ("eval_loss", 2, 1e-5)):
        assert len(values(pixels, key)) == number
        assert values(features, key) == pytest.approx(values(pixels, key), rel=tolerance), key
    _, preprocessor = load_preprocessor(config(model_name_or_path=str(tiny_models[model_type])))
    tokens = sum(preprocessor.count_tokens(record).image for record in read_records(records["train"]))
    width = 128 * (1 if model_type != "qwen3_vl" else 2)  # hidden size; the tiny Qwen3-VL has one deepstack layer
    megabytes = (24 * 24 + tokens * width * 4) / 1e6
    assert f"features of 24 images, {megabytes:,.1f} MB in {features}" in capsys.readouterr().out
    assert not (features / "vision_features").exists()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_rounded_up_batches(model_type, tiny_models, config, records):
    """Filled up for CUDA graphs, with features in the place of pixels: the logits of the plain batch."""
    folder, preprocessor = load_preprocessor(config(model_name_or_path=str(tiny_models[model_type])))
    model = load_base(folder, dtype=torch.float32)
    set_attention(model, VARLEN)
    samples = [preprocessor(record) for record in read_records(records["train"])[:3]]
    given = []
    for sample in samples:
        with torch.no_grad():
            features = image_features(model, sample["pixel_values"], sample["image_grid_thw"])
        given.append({key: value for key, value in sample.items() if key != "pixel_values"})
        given[-1]["image_features"] = features

    def logits(samples: list[dict[str, torch.Tensor]], round_up: bool) -> torch.Tensor:
        tokenizer, family = preprocessor.processor.tokenizer, preprocessor.family
        batch = FlattenedCollator(tokenizer=tokenizer, family=family, round_up=round_up)(samples)
        if round_up:
            num_tokens = sum(len(features["image_features"]) for features in samples)
            assert len(batch["image_features"]) == rounded(num_tokens)
            batch["pixel_values"] = batch.pop("image_features")
        batch["image_grid_thw"] = torch.as_tensor(batch["image_grid_thw"])
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "num_samples", "num_tokens")}
        with torch.no_grad(), trusted_placeholders(model):
            return model(**inputs, use_cache=False).logits[0]

    plain = logits(samples, round_up=False)
    given_features = GivenFeatures(model)
    assert torch.allclose(logits(given, round_up=True)[: len(plain)], plain, atol=1e-5)
    with given_features.paused():
        assert torch.equal(logits(samples, round_up=False), plain)
    given_features.park()
    held, decoder = (sum(map(torch.numel, part.parameters())) for part in (model.model, model.model.language_model))
    assert held == decoder
    assert torch.allclose(logits(given, round_up=True)[: len(plain)], plain, atol=1e-5)
    with given_features.paused():
        assert torch.equal(logits(samples, round_up=False), plain)


def test_file_to_check_by_hand(tmp_path):
    """Two images of 1 and 2 visual tokens, 3 numbers a token in bfloat16: 24 + 6 and 24 + 12 bytes."""
    file = FeatureFile(tmp_path / "features.bin", [1, 2], 3, torch.bfloat16)
    file.path.touch()
    second = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.bfloat16)
    file.write(1, torch.tensor([1, 2, 4]), second)
    file.write(0, torch.tensor([1, 2, 2]), torch.tensor([[7.0, 8.0, 9.0]], dtype=torch.bfloat16))
    assert file.num_bytes == file.path.stat().st_size == 66
    assert file(0)["image_features"].tolist() == [[7, 8, 9]] and file(0)["image_grid_thw"].tolist() == [[1, 2, 2]]
    assert torch.equal(file(1)["image_features"], second) and file(1)["image_grid_thw"].tolist() == [[1, 2, 4]]


def test_images_are_not_opened_any_more(config, tmp_path):
    """With features a sample is the same but for the pixels, and the picture may even be gone."""
    shutil.copy(SAMPLE / "images/000000.png", tmp_path / "a.png")
    (record,) = read_records(write_records(tmp_path / "a.json", [("a.png", "x")]))
    _, preprocessor = load_preprocessor(config())
    dataset = FormulaDataset([record], preprocessor)
    before = dataset[0]
    grid = before["image_grid_thw"]
    num_tokens = int(grid.prod()) // 4
    file = FeatureFile(tmp_path / "features.bin", [num_tokens], 2, torch.float32)
    file.path.touch()
    file.write(0, grid[0], torch.ones(num_tokens, 2))
    (tmp_path / "a.png").unlink()
    dataset.vision = file
    for sample, labels in ((dataset[0], before["labels"]), (dataset[-1], torch.full_like(before["labels"], -100))):
        assert torch.equal(sample["labels"], labels) and "pixel_values" not in sample
        for key in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw"):
            assert torch.equal(sample[key], before[key]), key


def test_features_are_used_again_while_nothing_has_changed(config, monkeypatch, tmp_path):
    """Resuming takes the features that are there; a changed image file has them computed again."""
    monkeypatch.setattr(VisionCache, "remove", lambda self: None)  # as if the run had been stopped
    rows = [(f"{number}.png", f"x ^ {number}") for number in range(4)]
    for name, _ in rows:
        shutil.copy(SAMPLE / f"images/00000{name}", tmp_path / name)
    options = dict(train_json=str(write_records(tmp_path / "a.json", rows)), cache_vision_features=True, max_steps=4,
                   save_strategy="steps", save_steps=2, lora_dropout=0.1)  # fmt: skip
    train(config(**options))
    run, resume = tmp_path / "run", {"resume_from_checkpoint": str(tmp_path / "run/checkpoint-2")}
    whole = values(run)
    train(config(**options, **resume))
    assert values(run) == whole

    file = run / "vision_features/features.bin"
    content = bytearray(file.read_bytes())
    content[24:1024] = bytes(1000)  # behind the first grid
    file.write_bytes(content)
    train(config(**options, **resume))
    assert values(run)[:2] == whole[:2] and values(run)[2:] != whole[2:]

    (tmp_path / "3.png").touch()
    train(config(**options, **resume))
    assert values(run) == whole


def test_what_is_refused(config, monkeypatch, tmp_path):
    for part in ("vision.mlp", "merger"):
        with pytest.raises(
            InputError, match=f"needs frozen vision and merger, but this trains {part[:6]}.*: leave it out, or"
        ):
            train(config(cache_vision_features=True, lora_components=["language", part]))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"run: the vision features need 0\.\d GB, 0\.0 GB are free"):
        train(config(cache_vision_features=True))
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_signal_before_step_one_ends_the_start(config, monkeypatch, tmp_path):
    """There is no step to finish; half a file does not count as features."""

    def entered(stop: StopSignal) -> StopSignal:
        stop.received = 15
        return stop

    monkeypatch.setattr(StopSignal, "__enter__", entered)
    with pytest.raises(SystemExit) as stopped:
        train(config(cache_vision_features=True))
    assert stopped.value.code == 143 and not (tmp_path / "run/vision_features/complete.json").exists()


@pytest.mark.slow
def test_two_real_ranks(launch, tiny, records, tmp_path):
    """Each gloo rank computes half of the features and reads those of the other: the losses of one process."""
    for ranks, batch, name in ((1, 10, "one"), (2, 5, "two")):
        launch(
            ROOT / "scripts/train.py", "--model_name_or_path", tiny, "--train_json", records["train"],
            "--output_dir", tmp_path / name, "--use_cpu", "--num_train_epochs", 2, "--cache_vision_features", "true",
            "--gradient_accumulation_steps", 1, "--logging_steps", 1, "--lora_dropout", 0, "--learning_rate", 1e-3,
            "--dataloader_num_workers", 1, "--swanlab_mode", "disabled", "--save_strategy", "no",
            "--per_device_train_batch_size", batch, ranks=ranks,
        )  # fmt: skip
    one, two = (values(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 6 and two == pytest.approx(one, rel=2e-5)
    assert not list(tmp_path.glob("*/vision_features"))
