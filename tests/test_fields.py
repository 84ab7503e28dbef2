"""JSON answers, field by field: the vehicle-plate example."""

from __future__ import annotations

import json

import pytest

from latexocr.errors import InputError
from latexocr.evaluate import score_file
from latexocr.metrics.fields import parse_fields, score_fields

REFERENCE = '{"Vehicle Sr No": "MA3", "Engine No": "K12", "Model": "VX"}'


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('{"a": 1}', {"a": 1}),
        ('Here it is:\n```json\n{"a": " x "}\n```', {"a": "x"}),
        ('{"a": {"b": [1, "c"]}, "d": []}', {"a.b.0": 1, "a.b.1": "c", "d": []}),
        ('{"a": 1', None),
        ("[1]", None),
        ("x_{1}", None),
        (None, None),
    ],
)
def test_parse(text, fields):
    assert parse_fields(text) == fields


def test_scores_of_three_answers():
    answers = [REFERENCE, '{"Model": "VX", "Engine No": "K1Z", "Vehicle Sr No": "MA3"}', "no idea"]
    figures, rows = score_fields(answers, [REFERENCE] * 3)
    assert figures == {
        "exact_match": 1 / 3, "field_match": 5 / 9, "field_match.Vehicle Sr No": 2 / 3, "field_match.Engine No": 1 / 3,
        "field_match.Model": 2 / 3, "json_rate": 2 / 3, "num_rows": 3.0, "invalid_json": 1.0,
    }  # fmt: skip
    assert [row["wrong_fields"] for row in rows][:2] == [[], ["Engine No"]]


@pytest.mark.parametrize(("answer", "right"), [('{"a": 1.0}', 1), ('{"a": true}', 0), ('{"a": 1, "b": 2}', 0)])
def test_equal_values(answer, right):
    assert score_fields([answer], ['{"a": 1}'])[0]["exact_match"] == right


def test_a_predictions_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "1", "reference": REFERENCE, "prediction": REFERENCE}) + "\n")
    found = score_file(path, output_dir=tmp_path / "out", answer_format="json")
    assert found.metrics["field_match"] == json.loads((tmp_path / "out/metrics.json").read_text())["field_match"] == 1
    assert "field,Engine No,field_match,1.0" in (tmp_path / "out/slices.csv").read_text()
    path.write_text(json.dumps({"id": "1", "reference": "x", "prediction": REFERENCE}) + "\n")
    with pytest.raises(InputError, match="reference 0: 'x' is no JSON object; mend it, or set --answer_format latex"):
        score_file(path, answer_format="json")
