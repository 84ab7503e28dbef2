"""`score_file` and what it writes: figures, rows, slices, comparison, and what is decided about odd files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import requires_tex

from latexocr.cli import main
from latexocr.errors import InputError
from latexocr.evaluate import score_file
from latexocr.evaluation import Evaluation

# id, reference, prediction
ROWS = [
    ("right", "x_i^2", "x^2_i"),
    ("wrong", r"\frac{a}{b}", r"\frac{a}{c}"),
    ("malformed", r"\sqrt{a}", r"\sqrt{a"),
    ("spaced", "a b", r"a \; b"),
]


def write(path: Path, rows: list[tuple[str, str, str | None]], **more) -> Path:
    lines = [json.dumps({"id": id_, "reference": right, "prediction": ours, **more}) for id_, right, ours in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_text_figures_rows_and_slices(tmp_path):
    found = score_file(write(tmp_path / "p.jsonl", ROWS, source="book"), pictures=False)
    metrics = found.metrics
    assert (metrics["exact_match"], metrics["exact_match_level2"]) == (0.25, 0.5)
    assert 0 <= metrics["exact_match_low"] < 0.25 < metrics["exact_match_high"] <= 0.75
    assert (metrics["num_rows"], metrics["unparsed_predictions"], metrics["unparsed_references"]) == (4, 1, 0)
    assert found.engine is found.comparison is found.output_dir is None
    assert "glyph_f1" not in metrics and "glyph_f1" not in found.rows[0]
    assert found.rows[1] == {
        "id": "wrong", "reference": r"\frac{a}{b}", "prediction": r"\frac{a}{c}", "source": "book",
        "exact_match": 0, "edit_distance": pytest.approx(1 / 7), "token_errors": 1, "runaway": 0,
        "bleu_sentence": pytest.approx(100 * (6 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25),
        "length": 7, "structure": ["fraction"], "script_depth": 0,
    }  # fmt: skip
    slices = {(row["by"], row["slice"]): row for row in found.slices if row["metric"] == "exact_match"}
    assert list(slices) == [
        ("length", "0-10"), ("structure", "fraction"), ("structure", "root"), ("structure", "none of these"),
        ("script_depth", "0"), ("script_depth", "1"), ("source", "book"),
    ]  # fmt: skip
    assert slices["structure", "none of these"] | {"low": 0, "high": 1} == {
        "by": "structure", "slice": "none of these", "num_rows": 2, "metric": "exact_match", "value": 0.5, "low": 0,
        "high": 1,
    }  # fmt: skip
    assert slices["source", "book"]["value"] == 0.25
    assert [found.rows[number]["id"] for number in found.worst_first()] == ["spaced", "malformed", "wrong", "right"]


@requires_tex
def test_picture_figures(tmp_path):
    found = score_file(write(tmp_path / "p.jsonl", [*ROWS, ("broken reference", "x^", "x")]))
    metrics = found.metrics
    assert found.engine == "latex"
    assert metrics["render_rate"] == 0.8  # all but \sqrt{a
    # of the four rows whose reference renders: one prints the same, one more up to space
    assert (metrics["picture_match"], metrics["picture_match_spacing"]) == (0.25, 0.5)
    assert metrics["unrendered_references"] == 1
    values = [[row[key] for row in found.rows] for key in ("renders", "picture_match", "glyph_f1")]
    assert values[:2] == [[1, 1, 0, 1, 1], [1, 0, 0, 0, None]]
    right, wrong, malformed, spaced, broken = values[2]
    assert (right, malformed, spaced, broken) == (1, 0, 1, None) and 0 < wrong < 1
    assert metrics["glyph_f1"] == pytest.approx((1 + wrong + 0 + 1) / 4)


def test_figures_say_which_program_drew(tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", ROWS)
    assert "mathtext" not in str(score_file(path, pictures=False))
    monkeypatch.setattr("latexocr.render.engine_available", lambda: "mathtext")
    assert "pictures are matplotlib's mathtext" in str(score_file(path))


def test_files(tmp_path):
    found = score_file(write(tmp_path / "p.jsonl", ROWS), output_dir=tmp_path / "out", pictures=False)
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == found.metrics
    with (tmp_path / "out/slices.csv").open(newline="", encoding="utf-8") as file:
        slices = list(csv.DictReader(file))
    assert len(slices) == len(found.slices) and float(slices[0]["value"]) == found.slices[0]["value"]
    with (tmp_path / "out/rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["prediction"] for row in rows] == [ours for _, _, ours in ROWS] and rows[1]["structure"] == "fraction"
    assert not (tmp_path / "out/comparison.json").exists()


def test_a_baseline_is_compared_row_by_row_whatever_its_order(tmp_path, capsys):
    others = [(id_, right, right if id_ in ("right", "wrong") else "z") for id_, right, _ in reversed(ROWS)]
    ours, theirs = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", others)
    command = ["score", "--predictions", str(ours), "--baseline", str(theirs), "--no-pictures"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines()}
    compared = {row["metric"]: row for row in json.loads((tmp_path / "out/comparison.json").read_text())}
    found = compared["exact_match"]
    assert (found["a"], found["b"], found["difference"], found["won"], found["lost"]) == (0.25, 0.5, -0.25, 0, 1)
    assert -0.75 <= found["low"] < -0.25 < found["high"] == 0
    assert (compared["edit_distance"]["won"], compared["edit_distance"]["lost"]) == (2, 1)
    assert lines["exact_match"].endswith("baseline 0.5000 difference -0.2500 [-0.7500, 0] won 0 lost 1")


def test_another_baseline_is_refused(tmp_path):
    ours = write(tmp_path / "a.jsonl", ROWS)
    for rows, message in (
        (ROWS[:2], r"2 ids of .*a\.jsonl are not in .*b\.jsonl, the first is 'malformed'"),
        ([*ROWS, ("more", "x", "x")], r"1 ids of .*b\.jsonl are not in .*a\.jsonl, the first is 'more'"),
        ([("right", "y", "x"), *ROWS[1:]], "the references of id 'right' differ between"),
    ):
        with pytest.raises(InputError, match=message):
            score_file(ours, baseline=write(tmp_path / "b.jsonl", rows))


def test_a_prediction_that_is_null_is_an_empty_answer_and_counted(tmp_path):
    found = score_file(write(tmp_path / "p.jsonl", [("1", "x", "x"), ("2", "y", None)]), pictures=False)
    assert (found.metrics["missing_predictions"], found.metrics["exact_match"]) == (1, 0.5)
    assert found.rows[1]["prediction"] is None and found.rows[1]["edit_distance"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such predictions file; `latexocr evaluate` writes one"),
        ("", "holds no predictions"),
        ("\n \n", "holds no predictions"),
        ("{", r"p\.jsonl line 1: malformed JSON"),
        ('{"id": 1, "reference": "x"}', "line 1: needs an object with text under 'prediction'"),
        ('{"reference": "x", "prediction": "x"}', "line 1: needs an object with text under 'id'"),
        ('{"id": 1, "reference": null, "prediction": "x"}', "line 1: needs an object with text under 'reference'"),
        ("[]", "needs an object with text under 'id' and 'reference' and 'prediction'"),
        ('{"id": "a", "reference": "x", "prediction": "x"}\n' * 2, "line 2: the id 'a' is that of line 1 too"),
        ('{"id": 1, "reference": "x", "prediction": "x"}\n{"id": "1", "reference": "x", "prediction": "y"}',
         "line 2: the id '1' is that of line 1 too"),
        ('{"id": 1, "reference": "x", "prediction": "x", "source": ["a"]}', r"'source' is \['a'\], needs a name"),
        ('{"id": 1, "reference": "x", "prediction": "x", "image_path": 5}', "'image_path' is 5, needs the path"),
        ('{"id": 1, "reference": "x", "prediction": "x", "num_tokens": "many"}', "'num_tokens' is 'many', needs"),
        ('{"id": 1, "reference": "x", "prediction": "x", "confidence": "sure"}', "'confidence' is 'sure', needs"),
        ('{"id": 1, "reference": "x", "prediction": "x", "confidence": 95}', "'confidence' is 95, needs a"),
    ],
)  # fmt: skip
def test_bad_prediction_files(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        score_file(path)


def test_line_separators_within_a_text_end_no_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": 1, "reference": "x\u2028", "prediction": "x\x85"}\n', encoding="utf-8")
    assert score_file(path, pictures=False).metrics["exact_match"] == 1


def test_half_a_character_is_replaced(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(r'{"id": 1, "reference": "\ud83d\ude00", "prediction": "\ud83d"}' + "\n")
    found = score_file(path, output_dir=tmp_path / "out", pictures=False)
    assert (found.rows[0]["reference"], found.rows[0]["prediction"]) == ("\U0001f600", "\ufffd")


def test_what_a_line_may_say_besides(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(r'{"id": 1, "reference": "x", "prediction": "x", "source": 7, "image_path": "a\u0000b"}' + "\n")
    found = score_file(path, output_dir=tmp_path / "out", pictures=False)
    assert [row["slice"] for row in found.slices if row["by"] == "source"].count("7") > 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=r"p\.jsonl: not UTF-8 text \(invalid start byte at byte 0\)"):
        score_file(tmp_path / "p.jsonl")


def test_confidence_is_held_against_exact_match_at_level_2(tmp_path):
    """Four answers, two right (one but for spacing), all half sure; one row says nothing about itself."""
    path = write(tmp_path / "p.jsonl", ROWS, confidence=0.5)
    with path.open("a") as file:
        file.write('{"id": "silent", "reference": "x", "prediction": "x"}\n')
    found = score_file(path, output_dir=tmp_path / "out", pictures=False)
    assert found.metrics["exact_match_level2"] == 0.6
    assert found.reliability == [
        {"num_rows": 1, "low": 0.5, "high": 0.5, "confidence": 0.5, "right": right} for right in (1.0, 0.0, 0.0, 1.0)
    ]
    assert found.metrics["calibration_error"] == 0.5 and "min_confidence" not in found.metrics
    assert json.loads((tmp_path / "out/metrics.json").read_text())["calibration_error"] == 0.5
    assert "calibration_error" in str(found)
    without = score_file(write(tmp_path / "p.jsonl", ROWS), pictures=False)
    assert "calibration_error" not in without.metrics and without.reliability == []


def test_a_baseline_stands_beside_every_row(tmp_path):
    ours = write(tmp_path / "a.jsonl", [("1", "x y", "x y"), ("2", "x y", "y"), ("3", "x", "z")])
    theirs = write(tmp_path / "b.jsonl", [("3", "x", None), ("2", "x y", "x y"), ("1", "x y", "x")])
    found = score_file(ours, baseline=theirs, output_dir=tmp_path / "out", pictures=False)
    beside = [(row["baseline_prediction"], row["gain"]) for row in found.rows]
    assert beside == [("x", 0.5), ("x y", -0.5), (None, 0.0)]
    (distance,) = [entry for entry in found.comparison if entry["metric"] == "edit_distance"]
    assert (distance["won"], distance["lost"]) == (1, 1)
    with (tmp_path / "out/rows.csv").open() as file:
        assert [row["gain"] for row in csv.DictReader(file)] == ["0.5", "-0.5", "0.0"]


def test_worst_first():
    rows = [
        {"exact_match": 1, "edit_distance": 0.0, "glyph_f1": 1.0},
        {"exact_match": 0, "edit_distance": 0.2, "glyph_f1": 0.5},
        {"exact_match": 0, "edit_distance": 0.9, "glyph_f1": 0.5},
        {"exact_match": 0, "edit_distance": 0.9, "glyph_f1": None},
        {"exact_match": 0, "edit_distance": 0.1, "glyph_f1": 0.0},
    ]
    assert Evaluation(metrics={}, rows=rows, slices=[]).worst_first() == [4, 2, 1, 3, 0]


def test_an_ordinary_score_needs_no_torch(tmp_path):
    write(tmp_path / "p.jsonl", ROWS)
    code = (
        "import sys; from pathlib import Path; from latexocr.evaluate import score_file\n"
        "score_file(Path('p.jsonl'), pictures=False)\n"
        "print([name for name in ('torch', 'transformers', 'pandas', 'swanlab') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
