"""The command line as a user meets it: one line for bad input, status 2, no traceback; the whole way by commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SAMPLE, write_records
from PIL import Image

from latexocr.cli import main


def bad_inputs(tmp_path, tiny) -> dict[str, tuple[list[str], str]]:
    """Name -> (arguments, what the line must say)."""
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "shape.json").write_text('[{"image": "a.png"}]')
    (tmp_path / "columns.csv").write_text("picture,latex\na.png,x\n")
    (tmp_path / "file").touch()
    (tmp_path / "empty.png").touch()
    (tmp_path / "noise.png").write_bytes(b"no picture at all")
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    good = str(SAMPLE / "images/000000.png")
    for name in ("empty", "noise", "dot", "huge", "absent"):
        write_records(tmp_path / f"{name}.json", [(good, "x"), (f"{name}.png", "y")])
    write_records(tmp_path / "good.json", [(good, "x")])
    write_records(tmp_path / "none.json", [])
    train = ["train", "--use_cpu", "--swanlab_mode", "disabled", "--model_name_or_path", str(tiny), "--output_dir",
             str(tmp_path / "out"), "--train_json"]  # fmt: skip
    predict = ["predict", "--model", str(tiny)]
    evaluate = ["evaluate", "--model", str(tiny), "--output-dir", str(tmp_path / "ev"), "--data"]
    return {
        "missing csv": (["csv2json", "--csv", str(tmp_path / "no.csv"), "--train-json", "t", "--val-json", "v"], "no.csv"),
        "csv without the columns": (
            ["csv2json", "--csv", str(tmp_path / "columns.csv"), "--train-json", str(tmp_path / "t.json"), "--val-json",
             str(tmp_path / "v.json")], "image_path",
        ),
        "missing source": (["data2csv", "--source", str(tmp_path / "no.parquet"), "--output-dir", str(tmp_path / "d")], "no.parquet"),
        "folder that cannot be written": (
            ["data2csv", "--source", str(SAMPLE), "--output-dir", str(tmp_path / "file/d")], "file",
        ),
        "missing json": ([*train, str(tmp_path / "no.json")], "no.json: no such file"),
        "malformed json": ([*train, str(tmp_path / "broken.json")], "broken.json: malformed JSON at line 1"),
        "unknown shape": ([*train, str(tmp_path / "shape.json")], "shape.json record 0: needs"),
        "empty training set": ([*train, str(tmp_path / "none.json")], "holds no records"),
        "everything overlong": ([*train, str(tmp_path / "good.json"), "--max_length", "9"], "nothing is left to use"),
        "unknown option": ([*train, str(tmp_path / "good.json"), "--lora_rank", "8"], "did you mean 'lora_r'?"),
        "wrong type": ([*train, str(tmp_path / "good.json"), "--lora_r", "big"], "needs a whole number"),
        "unwritable output": (
            [*train, str(tmp_path / "good.json"), "--output_dir", str(tmp_path / "file/run")], "cannot be written",
        ),
        "missing image": ([*train, str(tmp_path / "absent.json")], "absent.json record 1 (absent.png): no such image"),
        "empty image": ([*train, str(tmp_path / "empty.json")], "record 1 (empty.png): empty file"),
        "corrupt image": ([*train, str(tmp_path / "noise.json")], "record 1 (noise.png): undecodable image"),
        "1x1 image": ([*evaluate, str(tmp_path / "dot.json")], "record 1 (dot.png): absurd size: 1x1"),
        "20,000 x 20,000 image": ([*evaluate, str(tmp_path / "huge.json")], "record 1 (huge.png): absurd size"),
        "no checkpoint": (["predict", "--model", str(tmp_path), good], "no config.json"),
        "no hub id": (["predict", "--model", "nowhere", good], "no such folder, and not a hub id"),
        "no adapter": ([*predict, "--adapter", str(tmp_path), good], "so not an adapter folder"),
        "missing picture": ([*predict, str(tmp_path / "no.png")], "no.png: no such image file"),
        "unreadable picture": ([*predict, str(tmp_path / "noise.png")], "WEBP, BMP, GIF, TIFF, PPM, JPEG2000; give another image"),
        "folder of pictures": ([*predict, str(tmp_path)], f"a folder; name the images in it: {tmp_path}/*.png"),
        "stream and json": ([*predict, good, "--stream", "--json"], "exclude each other"),
        "no adapter to merge": (["merge", "--adapter", str(tmp_path), "--output", str(tmp_path / "m")], "adapter_config.json"),
        "no predictions": (["score", "--predictions", str(tmp_path / "no.jsonl")], "no such predictions file"),
        "preview of nothing": (["preview", "--data", str(tmp_path / "none.json"), "--model", str(tiny)], "holds no records"),
        "unknown architecture": (
            ["build", "--output", str(tmp_path / "m"), "--corpus", str(SAMPLE / "metadata.jsonl"), "--model-type", "gpt"],
            "no shape for gpt",
        ),
        "unknown verb": (["trian"], "did you mean 'train'?"),
    }  # fmt: skip


def test_bad_input_is_one_line_and_nothing_half_written(tmp_path, tiny, capsys):
    cases = bad_inputs(tmp_path, tiny)
    assert len(cases) == 29
    before = sorted(tmp_path.rglob("*"))
    for name, (arguments, message) in cases.items():
        capsys.readouterr()
        status = main(arguments)
        lines = [line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line]
        assert status == 2, (name, lines)
        assert message in lines[-1] and not any("Traceback" in line for line in lines), (name, lines)
        assert len(lines) == 1, (name, lines)
        left = [path for path in tmp_path.rglob("*") if path not in before and path.is_file()]
        assert not left, (name, left)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="no such predictions file"):
        main(["score", "--predictions", str(tmp_path / "no.jsonl"), "--debug"])


def test_corrupt_pixels_are_found_in_training_and_named(tmp_path, tiny, capsys):
    """The header is fine, the pixels are not: a data-loader worker finds it, the line still names the record."""
    data = (SAMPLE / "images/000000.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    path = write_records(tmp_path / "cut.json", [(str(SAMPLE / "images/000001.png"), "x"), ("cut.png", "x")])
    arguments = ["train", "--use_cpu", "--swanlab_mode", "disabled", "--model_name_or_path", str(tiny), "--output_dir",
                 str(tmp_path / "out"), "--train_json", str(path), "--disable_tqdm"]  # fmt: skip
    for workers in ("0", "1"):
        assert main([*arguments, "--dataloader_num_workers", workers, "--overwrite_output_dir"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "latexocr train:" in line]
        assert line.startswith(f"latexocr train: {tmp_path}/cut.json record 1 (cut.png): undecodable image"), line


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for verb in ("data2csv", "csv2json", "preview", "plan", "train", "evaluate", "score", "predict", "merge", "build"):
        assert f"  {verb} " in printed and (ROOT / f"scripts/{verb}.py").is_file()


@pytest.mark.slow
def test_the_whole_way_by_scripts(tmp_path):
    """scripts/VERB.py from another folder, one process a stage: data to a merged checkpoint that reads the same."""

    def run(verb: str, *arguments: str) -> str:
        command = [sys.executable, str(ROOT / f"scripts/{verb}.py"), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run("data2csv", "--source", str(SAMPLE), "--output-dir", "data", "--max-samples", "60")
    run(
        "csv2json",
        "--csv",
        "data/data.csv",
        "--train-json",
        "train.json",
        "--val-json",
        "val.json",
        "--val-size",
        "0.1",
    )
    run("build", "--output", "model", "--corpus", "data/data.csv")
    run("train", "--model_name_or_path", "model", "--train_json", "train.json", "--val_json", "val.json", "--output_dir",
        "run", "--max_steps", "4", "--learning_rate", "1e-2", "--use_cpu", "--max_new_tokens", "16", "--swanlab_mode",
        "disabled")  # fmt: skip
    run("evaluate", "--model", "run/adapter", "--data", "val.json", "--output-dir", "ev", "--max-new-tokens", "16")
    run("merge", "--adapter", "run/adapter", "--output", "merged")
    run("evaluate", "--model", "merged", "--data", "val.json", "--output-dir", "ev2", "--max-new-tokens", "16")
    scores = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("ev", "ev2")]
    errors = [score.pop("calibration_error") for score in scores]  # merged weights are rounded anew
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)
    assert scores[0] == scores[1] and scores[0]["num_rows"] == 6
    rows = [(tmp_path / name / "predictions.jsonl").read_text().splitlines() for name in ("ev", "ev2")]
    assert [json.loads(row)["prediction"] for row in rows[0]] == [json.loads(row)["prediction"] for row in rows[1]]
