"""Records as they come: every row once a pass, on every rank and worker, and a resumed run goes on where it stood."""

from __future__ import annotations

import json
from itertools import islice

import pytest
from conftest import SAMPLE
from torch.utils.data import DataLoader

from latexocr.errors import InputError
from latexocr.formats import LOCAL
from latexocr.metrics_file import read_metrics
from latexocr.streaming import Stream, first_records
from latexocr.train import load_preprocessor, train


def write(folder, number: int):
    """Records `0 + x`, `1 + x`, ... of one picture."""
    path = folder / "t.jsonl"
    picture = (SAMPLE / "images/000000.png").read_bytes()
    (folder / "a.png").write_bytes(picture)
    path.write_text("".join(json.dumps({"image": "a.png", "text": f"{n} + x"}) + "\n" for n in range(number)))
    return path


def stream(path, preprocessor, *, rank: int = 0, world_size: int = 1, first_batch: int = 0, **options) -> Stream:
    """Batches are the texts of their answers."""

    def texts(samples: list[dict]) -> list[str]:
        tokenizer = preprocessor.processor.tokenizer
        answers = [sample["input_ids"][sample["labels"] != -100] for sample in samples]
        return [tokenizer.decode(answer, skip_special_tokens=True).removesuffix(" + x") for answer in answers]

    given = {"access": LOCAL, "hub": "modelscope", "max_length": 2048, "overlong": "drop", "batch_size": 2, "seed": 0}
    found = Stream(str(path), preprocessor, texts, rank=rank, world_size=world_size, **{**given, **options})
    found.first_batch = first_batch
    return found


@pytest.fixture
def preprocessor(config):
    return load_preprocessor(config(max_visual_tokens=64))[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_is_a_permutation_and_can_be_entered_anywhere(tmp_path, preprocessor, workers):
    path = write(tmp_path, 16)
    ranks = [
        list(islice(DataLoader(stream(path, preprocessor, rank=rank, world_size=2), batch_size=None,
                               num_workers=workers), 6))
        for rank in (0, 1)
    ]  # fmt: skip
    first_pass = [text for rank in ranks for batch in rank[:4] for text in batch]
    assert sorted(first_pass, key=int) == [str(n) for n in range(16)] and first_pass != sorted(first_pass, key=int)
    resumed = stream(path, preprocessor, rank=1, world_size=2, first_batch=3)
    assert list(islice(DataLoader(resumed, batch_size=None, num_workers=workers), 3)) == ranks[1][3:]


def test_overlong_records_are_left_out_and_counted(tmp_path, preprocessor):
    path = write(tmp_path, 4)
    with path.open("a") as file:
        file.write(json.dumps({"image": "a.png", "text": "x + " * 50}) + "\n")
    dropping = stream(path, preprocessor, max_length=120, batch_size=5)
    assert sorted(next(iter(dropping))) == ["0", "1", "2", "3"] and dropping.num_dropped == 1
    with pytest.raises(InputError, match=r"t\.jsonl record 4 \(a\.png\) has \d+ tokens, more than max_length 120"):
        next(iter(stream(path, preprocessor, max_length=120, batch_size=5, overlong="error")))


def test_tables(tmp_path, preprocessor):
    from datasets import Dataset

    picture = {"bytes": (SAMPLE / "images/000000.png").read_bytes(), "path": None}
    rows = Dataset.from_dict({"image": [picture] * 4, "text": ["0", "1", "2", "3"]})
    for shard in range(2):
        rows.shard(2, shard).to_parquet(str(tmp_path / f"{shard}.parquet"))
    batches = list(islice(stream(tmp_path / "*.parquet", preprocessor), 2))
    assert sorted(batches[0] + batches[1]) == ["0", "1", "2", "3"]


def test_bad_streams(tmp_path, config):
    (tmp_path / "t.json").write_text("[]")
    (tmp_path / "t.jsonl").write_text("{]\n")
    for path, message in {
        "t.json": "reads .jsonl .one record a line. and .parquet files",
        "t.jsonl": "record 0: malformed JSON",
        "gone.parquet": "no such file",
    }.items():
        with pytest.raises(InputError, match=message):
            first_records(str(tmp_path / path))
    with pytest.raises(InputError, match="set max_steps"):
        config(streaming=True, max_steps=-1)
    with pytest.raises(InputError, match="augment needs records that can be read again"):
        config(streaming=True, augment="paper")


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, config):
    path = write(tmp_path, 12)
    options = {"train_json": str(path), "streaming": True, "save_strategy": "steps", "save_steps": 1,
               "gradient_accumulation_steps": 1, "max_visual_tokens": 64, "max_steps": 3}  # fmt: skip
    for name in ("whole", "parts"):
        result = train(config(**{**options, "max_steps": 3 if name == "whole" else 2, "lr_scheduler_type": "constant"},
                              output_dir=str(tmp_path / name)))  # fmt: skip
        assert result.num_dropped == 0
    train(config(**options, lr_scheduler_type="constant", output_dir=str(tmp_path / "parts"),
                 resume_from_checkpoint="true"))  # fmt: skip
    whole, parts = (
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("whole", "parts")
    )
    assert len(whole) == 3 and parts == whole
