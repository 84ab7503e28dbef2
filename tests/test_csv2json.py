"""Stage 2 on tables whose rows can be checked by hand."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from latexocr.csv2json import csv2json
from latexocr.data2csv import data2csv
from latexocr.errors import InputError
from latexocr.metrics import normalize

HAND = Path(__file__).resolve().parents[2] / "shared/data/latex_ocr_hand"


def write_csv(folder: Path, texts: list[str], *, header: str = "image_path,text") -> Path:
    """data.csv with one (fake) image a row: 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "data.csv").open("w", encoding="utf-8", newline="") as file:
        file.write(header + "\n")
        rows = csv.writer(file, quoting=csv.QUOTE_ALL)
        for number, text in enumerate(texts):
            (folder / f"{number}.png").write_bytes(b"image")
            rows.writerow([f"{number}.png", text])
    return folder / "data.csv"


def split(table: Path, **options) -> tuple[list[dict], list[dict]]:
    train_json, val_json = table.parent / "train.json", table.parent / "val.json"
    csv2json(table, train_json, val_json, **options)
    return json.loads(train_json.read_text("utf-8")), json.loads(val_json.read_text("utf-8"))


def texts(records: list[dict]) -> list[str]:
    return [record["conversations"][1]["value"] for record in records]


def images(records: list[dict]) -> list[str]:
    return [record["conversations"][0]["value"] for record in records]


def test_several_tables_and_one_spelling(tmp_path):
    """Rows of both tables, paths from each one's folder; texts spelled in one way if that is asked for."""
    tables = [write_csv(tmp_path / "a", ["x^2", "y"]), write_csv(tmp_path / "b", [r"{\frac 1 2}"])]
    options = {"train_json": tmp_path / "train.json"}
    assert str(csv2json(tables, **options)).endswith("train.json: 3 rows of 3 formulas")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "train.json"]
    with pytest.raises(InputError, match="val_size 1: needs a val_json"):
        csv2json(tables, val_size=1, **options)
    records = json.loads(options["train_json"].read_text("utf-8"))
    assert images(records) == ["a/0.png", "a/1.png", "b/0.png"]
    assert [record["id"] for record in records] == ["identity_1", "identity_2", "identity_3"]
    assert texts(records) == ["x^2", "y", r"{\frac 1 2}"]
    csv2json(tables, normalize=1, **options)
    records = json.loads(options["train_json"].read_text("utf-8"))
    assert texts(records) == ["x ^ { 2 }", "y", r"\frac { 1 } { 2 }"]


def test_many_rows_share_the_cores(tmp_path, monkeypatch):
    table = write_csv(tmp_path, [f"x^{number % 10}" for number in range(50)])
    alone = split(table, val_size=5)
    monkeypatch.setattr("latexocr.csv2json.SHARED_FROM", 50)
    assert split(table, val_size=5) == alone
    assert len(alone[1]) == 5


def test_the_exact_shape_of_the_files(tmp_path):
    table = write_csv(tmp_path, ["\\frac{设}{b}"])
    csv2json(table, tmp_path / "train.json", tmp_path / "val.json", val_size=0)
    assert (tmp_path / "val.json").read_text() == "[]\n"
    assert (tmp_path / "train.json").read_text("utf-8") == (
        """[
  {
    "id": "identity_1",
    "conversations": [
      {
        "role": "user",
        "value": "0.png"
      },
      {
        "role": "assistant",
        "value": "\\\\frac{设}{b}"
      }
    ]
  }
]
"""
    )


def test_hard_texts_survive(tmp_path):
    hard = ["nan", "null", "NA", "#N/A", "None", 'a "b"', "a, b", "\\frac{a}{b} \\\\", "a\nb", "a\r\nb", "a\rb"]
    hard += ["设 x > 0", " x ", '"', "007", "1.50", "a\u2028b", "😀", "\\" * 5, "x" * 200_000]
    assert texts(split(write_csv(tmp_path, hard), val_size=0)[0]) == hard


