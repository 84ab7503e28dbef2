"""Stage 5: model and data -> predictions.jsonl and metrics.json; and metrics from a predictions file alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latexocr.errors import InputError
from latexocr.metrics import score


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics by name, and the folder that holds `metrics.json` (None when nothing was written)."""

    metrics: dict[str, float]
    output_dir: Path | None

    def __str__(self) -> str:
        rows = [
            f"{name:<24}{value:.4f}" if value % 1 else f"{name:<24}{value:g}" for name, value in self.metrics.items()
        ]
        return "\n".join([*rows, *([f"written to {self.output_dir}"] if self.output_dir else [])])


def evaluate(
    model: str,
    data: Path,
    output_dir: Path,
    *,
    adapter: Path | None = None,
    batch_size: int = 128,
    max_new_tokens: int = 512,
    max_samples: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    prompt: str | None = None,
    device: str | None = None,
    hub: Literal["modelscope", "huggingface"] = "modelscope",
    trust_remote_code: bool = False,
) -> EvaluationResult:
    """Read every image of a data file and score the answers.

    Args:
        model: base or merged model, or an adapter folder: a path or a hub id.
        data: val.json, as csv2json writes it.
        output_dir: folder for predictions.jsonl and metrics.json.
        adapter: adapter folder to put on the model.
        batch_size: images at once; fewer where memory is short, and 16 at most when sampling.
        max_new_tokens: longest answer in tokens.
        max_samples: only the first so many records.
        temperature: greedy decoding when left out, else sampling at this temperature.
        top_p: sampling from the smallest set of tokens with this probability.
        min_p: sampling from tokens with at least this share of the best one's probability.
        prompt: another instruction than the checkpoint was trained with.
        device: cpu, cuda, ... (default: a GPU when there is one).
        hub: where a hub id is downloaded from.
        trust_remote_code: run Python code that comes with a checkpoint.

    Raises:
        InputError: data, model or adapter that cannot be used, or a folder that cannot be written.
    """
    from latexocr.images import load_image
    from latexocr.predict import LatexOCR
    from latexocr.records import read_records

    if max_samples is not None and max_samples < 1:
        raise InputError(f"max_samples is {max_samples}, needs at least 1")
    records = read_records(data)[:max_samples]
    for record in records:  # a broken image is found before an hour of generation, not after
        load_image(record.image_path, record.where)
    _make_folder(output_dir)
    ocr = LatexOCR.from_pretrained(
        model, adapter=adapter, device=device, prompt=prompt, hub=hub, trust_remote_code=trust_remote_code
    )
    answers = ocr.generate(
        [record.image_path for record in records], batch_size=batch_size, max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, min_p=min_p, progress=True,
    )  # fmt: skip
    rows = [
        {
            "id": record.id,
            "image_path": str(record.image_path),
            "reference": record.text,
            "prediction": answer.text,
            "num_tokens": answer.num_tokens,
            "finished": answer.finished,
        }
        for record, answer in zip(records, answers, strict=True)
    ]
    write_predictions(output_dir / "predictions.jsonl", rows)
    return _scored(rows, output_dir)


def score_file(predictions: Path, *, output_dir: Path | None = None) -> EvaluationResult:
    """Metrics from a predictions file, without a model.

    Args:
        predictions: predictions.jsonl with `id`, `reference` and `prediction` on every line.
        output_dir: folder for metrics.json; nothing is written when left out.

    Raises:
        InputError: no such file, a malformed line, a line without the keys, or no line at all.
    """
    rows = read_predictions(predictions)
    if output_dir is not None:
        _make_folder(output_dir)
    return _scored(rows, output_dir)


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The rows of a predictions file.

    Raises:
        InputError: see `score_file`.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such predictions file; `latexocr evaluate` writes one")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {number}: malformed JSON ({error.msg})") from error
        wrong = [
            key
            for key in ("reference", "prediction")
            if not isinstance(row, dict) or not isinstance(row.get(key), str)
        ]
        if wrong:
            raise InputError(f"{path} line {number}: needs an object with text under {' and '.join(map(repr, wrong))}")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: holds no predictions")
    return rows


def write_predictions(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, whole or not at all."""
    from latexocr.contract import write_text

    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _scored(rows: list[dict[str, Any]], output_dir: Path | None) -> EvaluationResult:
    metrics = score([row["prediction"] for row in rows], [row["reference"] for row in rows])
    finished = [row["finished"] for row in rows if "finished" in row]
    if finished:
        metrics["runaway_rate"] = 1 - sum(finished) / len(finished)
    if output_dir is not None:
        from latexocr.contract import write_text

        write_text(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return EvaluationResult(metrics, output_dir)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --output-dir") from error
