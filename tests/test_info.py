"""`latexocr info`, and the model card of whatever is saved."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
import yaml
from conftest import SAMPLE
from transformers import AutoProcessor

from latexocr.card import card
from latexocr.cli import main
from latexocr.contract import Contract
from latexocr.errors import InputError
from latexocr.info import inspect
from latexocr.merge import merge
from latexocr.predict import LatexOCR
from latexocr.train import train

PICTURE = SAMPLE / "images/000000.png"


@pytest.fixture
def trained(config, records):
    """One validated step of LoRA on language model and merger, with a prompt that Markdown would misread."""
    return train(config(val_json=str(records["val"]), max_steps=1, eval_strategy="steps", eval_steps=1,
                        eval_generate_samples=2, max_new_tokens=2, prompt='Read | "it"\n<now>.',
                        lora_components=["language", "merger"]))  # fmt: skip


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_an_adapter_and_what_is_merged_of_it(trained, tiny, records, tmp_path, capsys):
    adapter = trained.adapter_dir
    for folder in (adapter, tmp_path / "run/checkpoint-1", tmp_path / "run"):
        found = inspect(folder)
        assert (found.kind, found.family, found.weight_type) == ("adapter", "Qwen2-VL", "float32")
        # 3 layers of 7 and 2 of the merger, each A and B of rank 8
        language = 3 * 8 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))
        assert found.parameters == language + 8 * (2 * (256 + 256) - 256 + 128)
        assert {name: found.lora[name] for name in ("r", "alpha", "dropout", "variants")} == {
            "r": 8, "alpha": 16, "dropout": 0.0, "variants": [],
        }  # fmt: skip
        assert sum(found.lora["layers"].values()) == 23 and found.lora["layers"]["merger"] == 2
    training = found.training
    assert training["train_json"] == f"{records['train'].parent.name}/train.json"  # no path of this machine
    assert (training["train_records"], training["val_records"], training["generated_records"]) == (24, 7, 2)
    assert found.options == {
        "finetuning": "lora", "learning_rate": 1e-3, "per_device_train_batch_size": 2, "seed": 42, "max_steps": 1,
        "gradient_accumulation_steps": 4, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_init": "default",
        "lora_components": ["language", "merger"],
    }  # fmt: skip
    assert found.scores["loss"] == trained.metrics["eval_loss"]
    assert main(["info", str(adapter)]) == 0
    printed = capsys.readouterr().out
    assert "r 8, alpha 16, dropout 0.0; layers: language" in printed and "records; step 1\n" in printed
    assert main(["info", str(adapter), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["contract"]["base_model"] == str(tiny) and told["lora"]["layers"]["merger"] == 2

    merge(adapter, tmp_path / "merged", device="cpu")
    merged = inspect(tmp_path / "merged")
    assert (merged.kind, merged.parameters, merged.lora) == ("model", inspect(tiny).parameters, {})
    assert merged.scores == found.scores
    assert "library_name: transformers" in (tmp_path / "merged/README.md").read_text()
    # what vLLM and others prepare pictures by: at least 64 visual tokens of 28 x 28 pixels
    size = AutoProcessor.from_pretrained(tmp_path / "merged").image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (64 * 784, 1024 * 784)
    assert isinstance(LatexOCR.from_pretrained(tmp_path / "merged", device="cpu")(PICTURE, max_new_tokens=2), str)


def test_every_saved_folder_has_a_card(trained, tiny, tmp_path):
    text = (trained.adapter_dir / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "run/checkpoint-1/README.md").read_text(encoding="utf-8").split("\n# ")[0] in text
    # a folder of this machine is no base model that a hub would take
    assert front_matter(text) == {
        "library_name": "peft", "pipeline_tag": "image-text-to-text", "tags": ["latexocr", "latex", "ocr", "lora"],
    }  # fmt: skip
    assert 'from_pretrained("BASE", adapter="DIR")' in text and "--model BASE --adapter DIR" in text
    assert r'| prompt | Read \| "it"\n&lt;now>. |' in text and r"until `<|im_end|>`" in text
    assert "| pictures | fit: aspect ratio kept, 64 to 1024 visual tokens of 28 x 28 pixels |" in text
    assert "only\nhow fast and in how much memory it runs is left out; all others as latexocr" in text
    assert "`learning_rate 0.001`" in text and "`lora_components language merger`" in text
    assert "Records: 7; for all but the loss 2 of them." in text
    assert str(tiny) not in text and "| base model | qwen2_vl |" in text
    assert f"| edit_distance | {trained.metrics['eval_edit_distance']:.4g} |" in text


def test_the_card_of_a_published_base_names_it(trained):
    contract = Contract.load(trained.adapter_dir)
    values = {**vars(contract), "base_model": "Qwen/Qwen2-VL-2B-Instruct"}
    Contract(**values).save(trained.adapter_dir)
    text = card(inspect(trained.adapter_dir))
    assert front_matter(text)["base_model"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert front_matter(text)["base_model_relation"] == "adapter"
    assert 'from_pretrained("DIR")' in text and "BASE" not in text


def test_a_whole_model_has_one_too(config, tiny):
    result = train(config(finetuning="full", max_steps=1))
    assert result.adapter_dir is None and result.trained_dir == result.model_dir
    found = inspect(result.model_dir)
    assert (found.kind, found.weight_type, found.base_model) == ("model", "bfloat16", str(tiny))
    assert found.options["finetuning"] == "full"
    text = (result.model_dir / "README.md").read_text(encoding="utf-8")
    assert "# " in text and "vllm serve DIR" in text and "## Scores" not in text  # nothing was validated


def test_a_stock_checkpoint_and_what_is_none(tiny, tmp_path, capsys):
    found = inspect(tiny)
    assert found.contract is None and found.scores == {} and str(found).count("\n") == 1
    assert f"{tiny}: model of the family Qwen2-VL (qwen2_vl)\nweights" in str(found)
    with pytest.raises(InputError, match=r"neither adapter_config\.json nor config\.json"):
        inspect(tmp_path)
    assert main(["info", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"latexocr info: {tmp_path / 'none'}: no such folder\n"
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(InputError, match=r"no \*\.safetensors weights"):
        inspect(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"model\.safetensors: not a safetensors file"):
        inspect(tmp_path)
    whole = (tiny / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors: ends before its tensor visual\."):
        inspect(tmp_path)


def test_it_answers_in_under_a_second_without_torch(tiny):
    code = (
        "import sys; from latexocr.cli import main; main(['info', sys.argv[1]]); "
        "print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # not by the clock: other tests share the cores
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert done.stderr == "set()\n"
