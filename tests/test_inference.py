"""predict, evaluate, score, merge, preview and build with a really trained tiny adapter."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import MODEL_TYPES, SAMPLE, write_records
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import latexocr.predict as predicting
from latexocr.build import build
from latexocr.cli import main
from latexocr.contract import Contract, fingerprint
from latexocr.errors import InputError, MergeMismatch
from latexocr.evaluate import evaluate, score_file
from latexocr.generate import Generated, answer_pieces
from latexocr.merge import merge
from latexocr.predict import LatexOCR
from latexocr.preview import preview
from latexocr.train import TrainConfig, train

IMAGES = [str(SAMPLE / f"images/{number:06}.png") for number in (1, 7, 20, 33, 45)]


@pytest.fixture(scope="module")
def adapters(tiny_models, records, tmp_path_factory):
    """An adapter for each family, trained for a few steps with a large learning rate so that it matters."""
    folders = {}
    for model_type, folder in tiny_models.items():
        output = tmp_path_factory.mktemp("trained") / model_type
        folders[model_type] = train(
            TrainConfig(
                model_name_or_path=str(folder), train_json=str(records["train"]), output_dir=str(output), use_cpu=True,
                max_steps=4, learning_rate=2e-2, lora_alpha=64, logging_steps=1, dataloader_num_workers=0,
                swanlab_mode="disabled", disable_tqdm=True, lora_components=["language", "vision", "merger"],
            )
        ).adapter_dir  # fmt: skip
    return folders


@pytest.fixture(scope="module")
def adapter(adapters):
    return adapters["qwen2_vl"]


@pytest.fixture(scope="module")
def ocr(adapter):
    return LatexOCR.from_pretrained(adapter, device="cpu")


@pytest.fixture(scope="module")
def base(tiny):
    """Random weights: answers that do not end."""
    return LatexOCR.from_pretrained(tiny, device="cpu")


def test_a_batch_reads_as_its_images_do_alone(ocr, base):
    for reader in (ocr, base):
        together = reader(IMAGES, max_new_tokens=12)
        assert together == [reader(image, max_new_tokens=12) for image in IMAGES]
        assert together == reader(IMAGES, max_new_tokens=12, batch_size=2)


def test_every_kind_of_image(ocr):
    data = (SAMPLE / "images/000001.png").read_bytes()
    image = Image.open(io.BytesIO(data))
    texts = ocr([IMAGES[0], data, image, np.asarray(image)], max_new_tokens=8)
    assert len(set(texts)) == 1


def test_stream_joins_to_the_answer(base):
    pieces = list(base.stream(IMAGES[0], max_new_tokens=12))
    assert "".join(pieces) == base(IMAGES[0], max_new_tokens=12) and len(pieces) > 1


@pytest.mark.parametrize(
    ("pieces", "begun", "answer"),
    [
        (["x ", "+ y"], False, ["x ", "+ y"]),
        (["\n<th", "ink>\n</think", ">\n", "\n x", " y "], False, ["x", " y "]),
        (["hm</think>x"], True, ["x"]),
        (["<think>", "hm"], False, ["<think>hm"]),  # it never ends: nothing else is there
        (["hm"], True, ["hm"]),
        (["<x</think>"], False, ["<x</think>"]),  # no thought was begun
        (["<think></think>"], False, []),
        ([" "], False, [" "]),
    ],
)
def test_a_thought_is_no_answer(pieces, begun, answer):
    assert list(answer_pieces(pieces, begun=begun)) == answer
    assert "".join(answer_pieces(["".join(pieces)], begun=begun)) == "".join(answer)


def test_stream_leaves_a_thought_out_too(config, tmp_path):
    """A model that begins with an empty thought: what it said is what both give."""
    always_x = write_records(tmp_path / "x.json", [(image, "x") for image in IMAGES])
    options = dict(finetuning="full", max_steps=25, learning_rate=3e-3, per_device_train_batch_size=5,
                   gradient_accumulation_steps=1, empty_thinking=True)  # fmt: skip
    ocr = LatexOCR.from_pretrained(train(config(train_json=str(always_x), **options)).model_dir, device="cpu")
    (answer,) = ocr.generate(IMAGES[:1], max_new_tokens=40)
    assert (answer.text, answer.num_tokens) == ("x", 19)  # with the thought, whose marks the tokenizer takes apart
    assert "".join(ocr.stream(IMAGES[0], max_new_tokens=40)) == "x"


def test_runaways_are_told_apart(base, config, tmp_path):
    (endless,) = base.generate(IMAGES[:1], max_new_tokens=12)
    assert endless.num_tokens == 12 and not endless.finished
    always_x = write_records(tmp_path / "x.json", [(image, "x") for image in IMAGES])
    trained = train(config(train_json=str(always_x), max_steps=8, learning_rate=2e-2, lora_alpha=64))
    (ended,) = LatexOCR.from_pretrained(trained.adapter_dir, device="cpu").generate(IMAGES[:1], max_new_tokens=12)
    assert (ended.text, ended.num_tokens, ended.finished) == ("x", 2, True)
    assert (
        endless.confidence == 0 and endless.warning == "the answer did not end within 12 tokens and is cut off there"
    )
    assert 0.5 < ended.confidence < 1 and ended.warning is None


def test_sampling_is_an_option(ocr):
    torch.manual_seed(0)
    texts = {ocr(IMAGES[0], max_new_tokens=12, temperature=1.5, min_p=0.01) for _ in range(5)}
    assert len(texts) > 1
    with pytest.raises(InputError, match="sampling options must be above 0"):
        ocr(IMAGES[0], temperature=0.0)


def test_a_bad_image_is_named(ocr):
    with pytest.raises(InputError, match=r"nowhere\.png: no such image file"):
        ocr("nowhere.png")


def test_adapter_folder_and_base_with_adapter_are_the_same(ocr, adapter, tiny):
    other = LatexOCR.from_pretrained(tiny, adapter=adapter, device="cpu")
    assert other(IMAGES, max_new_tokens=8) == ocr(IMAGES, max_new_tokens=8)
    assert other.preprocessor.policy == ocr.preprocessor.policy == ocr.contract.image_policy


def test_an_adapter_for_another_base(adapters, tiny_models, adapter, tmp_path):
    with pytest.raises(InputError, match=r"trained on another base model \(.*qwen2_vl"):
        LatexOCR.from_pretrained(tiny_models["qwen3_vl"], adapter=adapter, device="cpu")
    build(tmp_path / "other", corpus=SAMPLE / "metadata.jsonl", seed=1)
    with pytest.raises(InputError, match="trained on another base model"):
        LatexOCR.from_pretrained(tmp_path / "other", adapter=adapter, device="cpu")


def test_an_adapter_whose_keys_do_not_match(adapter, tiny, tmp_path):
    """Stock peft loads this as nothing and says nothing."""
    broken = shutil.copytree(adapter, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    renamed = {name.replace("language_model", "text_model"): tensor for name, tensor in tensors.items()}
    save_file(renamed, broken / "adapter_model.safetensors")
    with pytest.raises(InputError, match="tensors do not fit"):
        LatexOCR.from_pretrained(tiny, adapter=broken, device="cpu")


def test_folders_that_are_no_checkpoint(tmp_path, tiny):
    with pytest.raises(InputError, match=r"no config\.json, so not a model checkpoint"):
        LatexOCR.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(InputError, match="so not an adapter folder"):
        LatexOCR.from_pretrained(tiny, adapter=tmp_path, device="cpu")


def test_evaluate_and_score_agree(adapter, records, tmp_path):
    result = evaluate(str(adapter), records["val"], tmp_path / "ev", device="cpu", max_new_tokens=8)
    rows = [json.loads(line) for line in (tmp_path / "ev/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 7 == result.metrics["num_rows"]
    assert {"id", "image_path", "reference", "prediction", "num_tokens", "finished", "confidence"} == set(rows[0])
    assert "calibration_error" in result.metrics
    assert json.loads((tmp_path / "ev/metrics.json").read_text()) == result.metrics
    assert score_file(tmp_path / "ev/predictions.jsonl").metrics == result.metrics
    assert {"rows.csv", "slices.csv"} < {path.name for path in (tmp_path / "ev").iterdir()}


def test_a_source_of_the_data_is_a_slice(adapter, records, tmp_path):
    rows = json.loads(records["val"].read_text())[:3]
    rows[0]["source"], rows[2]["source"] = "book", 7
    (tmp_path / "val.json").write_text(json.dumps(rows))
    found = evaluate(str(adapter), tmp_path / "val.json", tmp_path, device="cpu", max_new_tokens=2, pictures=False)
    assert [row.get("source") for row in found.rows] == ["book", None, "7"]
    by_source = {row["slice"]: row["num_rows"] for row in found.slices if row["by"] == "source"}
    assert by_source == {"book": 1, "7": 1}


def test_two_records_with_one_id_cannot_be_told_apart(adapter, records, tmp_path):
    rows = json.loads(records["val"].read_text())[:2]
    (tmp_path / "val.json").write_text(json.dumps([{**row, "id": "same"} for row in rows]))
    with pytest.raises(InputError, match=r"val\.json: 2 records have the id 'same'"):
        evaluate(str(adapter), tmp_path / "val.json", tmp_path, device="cpu")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_merged_equals_adapter(model_type, adapters, tmp_path):
    adapter = adapters[model_type]
    result = merge(adapter, tmp_path / "merged", device="cpu")
    assert result.merged.largest < 1e-4 and result.stored.largest < 1e-4 and result.dtype == "float32"
    merged, ocr = (LatexOCR.from_pretrained(path, device="cpu") for path in (tmp_path / "merged", adapter))
    assert merged(IMAGES, max_new_tokens=12) == ocr(IMAGES, max_new_tokens=12)
    base = LatexOCR.from_pretrained(ocr.contract.base_model, device="cpu")
    assert base(IMAGES, max_new_tokens=12) != ocr(IMAGES, max_new_tokens=12)  # the adapter does something
    assert merged.contract.prompt == ocr.contract.prompt


def test_merged_weights_have_the_hubs_names(adapter, tiny, tmp_path):
    merge(adapter, tmp_path / "merged", device="cpu", dtype="bfloat16")
    merged, base = load_file(tmp_path / "merged/model.safetensors"), load_file(tiny / "model.safetensors")
    assert merged.keys() == base.keys()
    assert "model.layers.0.self_attn.q_proj.weight" in merged and "visual.blocks.0.attn.qkv.weight" in merged
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_a_merge_that_stored_the_base_is_found(adapter, tiny, tmp_path, monkeypatch):
    """Whatever goes wrong between memory and disk: here the base's own weights are written instead."""
    from transformers import PreTrainedModel

    stock = PreTrainedModel.save_pretrained

    def save_base(model, output, **options):
        stock(model, output, **options)
        shutil.copy(tiny / "model.safetensors", output / "model.safetensors")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_base)
    with pytest.raises(MergeMismatch, match="differs from what was stored by"):
        merge(adapter, tmp_path / "merged", device="cpu", dtype="bfloat16")
    assert not (tmp_path / "merged").exists()


