"""The benchmarks run on a CPU with a tiny model and print the JSON that they promise."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLE, launch_by, requires, requires_tex

from latexocr.csv2json import csv2json
from latexocr.data2csv import data2csv

BENCHMARKS = ROOT / "scripts/benchmark"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    data2csv(str(SAMPLE), folder / "data", max_samples=60)
    csv2json(folder / "data/data.csv", folder / "train.json", folder / "val.json")
    return folder / "train.json"


# the processes that a benchmark starts are started by the same program
START = """
import runpy, sys
sys.executable, *sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def run(launch, python) -> Callable[..., dict]:
    """Runs a benchmark, and reads the JSON that it prints."""

    def run(script: str, *arguments: object) -> dict:
        return json.loads(launch("-c", START, python, BENCHMARKS / script, *arguments).stdout)

    return run


def load(name: str):
    """A benchmark's module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
def test_training(run, data, tiny, tmp_path):
    found = run("training.py", "--data", data, "--size", "tiny", "--model", tiny, "--steps", 4,
                "--variants", "tutorial 2x2", "ours 0x1", "ours 2x1 checkpointing",
                "--output", tmp_path / "found.json")  # fmt: skip
    assert json.loads((tmp_path / "found.json").read_text()) == found
    tutorial, nothing, ours = found["results"]
    assert nothing["variant"] == "ours 0x1" and "per_device_train_batch_size is 0" in nothing["failed"]
    assert tutorial["over_tutorial"] == 1.0 and ours["over_tutorial"] > 0
    assert tutorial["preparing"]["dataset_map"] is (importlib.util.find_spec("datasets") is not None)
    for row in (tutorial, ours):
        assert row["samples_per_second"] > 0 and len(row["losses"]) == 4 and row["matmul_share"] > 0
        assert row["process_seconds"] > row["train_runtime"] > 0
    assert 0 <= ours["waiting_for_data"] < 1
    assert {"device", "cores", "torch", "transformers", "peft", "accelerate"} <= set(found["machine"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="the peer is not installed")
def test_sfttrainer(run, data, tiny):
    found = run("training.py", "--data", data, "--size", "tiny", "--model", tiny, "--steps", 3,
                "--variants", "trl 2x2 checkpointing", "trl 4x1")  # fmt: skip
    assert [len(row["losses"]) for row in found["results"]] == [3, 3]


@pytest.mark.slow
def test_curves(run, data, tiny):
    found = run("curves.py", "--data", data, "--size", "tiny", "--model", tiny, "--steps", 3,
                "--variants", "padded 4x1", "flattened 2x2")  # fmt: skip
    assert found["reference"] == "padded 4x1" and len(found["results"]["padded 4x1"]) == 3
    assert found["absolute_difference"]["flattened 2x2"]["largest"] < 1e-3  # float32: equal up to rounding
    assert found["absolute_difference"]["padded 4x1"] == {"mean": 0, "largest": 0}


@pytest.mark.slow
def test_scaling(run, data, tiny):
    found = run("scaling.py", "--data", data, "--size", "tiny", "--model", tiny, "--steps", 3,
                "--ranks", 1, 2, "--batches", 2)  # fmt: skip
    one, two = found["results"]
    assert one["efficiency"] == 1.0 and two["ranks"] == 2 and two["efficiency"] > 0


@pytest.mark.slow
def test_job(data, tiny):
    """Its processes are real starts."""
    words = ("--data", data, "--size", "tiny", "--model", tiny, "--samples", 12, "--epochs", 1)
    found = json.loads(launch_by(sys.executable, BENCHMARKS / "job.py", *words, "--variants", "ours 4x1").stdout)
    (row,) = found["results"]
    assert found["samples"] == 12 and len(row["losses"]) == 3
    assert row["process_seconds"] > row["train_runtime"] > 0


@pytest.mark.slow
@requires("bitsandbytes")
def test_full_size(run, data, tiny):
    """What was saved has the loss of the last validation."""
    found = run("full_size.py", "--data", data, "--size", "tiny", "--model", tiny, "--steps", 4, "--lora-r", 16,
                "--recipes", "qlora", "--batches", 2, "--options", "learning_rate=1e-3")  # fmt: skip
    (row,) = found["results"]
    assert row["loaded_again"] == pytest.approx(row["validation_loss"], rel=1e-5)
    assert row["last_loss"] < row["first_loss"] and row["samples_per_second"] > 0
    assert row["variant"] == "qlora 2x1 checkpointing" and found["options"]["lora_r"] == 16


def test_ranks_that_failed_say_why(tmp_path):
    """Before the launcher's own words, which are longer than a message."""
    common, script = load("common"), tmp_path / "script.py"
    script.write_text("raise ValueError('the cause')", encoding="utf-8")
    with pytest.raises(common.Failed) as error:
        common.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, script])
    assert "ValueError: the cause" in str(error.value)[-600:]


