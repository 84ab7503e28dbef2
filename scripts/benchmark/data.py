"""Speed of the data stages on one parquet file in the LaTeX_OCR schema; prints JSON.

    python scripts/benchmark/data.py --source train.parquet

Wall-clock seconds of whole commands, start-up included, as a user waits for them; normalisation and preprocessing are
timed inside one process on one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", required=True, help="what data2csv reads")
    parser.add_argument("--output", type=Path, help="file for the JSON, which is printed in any case")
    arguments = parser.parse_args()
    source = arguments.source
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        seconds = {
            "data2csv": _seconds("data2csv", "--source", source, "--output-dir", str(out / "data")),
            "csv2json": _seconds("csv2json", "--csv", str(out / "data/data.csv"), "--train-json",
                                 str(out / "train.json"), "--val-json", str(out / "val.json")),
        }  # fmt: skip
        rows = json.loads((out / "train.json").read_text()) + json.loads((out / "val.json").read_text())
        results = {f"{stage}_rows_per_second": round(len(rows) / taken, 1) for stage, taken in seconds.items()}
        results["normalize_formulas_per_second"] = _normalisation([row["conversations"][1]["value"] for row in rows])
        common.script("build", "--output", str(out / "model"), "--corpus", str(out / "data/data.csv"))
        results["preprocess_samples_per_second"] = _preprocessing(out)
    common.report(arguments, results, rows=len(rows))


def _seconds(verb: str, *arguments: str) -> float:
    started = time.perf_counter()
    common.script(verb, *arguments)
    return time.perf_counter() - started


def _normalisation(texts: list[str]) -> float:
    from latexocr.metrics import normalize

    started = time.perf_counter()
    for text in texts:
        normalize(text)
    return round(len(texts) / (time.perf_counter() - started), 1)


def _preprocessing(out: Path, num_samples: int = 300) -> float:
    """Picture and text to tensors with a Qwen2-VL processor and the default image policy, one core."""
    import torch

    from latexocr.records import read_records
    from latexocr.train import TrainConfig, load_preprocessor

    torch.set_num_threads(1)
    _, preprocessor = load_preprocessor(TrainConfig(model_name_or_path=str(out / "model"), use_cpu=True))
    records = read_records(out / "train.json")[:num_samples]
    preprocessor(records[0])
    started = time.perf_counter()
    for record in records:
        preprocessor(record)
    return round(len(records) / (time.perf_counter() - started), 1)


if __name__ == "__main__":
    main()