def test_merge_refuses_a_folder_in_use(adapter, tmp_path):
    (tmp_path / "precious.txt").touch()
    with pytest.raises(InputError, match="already there and not empty"):
        merge(adapter, tmp_path)


def test_preview_prints_the_span_and_saves_the_picture(records, tiny, tmp_path):
    text = preview(records["val"], str(tiny), n=2, output_dir=tmp_path)
    assert text.count("⟦") == text.count("⟧") == 2 and "<|im_end|>⟧" in text
    with Image.open(tmp_path / "identity_1.png") as picture:
        assert picture.width % 28 == picture.height % 28 == 0


def test_predict_prints_one_line_an_image(adapter, capsys):
    assert main(["predict", "--model", str(adapter), *IMAGES[:2], "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.rstrip("\n").split("\n")) == 2
    assert main(["predict", "--model", str(adapter), IMAGES[0], "--max-new-tokens", "4", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["image_path"] == IMAGES[0] and row["num_tokens"] <= 4
    assert main(["predict", "--model", str(adapter), IMAGES[0], "--max-new-tokens", "4", "--stream"]) == 0
    assert capsys.readouterr().out == row["prediction"] + "\n"


def test_predict_streams_a_line_and_names_the_picture_that_it_warns_of(adapter, tmp_path, capsys, caplog):
    blank = str(tmp_path / "blank.png")
    Image.new("L", (200, 40), "white").save(blank)
    assert main(["predict", "--model", str(adapter), blank, "--stream"]) == 0
    assert capsys.readouterr().out == "\n"
    assert caplog.messages == [f"{blank}: the picture is blank: nothing to read"]


def test_generate_takes_a_list(ocr):
    array = np.zeros((9, 40, 3), np.uint8)
    for image in (IMAGES[0], Path(IMAGES[0]), b"", bytearray(2), Image.new("L", (9, 9)), array):
        with pytest.raises(InputError, match=r"generate reads a list of images, got one \(.*\): write \[image\]"):
            ocr.generate(image)
    assert len(ocr.generate(np.stack([array, array]), max_new_tokens=1)) == 2
    assert len(ocr.generate(pandas.Series(IMAGES[:1]), max_new_tokens=1)) == 1


def test_a_blank_picture_is_not_read(ocr, tmp_path, capsys, caplog):
    """No hallucination: an empty line, and why; the pictures around it are read as ever."""
    blank = str(tmp_path / "blank.png")
    paper = np.random.default_rng(0).integers(225, 256, (40, 200), dtype=np.uint8)  # unprinted, and not quite white
    Image.fromarray(paper).save(blank)
    first, nothing, last = ocr.generate([IMAGES[0], blank, IMAGES[1]], max_new_tokens=8)
    assert [first.text, last.text] == ocr(IMAGES[:2], max_new_tokens=8)
    assert nothing == Generated("", 0, True, 0.0, "the picture is blank: nothing to read")
    assert ocr.generate([blank] * 3, max_new_tokens=8) == [nothing] * 3
    caplog.clear()
    assert ocr(blank) == "" and list(ocr.stream(blank)) == []
    assert caplog.messages == ["the picture is blank: nothing to read"] * 2
    assert ocr([blank, IMAGES[0]], max_new_tokens=8)[0] == ""
    assert "image 0: the picture is blank: nothing to read" in caplog.messages


def test_without_a_model_the_bundled_base_is_used(tiny, adapter, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(predicting, "BUNDLED_BASE", tmp_path / "base")
    predicting._say_bundled.cache_clear()
    assert main(["predict", IMAGES[0]]) == 2
    assert "no model named, and no bundled one at " in capsys.readouterr().err
    (tmp_path / "base").symlink_to(tiny)
    first, second = (LatexOCR.from_pretrained(device="cpu") for _ in range(2))
    assert first(IMAGES[0], max_new_tokens=4) == second(IMAGES[0], max_new_tokens=4)
    (line,) = [message for message in caplog.messages if "no model named" in message]
    assert line == f"no model named: using the bundled base model for printed formulas, {tmp_path / 'base'}"
    assert main(["predict", IMAGES[0], "--max-new-tokens", "4", "--device", "cpu"]) == 0
    # an adapter names its base itself
    caplog.clear()
    adapted = LatexOCR.from_pretrained(adapter=adapter, device="cpu")
    assert adapted.contract.base_model == str(tiny) and not caplog.messages


def test_a_training_notes_from_where_on_to_warn(config, tmp_path, capsys):
    """Exponent and `min_confidence` are of the validation of the weights that were kept, if 20 were right there."""
    rows = [(IMAGES[number % 5], "x") for number in range(20)]
    always_x = str(write_records(tmp_path / "x.json", rows))
    nearly = str(write_records(tmp_path / "nearly.json", [*rows, *((image, "y") for image in IMAGES[:5])]))
    options = {"train_json": always_x, "val_json": nearly, "learning_rate": 2e-2, "lora_alpha": 64}
    result = train(config(**options, max_steps=8, eval_strategy="steps", eval_steps=8))
    contract = Contract.load(result.adapter_dir)
    assert result.metrics["eval_exact_match_level2"] == 0.8
    exponent = contract.confidence_exponent
    assert exponent == result.metrics["eval_confidence_exponent"] != 1
    assert 0.5 < contract.min_confidence == result.metrics["eval_min_confidence"] ** exponent < 1
    (answer,) = LatexOCR.from_pretrained(result.adapter_dir, device="cpu").generate(IMAGES[:1])
    command = ["predict", "--model", str(result.adapter_dir), IMAGES[0], "--json", "--device", "cpu"]
    for threshold, warned in ((answer.confidence * 0.99, False), (answer.confidence * 1.01, True)):
        replace(contract, min_confidence=threshold).save(result.adapter_dir)
        capsys.readouterr()
        assert main(command) == 0
        row = json.loads(capsys.readouterr().out)
        expected = (
            f"confidence {answer.confidence:.2g} is below {threshold:.2g}: check this answer" if warned else None
        )
        assert row["warning"] == expected
        assert row["confidence"] == pytest.approx(answer.confidence, rel=1e-3)
    replace(contract, confidence_exponent=0.5).save(result.adapter_dir)
    (bent,) = LatexOCR.from_pretrained(result.adapter_dir, device="cpu").generate(IMAGES[:1])
    assert bent.confidence == pytest.approx(answer.confidence ** (0.5 / exponent))


def test_the_contract_survives(adapter, tmp_path):
    contract = Contract.load(adapter)
    contract.save(tmp_path)
    assert Contract.load(tmp_path) == contract and Contract.load(tmp_path / "none") is None
    assert contract.base_fingerprint == fingerprint(Path(contract.base_model))
    (tmp_path / "latexocr.json").write_text("{}")
    with pytest.raises(InputError, match="not a latexocr contract"):
        Contract.load(tmp_path)


def test_build_refuses_what_it_cannot(tmp_path):
    with pytest.raises(InputError, match="no shape for qwen9 in size tiny; known: qwen2_vl"):
        build(tmp_path / "m", corpus=SAMPLE / "metadata.jsonl", model_type="qwen9")
    with pytest.raises(InputError, match="no such file of formulas"):
        build(tmp_path / "m", corpus=tmp_path / "none.txt")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    with pytest.raises(InputError, match="not empty"):
        build(tmp_path / "used", corpus=SAMPLE / "metadata.jsonl")


def test_the_built_tokenizer_knows_the_prompt(tiny):
    """As Qwen's does: nine words and a full stop are ten tokens, not letters."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.tokenize("Write the LaTeX of the formula in this image.") == [
        "Write", "Ġthe", "ĠLaTeX", "Ġof", "Ġthe", "Ġformula", "Ġin", "Ġthis", "Ġimage", "."
    ]  # fmt: skip