@pytest.mark.slow
@requires("deepspeed")
def test_full_size_sharded(data, tiny):
    """Its processes are real starts."""
    words = ("--data", data, "--size", "tiny", "--model", tiny, "--steps", 4, "--lora-r", 16, "--recipes", "lora",
             "--batches", 2, "--ranks", 2, "--sharded", "zero3")  # fmt: skip
    found = json.loads(launch_by(sys.executable, BENCHMARKS / "full_size.py", *words, DS_ACCELERATOR="cpu").stdout)
    (row,) = found["results"]
    assert row["loaded_again"] == pytest.approx(row["validation_loss"], rel=1e-5)
    assert (row["ranks"], row["sharded"]) == (2, "zero3")


@pytest.mark.slow
def test_generation(run, data, tiny):
    found = run("generation.py", "--data", data, "--size", "tiny", "--model", tiny, "--images", 6,
                "--images-one-by-one", 2, "--tokens", 5, "--batch-sizes", 4)  # fmt: skip
    rates = {row["reader"]: row["over_one_by_one"] for row in found["results"]}
    assert rates["one by one"] == 1.0 and len(rates) == 5 and all(rate > 0 for rate in rates.values())


def test_chart(run, tmp_path):
    rows = [{"variant": f"{system} {batch}x1", "samples_per_second": rate * batch}
            for system, rate in (("tutorial", 1.0), ("ours", 10.0)) for batch in (4, 1)]  # fmt: skip
    rows += [{"variant": "ours 128x1", "failed": "out of memory"}, {"variant": "ours 4x4", "samples_per_second": 9.0}]
    (tmp_path / "sweep.json").write_text(json.dumps({"machine": {"device": "a GPU", "torch": "2"}, "results": rows}))
    found = run("chart.py", tmp_path / "sweep.json", "--output", tmp_path / "speed.svg")
    assert found == {"tutorial": {"1": 1.0, "4": 4.0}, "ours": {"1": 10.0, "4": 40.0}}
    assert (tmp_path / "speed.svg").read_text().count("<svg") == 1


def test_counted_work(tiny, records):
    """By hand, for the tiny model: its layers' weights times 4 per token, vision times 2 per patch, head times 4."""
    from transformers import AutoModelForImageTextToText

    from latexocr.train import TrainConfig, load_data

    model = AutoModelForImageTextToText.from_pretrained(tiny)
    language = sum(weight.numel() for weight in model.model.language_model.layers.parameters())
    vision = sum(weight.numel() for weight in model.model.visual.parameters())
    head = model.lm_head.weight.numel()
    options = {"model_name_or_path": str(tiny), "train_json": str(records["train"]), "image_mode": "fixed"}
    counts = load_data(TrainConfig(**options, use_cpu=True)).training.counts
    tokens, answers = (sum(getattr(count, name) for count in counts) / 24 for name in ("total", "answer"))
    expected = 4 * language * tokens + 2 * vision * 288 + 4 * head * answers  # 504 x 112 pixels are 36 x 8 patches
    assert load("common").flop_per_sample(tiny, records["train"]) == pytest.approx(expected)


def test_what_shards_is_a_file_of_the_launcher():
    for name in load("common").SHARDED:
        assert (ROOT / f"scripts/accelerate/{name}.yaml").is_file()


