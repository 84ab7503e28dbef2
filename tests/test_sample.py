"""`data/sample` is complete and small, and `scripts/make_sample.py` makes it again."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from latexocr.errors import InputError
from latexocr.metrics import normalize
from latexocr.metrics.canonical import is_formula

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
ROWS = [json.loads(line) for line in (SAMPLE / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # a script puts the checkout in front
    spec = importlib.util.spec_from_file_location("make_sample", ROOT / "scripts" / "make_sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_an_imagefolder_of_400_rows():
    assert len(ROWS) == 400
    assert all(list(row) == ["file_name", "text"] for row in ROWS)
    assert sorted(path.name for path in SAMPLE.iterdir()) == ["README.md", "images", "metadata.jsonl"]
    pictures = sorted(f"images/{path.name}" for path in (SAMPLE / "images").iterdir())
    assert pictures == [row["file_name"] for row in ROWS]


def test_it_is_small():
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) < 1_200_000


def test_texts_are_distinct_well_formed_and_short():
    assert len({normalize(row["text"]) for row in ROWS}) == 400
    assert all(is_formula(row["text"]) for row in ROWS)
    lengths = [len(row["text"].split()) for row in ROWS]
    assert (min(lengths), max(lengths)) == (1, 25)


def test_every_picture_opens_with_ink_inside_a_white_margin():
    for row in ROWS:
        image = Image.open(SAMPLE / row["file_name"])
        image.load()
        assert image.mode == "L"
        left, upper, right, lower = ImageChops.invert(image).getbbox()
        assert (left, upper, image.width - right, image.height - lower) == (6, 6, 6, 6), row


def test_pictures_are_distinct():
    assert len({(SAMPLE / row["file_name"]).read_bytes() for row in ROWS}) == 400


def test_the_script_writes_the_same_texts(script):
    assert list(script.formulas(num_rows=400, seed=0)) == [row["text"] for row in ROWS]
    assert next(script.formulas(num_rows=1, seed=1)) != ROWS[0]["text"]


@pytest.mark.parametrize(
    ("text", "mathtext"),
    [
        (r"\frac { \alpha x } { 2 }", r"\dfrac{\alpha x}{2}"),
        (r"\sqrt { \frac { 1 } { y } } _ { n }", r"\sqrt{\frac{1}{y}}_{n}"),
        (r"\left( \cdot 4 \right)", r"\left(\cdot4\right)"),
    ],
)
def test_spelling_for_mathtext(script, text, mathtext):
    assert script._mathtext(text) == mathtext


def test_the_script_draws_the_same_pictures(script, tmp_path):
    pytest.importorskip("matplotlib")
    summary = script.make_sample(output=tmp_path, num_rows=8)
    assert summary == f"{tmp_path}: 8 formulas"
    rows = (tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, rows)) == ROWS[:8]
    assert len(list((tmp_path / "images").iterdir())) == 8
    if version("matplotlib") != script.RENDERED_WITH:
        pytest.skip(f"the bundled pictures were drawn with matplotlib {script.RENDERED_WITH}")
    for row in ROWS[:8]:
        drawn, bundled = Image.open(tmp_path / row["file_name"]), Image.open(SAMPLE / row["file_name"])
        assert (drawn.mode, drawn.size, drawn.tobytes()) == (bundled.mode, bundled.size, bundled.tobytes())


def test_the_script_refuses_a_folder_with_other_pictures(script, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").touch()
    with pytest.raises(InputError, match=r"1 files are not of this sample \(mine.png\); remove them or choose"):
        script.make_sample(output=tmp_path, num_rows=2)
    assert not (tmp_path / "metadata.jsonl").exists()