def test_hard_texts_survive_both_stages(tmp_path):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    hard = ["nan", "null", "NA", 'a "b"', "a, b", "\\frac{a}{b} \\\\", "a\nb", "a\r\nb", "a\rb", "设 x", " x "]
    image = Image.new("L", (20, 10), 255)
    image.putpixel((3, 4), 0)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pq.write_table(pa.table({"image": [buffer.getvalue()] * len(hard), "text": hard}), tmp_path / "x.parquet")
    table = data2csv(str(tmp_path / "x.parquet"), tmp_path / "out", num_workers=1).csv
    assert texts(split(table, val_size=0)[0]) == hard


def test_equal_formulas_stay_on_one_side(tmp_path):
    spellings = ["x ^ { 2 }", "x^2", "x^{2}", "{x}^{2}"]
    others = [f"y_{{{number}}}" for number in range(20)]
    for seed in range(20):
        train, val = split(write_csv(tmp_path, spellings + others), val_size=8, seed=seed)
        assert len(set(spellings) & set(texts(val))) in (0, 4)
        assert sorted(texts(train) + texts(val)) == sorted(spellings + others)
        assert len(val) == 8


def test_val_size_as_count_and_fraction(tmp_path):
    table = write_csv(tmp_path, [f"x_{{{number}}}" for number in range(40)])
    for val_size, num_val in ((0, 0), (7, 7), (39, 39), (0.25, 10), (0.05, 2), (0.001, 1), (0.0, 0)):
        train, val = split(table, val_size=val_size)
        assert (len(train), len(val)) == (40 - num_val, num_val)


def test_repeated_formulas_never_exceed_the_count(tmp_path):
    table = write_csv(tmp_path, ["a"] * 5 + ["b"] * 5 + ["c"])
    assert sorted(texts(split(table, val_size=4)[1])) == ["c"]
    assert len(split(table, val_size=6)[1]) in (5, 6)


def test_a_formula_larger_than_the_count_still_gives_a_validation_set(tmp_path):
    assert texts(split(write_csv(tmp_path, ["a"] * 9 + ["b"] * 5), val_size=2)[1]) == ["b"] * 5


def test_seed_decides_and_order_stays(tmp_path):
    table = write_csv(tmp_path, [f"x_{{{number}}}" for number in range(40)])
    first, again, other = split(table), split(table), split(table, seed=1)
    assert first == again
    assert first != other
    for records in first:
        numbers = [int(record["id"].removeprefix("identity_")) for record in records]
        assert numbers == sorted(numbers)
        assert images(records) == [f"{number - 1}.png" for number in numbers]


def test_split_does_not_depend_on_the_hash_seed(tmp_path):
    table = write_csv(tmp_path, [f"x_{{{number}}}" for number in range(40)])
    files = []
    for hash_seed in ("1", "2"):
        run = ["csv2json", "--csv", table, "--train-json", tmp_path / "t.json", "--val-json", tmp_path / "v.json"]
        command = [sys.executable, "-m", "latexocr", *map(str, run), "--val-size", "0.5"]
        done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True)
        assert done.stdout == (
            f"{tmp_path}/t.json: 20 rows of 20 formulas; {tmp_path}/v.json: 20 rows of 20 other formulas (seed 42)\n"
        )
        files.append((tmp_path / "v.json").read_bytes())
    assert files[0] == files[1]


def test_paths_are_relative_to_each_json_file(tmp_path):
    table = write_csv(tmp_path / "data", ["a", "b"])
    train_json, val_json = tmp_path / "json/train.json", tmp_path / "val.json"
    csv2json(table, train_json, val_json, val_size=1)
    (train_image,) = images(json.loads(train_json.read_text()))
    (val_image,) = images(json.loads(val_json.read_text()))
    assert {train_image.replace("../", ""), val_image} == {"data/0.png", "data/1.png"}
    assert train_image.startswith("../data/")


def test_paths_through_a_linked_folder(tmp_path):
    table = write_csv(tmp_path / "data", ["a"])
    (tmp_path / "deep/folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep/folder")
    csv2json(table, tmp_path / "link/train.json", tmp_path / "link/val.json", val_size=0)
    (image,) = images(json.loads((tmp_path / "link/train.json").read_text()))
    assert (tmp_path / "link" / image).read_bytes() == b"image"


def test_absolute_paths_stay(tmp_path):
    (tmp_path / "a.png").write_bytes(b"image")
    table = tmp_path / "data.csv"
    table.write_text(f"image_path,text\n{tmp_path}/a.png,x\n")
    assert images(split(table, val_size=0)[0]) == [f"{tmp_path}/a.png"]