def test_steps_and_flags():
    common = load("common")
    steps = {name: common.steps_for(name) for name in ("ours 16x1", "ours 64x1", "tutorial 4x4")}
    assert steps["ours 16x1"] > steps["ours 64x1"] > steps["tutorial 4x4"]  # peers are slow, and soon steady
    assert common.flags({"lora_dropout": 0, "flatten": False}) == ["--lora_dropout", "0", "--flatten", "false"]


@pytest.mark.slow
def test_data(run):
    found = run("data.py", "--source", SAMPLE)
    assert found["rows"] == 400
    rates = {name: value for name, value in found["results"].items() if name.endswith("per_second")}
    assert len(rates) == 4 and all(rate > 0 for rate in rates.values())


@pytest.fixture
def sample_json(tmp_path):
    data2csv(str(SAMPLE), tmp_path / "data", max_samples=60)
    csv2json(tmp_path / "data/data.csv", tmp_path / "train.json", tmp_path / "val.json")
    return tmp_path / "train.json"


def test_preprocessing(run, sample_json):
    found = run("preprocessing.py", "--data", str(sample_json), "--samples", "20", "--tutorial_samples", "4")
    rates = found["results"]
    assert list(rates) == ["tutorial", "as arrays", "as in training"]
    assert rates["tutorial"]["over_tutorial"] == 1.0 and rates["as in training"]["over_tutorial"] > 2


def test_startup(run, sample_json):
    found = run("startup.py", "--data", str(sample_json), "--size", "tiny", "--records", "400", "800", "--steps",
                "2")  # fmt: skip
    assert [row["records"] for row in found["results"]] == [400, 800]
    for row in found["results"]:
        assert row["seconds_to_first_step"] > 0 and row["load_seconds"] > 0
        assert row["processes"] == row["workers"] + 1 and row["rss_mib"] > row["pss_mib"] > 0


@requires_tex
def test_rendering(run, tmp_path):
    lines = [f"key{n}\t\tx _ {{ {n} }}" for n in range(30)] + [r"bad" + "\t\t" + r"\frac { 1 }"]
    (tmp_path / "formulas.tsv").write_text("\n".join(lines) + "\n")
    found = run("rendering.py", "--formulas", tmp_path / "formulas.tsv", "--calls", 1)["results"]
    assert found["render_ms_a_formula"]["best"] > 0 and found["png_bytes"]["mean"] > 50
    assert found["all"]["formulas"] == 31 and found["all"]["render_rate"] == round(30 / 31, 5)
    assert found["all"]["reasons"] == {"Argument of \\frac  has an extra }": 1}


@requires_tex
def test_synthesize(run, tmp_path):
    (tmp_path / "formulas.tsv").write_text("key\t\tx _ { 1 }\nkey\t\t\\frac { a } { b }\n")
    found = run("synthesize.py", "--formulas", tmp_path / "formulas.tsv", "--images", 20, "--num-workers", 1)[
        "results"
    ]
    assert found["augment_ms"].keys() == {"im2latex", "print", "scan", "pencil", "chalk"}
    for style in ("im2latex", "print", "scan"):
        assert found["synthesize"][style]["images_per_second"] > 0 and found["synthesize"][style]["rejected"] == 0


@requires_tex
def test_glyph_f1(run, tmp_path):
    rows = [("x^2", "x_2", 1.0), ("x+1", "x+2", 0.667), ("a", "a", 1.0), ("b", "c", 0.0), ("a+b+c", "a+b", 0.75)]
    pairs = [{"prediction": one, "reference": other, "cdm_f1": value} for one, other, value in rows]
    (tmp_path / "cdm.json").write_text(json.dumps({"pairs": pairs}))
    (tmp_path / "formulas.tsv").write_text("\n".join([r"a + b = \frac { c } { d } - x ^ { 2 }"] * 3))
    arguments = ("--reference", tmp_path / "cdm.json", "--formulas", tmp_path / "formulas.tsv")
    found = run("glyph_f1.py", *arguments)["results"]
    assert found["cdm"]["spearman_neither_perfect"] == {"pairs": 3, "value": 1.0}
    assert found["cdm"]["perfect_for_cdm_only"] == ["ours 0.75 CDM 1.00: x^2 <- x_2"]
    assert found["corruption"]["steps"] == 18 and found["corruption"]["rises"] == 0
    assert found["horizontal_space"] == {"formulas": 3, "below_1": []}
