"""`data/sample` is complete and small."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageChops

from latexocr.metrics import normalize
from latexocr.metrics.canonical import is_formula

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
ROWS = [json.loads(line) for line in (SAMPLE / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


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