def test_a_table_saved_by_a_spreadsheet(tmp_path):
    """Byte order mark, CRLF line ends, columns in another order and one more."""
    (tmp_path / "a.png").write_bytes(b"image")
    table = tmp_path / "data.csv"
    table.write_bytes("\ufefftext,note,image_path\r\nx,?,a.png\r\n".encode())
    (record,) = split(table, val_size=0)[0]
    assert (images([record]), texts([record])) == (["a.png"], ["x"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"data\.csv: no such file; make it with latexocr data2csv"),
        ("", r"data\.csv: empty file"),
        ("image_path,text\n", r"data\.csv: no rows"),
        ("image,text\na.png,x\n", r"data\.csv: no column image_path among image, text; rename one"),
        ("image_path,latex\na.png,x\n", r"data\.csv: no column text among image_path, latex"),
        ("image_path,text\na.png,x\nb.png,y\n", r"data\.csv, row 1 \(b\.png\): no such image under"),
        ("image_path,text\n,x\n", r"data\.csv, row 0 \(\): no such image under"),
        ("image_path,text\nempty.png,x\n", r"row 0 \(empty\.png\): the image file is empty"),
        ("image_path,text\na.png, \n", r"row 0 \(a\.png\): the text is blank; remove the row"),
        ("image_path,text\na.png,x,y\n", r"data\.csv, line 2: 3 fields, header has 2; put texts that hold"),
        ('image_path,text\na.png,"x\n', r"data\.csv, line 2: malformed"),
    ],
)
def test_bad_table_is_one_line_and_writes_nothing(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(b"image")
    (tmp_path / "empty.png").write_bytes(b"")
    if content is not None:
        (tmp_path / "data.csv").write_text(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        csv2json(tmp_path / "data.csv", tmp_path / "new/train.json", tmp_path / "new/val.json")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("val_size", [-1, 1.5, 1.0, -0.1, float("nan"), float("inf")])
def test_val_size_that_means_nothing(tmp_path, val_size):
    with pytest.raises(InputError, match=r"needed is a count such as 200 or a fraction such as 0\.05"):
        split(write_csv(tmp_path, ["a", "b"]), val_size=val_size)


@pytest.mark.parametrize("val_size", [2, 3, 0.9])
def test_val_size_that_leaves_nothing_to_train_on(tmp_path, val_size):
    with pytest.raises(InputError, match="leaves nothing to train on, there are only 2 rows"):
        split(write_csv(tmp_path, ["a", "b"]), val_size=val_size)


def test_one_formula_cannot_be_split(tmp_path):
    table = write_csv(tmp_path, ["x^2", "x ^ {2}", "x^{2}"])
    with pytest.raises(InputError, match=r"all rows show one formula: .*use --val-size 0"):
        split(table, val_size=1)
    assert len(split(table, val_size=0)[0]) == 3


def test_output_that_cannot_be_written_leaves_neither_file(tmp_path):
    table = write_csv(tmp_path / "data", ["a", "b"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file.*: cannot be written \(.*\); choose another"):
        csv2json(table, tmp_path / "train.json", tmp_path / "file/val.json")
    (tmp_path / "val.json").mkdir()
    with pytest.raises(InputError, match=r"val\.json: cannot be written \(Is a directory\)"):
        csv2json(table, tmp_path / "train.json", tmp_path / "val.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data", "file", "val.json"]
    with pytest.raises(InputError, match="train and validation all need files of their own"):
        csv2json(table, tmp_path / "x.json", tmp_path / "x.json")


def test_real_handwritten_rows(tmp_path):
    if not HAND.is_dir():
        pytest.skip("the real handwritten rows are not beside this checkout (../shared/data/latex_ocr_hand)")
    table = data2csv(str(HAND / "train.parquet"), tmp_path / "out").csv
    train, val = split(table, val_size=100)
    assert (len(train) + len(val), len(val)) == (1200, 100)
    sides = [{normalize(text) for text in texts(records)} for records in (train, val)]
    assert not sides[0] & sides[1]
    assert max(Counter(texts(train)).values()) > 1
