"""Reading train.json: the tutorial's shape, and what other shapes are answered with."""

from __future__ import annotations

import json
import pickle

import pytest
from conftest import SAMPLE, write_records

from latexocr.errors import InputError
from latexocr.formats import Media
from latexocr.records import read_records


def test_relative_and_absolute_paths(tmp_path):
    path = write_records(tmp_path / "train.json", [("images/a.png", r"\frac{公}{2}"), ("/abs/b.png", "null")])
    first, second = read_records(path)
    assert (first.id, first.image_path, first.text) == ("identity_1", tmp_path / "images/a.png", r"\frac{公}{2}")
    assert first.where == f"{path} record 0 (a.png)"
    assert str(second.image_path) == "/abs/b.png" and second.text == "null"


def test_one_record_a_line(tmp_path):
    rows = json.loads(write_records(tmp_path / "t.json", [("a.png", "x"), ("b.png", "y")]).read_text())
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert [record.text for record in read_records(tmp_path / "t.jsonl")] == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", "malformed JSON at line 1"),
        ('{"a": 1}', "needs a list of records"),
        ("[]", r"t\.json: holds no records; give a file that has some"),
        ('[{"picture": "a.png", "text": "x"}]', r"record 0: needs .* has keys \['picture', 'text'\]"),
        ('["a.png"]', "record 0: needs .* has str"),
        ('[{"conversations": [{"role": "user", "value": "a.png"}]}]', r"with roles \['user'\]"),
        ('[{"conversations": [{"role": "user", "value": 3}, {"role": "assistant", "value": "x"}]}]', "must be text"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_records(tmp_path / "t.json")


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(InputError, match="no such file; `latexocr csv2json` writes one"):
        read_records(tmp_path / "t.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_records(tmp_path / "b.json")


@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"ensure_ascii": True}, {"separators": (" , ", " : ")}])
def test_records_are_found_in_any_layout(tmp_path, layout):
    """They are read where they stand in the file: signs of several bytes and white space must be counted."""
    texts = ["x", "公式 é", "a\nb", "]},{[", "𝛼", ""]
    rows = json.loads(
        write_records(tmp_path / "t.json", [(f"{n}.png", text) for n, text in enumerate(texts)]).read_text()
    )
    content = " \n" + json.dumps(rows, **{"ensure_ascii": False, **layout}) + "\n "
    (tmp_path / "t.json").write_text(content, encoding="utf-8")
    found = read_records(tmp_path / "t.json")
    assert len(found) == 6 and [record.text for record in found] == texts
    assert found[-2].text == "𝛼" and found[4].where == f"{tmp_path}/t.json record 4 (4.png)"
    assert [record.id for record in found[1:5:2]] == ["identity_2", "identity_4"]
    assert [record.text for record in found[2:].take([3, 0])] == ["", "a\nb"]
    assert [record.text for record in pickle.loads(pickle.dumps(found))] == texts
    with pytest.raises(IndexError):
        found[6]


@pytest.mark.parametrize("ending", ["", ",", "]]", "] x"])
def test_a_list_that_ends_wrongly(tmp_path, ending):
    content = write_records(tmp_path / "t.json", [("a.png", "x")]).read_text()
    (tmp_path / "t.json").write_text(content[:-1] + ending)
    with pytest.raises(InputError, match="malformed JSON at line 1"):
        read_records(tmp_path / "t.json")


def test_blank_lines_are_not_counted(tmp_path):
    rows = json.loads(write_records(tmp_path / "t.json", [("é.png", "x"), ("b.png", "y")]).read_text())
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "t.jsonl").write_text(f"\n{lines[0]}\r\n  \n{lines[1]}", encoding="utf-8", newline="")
    assert [record.where for record in read_records(tmp_path / "t.jsonl")] == [
        f"{tmp_path}/t.jsonl record 0 (é.png)",
        f"{tmp_path}/t.jsonl record 1 (b.png)",
    ]


def test_a_file_that_is_replaced_does_no_harm_and_one_that_is_overwritten_is_noticed(tmp_path):
    path = write_records(tmp_path / "t.json", [("a.png", "x")])
    found = read_records(path)
    write_records(tmp_path / "new.json", [("b.png", "longer")]).replace(path)
    assert found[0].text == "x"
    found = read_records(path)
    write_records(path, [("c.png", "another")])
    with pytest.raises(InputError, match=r"t\.json: was written to while it is in use; start again"):
        found[0]


def table(folder, **columns):
    from datasets import Dataset

    return Dataset.from_dict({name: list(values) for name, values in columns.items()})


PNG = (SAMPLE / "images/000000.png").read_bytes()


@pytest.mark.parametrize("kind", ["parquet", "saved", "folder"])
def test_tables(tmp_path, monkeypatch, kind):
    """Pictures stay encoded, whether the column says that they are pictures or not; texts stay texts."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    from datasets import Image

    rows = table(tmp_path, image=[{"bytes": PNG, "path": "a.png"}, {"bytes": PNG, "path": None}], text=["x", "nan"])
    rows = rows.cast_column("image", Image())
    if kind == "saved":
        rows.save_to_disk(str(tmp_path / "saved"))
    else:
        (tmp_path / "folder").mkdir()
        rows.to_parquet(str(tmp_path / "folder/train-00000.parquet"))
    path = {"parquet": "folder/train-00000.parquet", "saved": "saved", "folder": "folder"}[kind]
    found = read_records(tmp_path / path)
    assert [record.text for record in found] == ["x", "nan"] and not found.kinds.talk
    assert found[1].media[0].content == PNG and found[1:][0].id == "1"
    assert found[0].where == f"{tmp_path / path} record 0 (inline image)"  # as it was given
    assert [record.text for record in pickle.loads(pickle.dumps(found))] == ["x", "nan"]


def test_a_table_with_an_empty_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    table(tmp_path, image=["a.png", None], text=["x", "y"]).to_parquet(str(tmp_path / "t.parquet"))
    message = r"t\.parquet record 1: needs .* has keys \['image', 'text'\]; empty: 'image', fill it"
    with pytest.raises(InputError, match=message):
        read_records(tmp_path / "t.parquet")


def test_a_table_of_conversations(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    talk = [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}]
    rows = table(tmp_path, messages=[talk], images=[[{"bytes": PNG, "path": None}]])
    rows.to_parquet(str(tmp_path / "t.parquet"))
    (record,) = read_records(tmp_path / "t.parquet")
    assert record.turns[0].parts == (Media("image", PNG), "a") and record.text == "b"
    table(tmp_path, picture=["a"]).to_parquet(str(tmp_path / "bad.parquet"))
    with pytest.raises(InputError, match=r"bad\.parquet record 0: needs .* has keys \['picture'\]"):
        read_records(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/file", "no such file"),
        ("t.csv", "csv2json --csv .*t.csv --train-json train.json"),
        ("broken.parquet", "broken.parquet: not a readable table"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, name, message):
    (tmp_path / "t.csv").write_text("image_path,text\n")
    (tmp_path / "broken.parquet").write_text("x")
    with pytest.raises(InputError, match=message):
        read_records(tmp_path / name)
