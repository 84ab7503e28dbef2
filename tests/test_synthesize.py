"""`latexocr synthesize`: pictures and table for the next stage, the same for any number of workers, nothing lost."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, requires_tex
from PIL import Image

from latexocr.csv2json import csv2json
from latexocr.errors import InputError
from latexocr.metrics import normalize
from latexocr.synthesize import read_formulas, synthesize


def rows(file: Path) -> list[dict]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def formulas(tmp_path) -> Path:
    """Four formulas; the last one needs TeX."""
    file = tmp_path / "formulas.txt"
    file.write_text("x^2\n\\frac{a}{b}\n\n\\alpha \\leq 1\n\\begin{matrix} a \\end{matrix}\n", encoding="utf-8")
    return file


def test_the_next_stage_reads_it(tmp_path):
    result = synthesize(output_dir=tmp_path / "new", num_images=12, style="chalk", engine="mathtext", num_workers=1)
    assert (result.num_images, result.num_drawn, result.rejected) == (12, 12, {})
    assert str(result) == f"{tmp_path / 'new' / 'data.csv'}: 12 pictures"
    table = rows(result.csv)
    assert [row["image_path"] for row in table] == [f"images/0000/{number:08d}.png" for number in range(12)]
    for row in table:
        assert row["text"] == normalize(row["text"])
        with Image.open(tmp_path / "new" / row["image_path"]) as image:
            assert image.convert("L").getpixel((1, 1)) < 130  # a dark board
    csv2json(csv=result.csv, train_json=tmp_path / "t.json", val_json=tmp_path / "v.json", val_size=2)
    assert len(json.loads((tmp_path / "t.json").read_text())) + 2 == 12


def test_any_number_of_workers_and_another_seed(tmp_path):
    for name, options in {
        "a": {"num_workers": 1},
        "b": {"num_workers": 3},
        "c": {"num_workers": 1, "seed": 1},
    }.items():
        synthesize(
            output_dir=tmp_path / name, num_images=110, style="chalk", engine="mathtext", max_tokens=8, **options
        )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (tmp_path / "a/data.csv").read_bytes() != (tmp_path / "c/data.csv").read_bytes()


def test_what_cannot_be_drawn_is_counted_and_listed(tmp_path, formulas):
    result = synthesize(output_dir=tmp_path / "new", formulas=formulas, engine="mathtext", num_workers=1)
    assert sorted(row["text"] for row in rows(result.csv)) == [r"\alpha \leq 1", r"\frac { a } { b }", "x ^ { 2 }"]
    (refused,) = rows(result.rejected_csv)
    assert refused["text"] == r"\begin{matrix} a \end{matrix}" and "Unknown symbol" in refused["reason"]
    assert result.num_images == 4 == result.num_drawn + sum(result.rejected.values())
    assert "3 pictures" in str(result) and "1 formulas not drawn (1 ParseFatalException)" in str(result)


def test_tables_hold_any_text(tmp_path):
    texts = ["a\r b", 'x ,\n "y"', "a\0b", "\ud800"]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    result = synthesize(
        output_dir=tmp_path / "new", formulas=tmp_path / "texts.jsonl", engine="mathtext", label="as_is", num_workers=1
    )
    found = [row["text"] for row in [*rows(result.csv), *rows(result.rejected_csv)]]
    assert sorted(found) == ["\\ud800", "a\r b", "a\\x00b", 'x ,\n "y"']


def test_every_text_is_taken_before_one_is_taken_again(tmp_path, formulas):
    result = synthesize(
        output_dir=tmp_path / "new", formulas=formulas, num_images=9, engine="mathtext", label="as_is", num_workers=1
    )
    texts = Counter(row["text"] for row in [*rows(result.csv), *rows(result.rejected_csv)])
    assert sorted(texts) == sorted(read_formulas(formulas)) and sorted(texts.values()) == [2, 2, 2, 3]


def test_vary_changes_text_and_picture(tmp_path):
    (tmp_path / "one.txt").write_text("a + b = 7\n")
    result = synthesize(
        output_dir=tmp_path / "new", formulas=tmp_path / "one.txt", num_images=30, vary=0.5, engine="mathtext",
        augment=False, num_workers=1,
    )  # fmt: skip
    table = rows(result.csv)
    assert len({row["text"] for row in table}) > 20
    assert all(len(row["text"].split()) == 5 for row in table)
    assert len({(tmp_path / "new" / row["image_path"]).read_bytes() for row in table}) > 20


def test_longer_labels_are_rejected(tmp_path, formulas):
    result = synthesize(output_dir=tmp_path / "new", formulas=formulas, max_tokens=5, engine="mathtext", num_workers=1)
    assert [row["reason"] for row in rows(result.rejected_csv) if "frac" in row["text"]] == ["more than 5 tokens: 7"]
    assert result.rejected["more than 5 tokens"] == 1


def test_formulas_of_every_format(tmp_path, formulas):
    for name, content in {
        "a.csv": 'image_path,text\nx.png,"a, b"\n',
        "a.tsv": "latex\ttext\nraw\ta, b\n",
        "a.jsonl": '{"text": "a, b"}\n',
        "a.json": json.dumps([{"id": "1", "conversations": [{"role": "user", "value": "x.png"},
                                                            {"role": "assistant", "value": "a, b"}]}]),
        "a.txt": "a, b\n\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
        assert read_formulas(tmp_path / name) == ["a, b"], name
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a, b"], "other": [1]}), tmp_path / "a.parquet")
    assert read_formulas(tmp_path / "a.parquet") == ["a, b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "image_path,formula\nx,y\n", r"no text column \(text, latex, label\) among .* formula"),
        ("a.txt", "\n \n", "a.txt: no formulas"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
    ],
)  # fmt: skip
def test_files_that_hold_no_formulas(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_formulas(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vary": 1.5}, "vary 1.5 is no probability"),
        ({"num_images": 0}, "num_images 0 is less than 1"),
        ({"max_tokens": 0}, "max_tokens 0 is less than 1"),
        ({"style": "chalck"}, "did you mean 'chalk'"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        synthesize(output_dir=tmp_path / "new", engine="mathtext", **options)
    assert not (tmp_path / "new").exists()


def test_finished_data_is_not_overwritten(tmp_path):
    (tmp_path / "data.csv").touch()
    with pytest.raises(InputError, match=r"holds a data\.csv already; choose another --output-dir"):
        synthesize(output_dir=tmp_path, num_images=1)


def test_an_error_of_a_worker_reaches_the_caller(tmp_path, formulas, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="needs the program latex"):
        synthesize(output_dir=tmp_path / "new", formulas=formulas, engine="latex", num_workers=2)
    assert not (tmp_path / "new/data.csv").exists()


@requires_tex
def test_latex_alone_is_enough(tmp_path, formulas):
    """No dvipng, as on a machine with the smallest TeX."""
    for program in ("sh", "latex", "kpsewhich"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / program).symlink_to(shutil.which(program))
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/synthesize.py", "--output-dir", tmp_path / "new", "--formulas", formulas,
         "--style", "im2latex", "--no-augment", "--num-workers", "1"],
        env={**os.environ, "PATH": str(tmp_path / "bin")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'new' / 'data.csv'}: 4 pictures\n"
    with Image.open(tmp_path / "new" / rows(tmp_path / "new/data.csv")[0]["image_path"]) as image:
        assert image.mode == "P" and set(image.convert("L").tobytes()) <= {0, 85, 170, 255}
