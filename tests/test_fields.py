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
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.html").write_text("of LaTeX")
    found = score_file(path, output_dir=tmp_path / "out", answer_format="json")
    assert found.metrics["field_match"] == json.loads((tmp_path / "out/metrics.json").read_text())["field_match"] == 1
    assert "field,Engine No,1,field_match,1.0,1.0,1.0" in (tmp_path / "out/slices.csv").read_text()
    assert not (tmp_path / "out/report.html").exists()
    path.write_text(json.dumps({"id": "1", "reference": "x", "prediction": REFERENCE}) + "\n")
    with pytest.raises(InputError, match="reference 0: 'x' is no JSON object; mend it, or set --answer_format latex"):
        score_file(path, answer_format="json")


def written(path, answers):
    rows = ({"id": str(number), "reference": ref, "prediction": said} for number, (said, ref) in enumerate(answers))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_figures_have_intervals_and_rows_an_order(tmp_path):
    """Four rows, one wrong: of the means of four drawn ones 0.4% are 0, 5% are 0.25 at most, 32% are 1."""
    right, wrong = ('{"a": 1, "a_low": 2}', '{"a": 1, "a_low": 2}'), ('{"a": 1}', '{"a": 1, "a_low": 2}')
    found = score_file(written(tmp_path / "p.jsonl", [right, wrong, right, right]), answer_format="json")
    assert [found.metrics[f"exact_match{end}"] for end in ("_low", "", "_high")] == [0.25, 0.75, 1]
    assert [found.metrics[f"field_match{end}"] for end in ("_low", "", "_high")] == [5 / 8, 7 / 8, 1]
    (a, a_low) = found.slices
    assert (a["slice"], a["value"], a["low"], a["num_rows"]) == ("a", 1, 1, 4)
    assert (a_low["slice"], a_low["value"], a_low["low"], a_low["high"]) == ("a_low", 0.75, 0.25, 1)
    assert "field_match.a_low         0.7500  [0.2500, 1]" in str(found).splitlines()
    assert found.worst_first() == [1, 0, 2, 3]


def test_two_models_are_compared(tmp_path):
    one = written(tmp_path / "one.jsonl", [('{"a": 1}', '{"a": 1}'), ('{"a": 2}', '{"a": 2}')])
    other = written(tmp_path / "other.jsonl", [("none", '{"a": 1}'), ('{"a": 2}', '{"a": 2}')])
    score_file(one, baseline=other, output_dir=tmp_path, answer_format="json")
    compared = {row["metric"]: row for row in json.loads((tmp_path / "comparison.json").read_text())}
    assert list(compared) == ["exact_match", "field_match", "field_match.a", "json_rate"]
    assert (
        compared["field_match"]["difference"],
        compared["field_match"]["won"],
        compared["field_match"]["lost"],
    ) == (0.5, 1, 0)
