"""The recipes: the tutorials' numbers, and a few steps of each with a tiny model of its family on the CPU."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from conftest import ROOT, SAMPLE, write_records

from latexocr.info import inspect
from latexocr.train import TrainConfig, train

RECIPES = sorted((ROOT / "scripts/recipes").glob("*.yaml"))
PICTURE = str(SAMPLE / "images/000000.png")
# As the tutorials say them: rank, alpha, dropout, samples, accumulated, learning rate, longest record.
NUMBERS = {
    "qwen2_vl_lora": (64, 16, 0.05, 4, 4, 1e-4, 8192),
    "qwen2_5_vl_qlora": (16, 16, 0, 2, 4, 2e-4, 2048),
    "qwen2_vl_json_answers": (8, 16, 0, 1, 8, 1e-4, 2048),
    "ernie4_5_vl_lora": (8, 16, 0, 2, 2, 2e-4, 2048),
    "qwen2_5_vl_markers": (64, 16, None, 1, 16, 1e-4, 4096),
}
FAMILIES = {"Qwen2-VL": "qwen2_vl", "Qwen2.5-VL": "qwen2_5_vl", "ERNIE-4.5-VL": "ernie4_5_vl_moe"}
# A published checkpoint becomes a tiny one; where things are, how long it takes, and what a CPU cannot do otherwise.
HERE = {"use_cpu": True, "max_steps": 2, "hub": "modelscope", "swanlab_mode": "disabled", "disable_tqdm": True,
        "dataloader_num_workers": 0, "logging_steps": 1, "max_new_tokens": 2, "save_steps": 2}  # fmt: skip


def tutorial(folder):
    return write_records(folder / "train.json", [(PICTURE, "x ^ 2")] * 4)


def messages(folder):
    """Text before the picture, as the Unsloth tutorials have it."""
    (folder / "a.png").write_bytes((SAMPLE / "images/000000.png").read_bytes())
    question = [{"type": "text", "text": "为图片生成LaTeX表达式"}, {"type": "image", "image": "a.png"}]
    answer = [{"type": "text", "text": "x ^ 2"}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return written(folder, {"messages": turns})


def plates(folder):
    (folder / "a.png").write_bytes((SAMPLE / "images/000000.png").read_bytes())
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": '{"Engine No": "K9"}'}]
    return written(folder, {"messages": turns, "images": ["a.png"]})


def markers(folder):
    (folder / "a.png").write_bytes((SAMPLE / "images/000000.png").read_bytes())
    return written(folder, {"text": "The square <image_no_1> grows.", "image_no_1": "a.png"})


def written(folder, row: dict):
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"id": str(number), **row}) + "\n" for number in range(4)), encoding="utf-8")
    return path


DATA = {
    "qwen2_vl_lora": tutorial,
    "qwen2_5_vl_qlora": messages,
    "qwen2_vl_json_answers": plates,
    "ernie4_5_vl_lora": messages,
    "qwen2_5_vl_markers": markers,
}


def options_of(recipe) -> dict:
    return yaml.safe_load(recipe.read_text(encoding="utf-8"))


def test_every_tutorial_has_its_recipe():
    assert {recipe.stem for recipe in RECIPES} == set(NUMBERS) == set(DATA)
    names = ("lora_r", "lora_alpha", "lora_dropout", "per_device_train_batch_size", "gradient_accumulation_steps",
             "learning_rate", "max_length")  # fmt: skip
    for recipe in RECIPES:
        options = options_of(recipe)
        assert tuple(options.get(name) for name in names) == NUMBERS[recipe.stem], recipe.name


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about CPUs
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_trains(recipe, tiny_models, tmp_path):
    """Two steps with everything that the file says except places and length; the adapter is what it asks for."""
    options = options_of(recipe)
    if options.get("load_in_4bit") or "8bit" in options.get("optim", ""):
        pytest.importorskip("bitsandbytes")
    (published,) = [
        kind for name, kind in FAMILIES.items() if re.search(rf"/{name}-\d", options["model_name_or_path"])
    ]
    data = str(DATA[recipe.stem](tmp_path))
    here = HERE | {
        "model_name_or_path": str(tiny_models[published]),
        "train_json": data,
        "output_dir": str(tmp_path / "run"),
    }
    if "val_json" in options:
        here["val_json"] = data
    if options.get("eval_strategy") == "steps":
        here["eval_steps"] = 2
    result = train(TrainConfig.from_dict(options | here))
    assert 0 < result.metrics["train_loss"] < 20
    found = inspect(result.adapter_dir)
    assert (found.lora["r"], found.lora["alpha"]) == (options["lora_r"], options["lora_alpha"])
    parts = {part.split(".")[0] for part in found.lora["layers"]}
    assert parts == {part.split(".")[0] for part in options["lora_components"]}
    assert found.contract.prompt == options.get("prompt", found.contract.prompt)
