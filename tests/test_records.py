"""Reading train.json: the tutorial's shape, and what other shapes are answered with."""

from __future__ import annotations

import json

import pytest
from conftest import write_records

from latexocr.errors import InputError
from latexocr.records import read_records


def test_relative_and_absolute_paths(tmp_path):
    path = write_records(tmp_path / "train.json", [("images/a.png", r"\frac{公}{2}"), ("/abs/b.png", "null")])
    first, second = read_records(path)
    assert (first.id, first.image_path, first.text) == ("identity_1", tmp_path / "images/a.png", r"\frac{公}{2}")
    assert first.where == "train.json record 0 (a.png)"
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
        ('[{"image": "a.png", "text": "x"}]', r"record 0: needs .* has keys \['image', 'text'\]"),
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
