"""The benchmarks run on a CPU with a tiny model and print the JSON that they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SAMPLE

from latexocr.csv2json import csv2json
from latexocr.data2csv import data2csv

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str) -> dict:
    command = [sys.executable, str(ROOT / "scripts/benchmark" / script), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_training(tmp_path):
    data2csv(str(SAMPLE), tmp_path / "data", max_samples=60)
    csv2json(tmp_path / "data/data.csv", tmp_path / "train.json", tmp_path / "val.json")
    found = run("training.py", "--data", str(tmp_path / "train.json"), "--size", "tiny", "--steps", "15",
                "--only", "tutorial", "flattened 16x1")  # fmt: skip
    tutorial, ours = found["results"]
    assert tutorial["over_tutorial"] == 1.0 and ours["over_tutorial"] > 0
    assert ours["variant"] == "flattened 16x1" and ours["samples_per_second"] > 0
    assert len(tutorial["losses"]) == 12 and len(ours["losses"]) == 4
    assert {"device", "torch", "transformers", "peft", "accelerate"} == set(found["machine"])


def test_data():
    found = run("data.py", "--source", str(SAMPLE))
    assert found["rows"] == 400
    rates = {name: value for name, value in found.items() if name.endswith("per_second")}
    assert len(rates) == 4 and all(rate > 0 for rate in rates.values())


@pytest.fixture
def sample_json(tmp_path):
    data2csv(str(SAMPLE), tmp_path / "data", max_samples=60)
    csv2json(tmp_path / "data/data.csv", tmp_path / "train.json", tmp_path / "val.json")
    return tmp_path / "train.json"


def test_preprocessing(sample_json):
    found = run("preprocessing.py", "--data", str(sample_json), "--samples", "20", "--tutorial_samples", "4")
    rates = found["results"]
    assert list(rates) == ["tutorial", "as arrays", "as in training"]
    assert rates["tutorial"]["over_tutorial"] == 1.0 and rates["as in training"]["over_tutorial"] > 2


def test_startup(sample_json):
    found = run("startup.py", "--data", str(sample_json), "--records", "400", "800", "--steps", "2")
    assert [row["records"] for row in found["results"]] == [400, 800]
    for row in found["results"]:
        assert row["seconds_to_first_step"] > 0 and row["load_seconds"] > 0
        assert row["processes"] == row["workers"] + 1 and row["rss_mib"] > row["pss_mib"] > 0
