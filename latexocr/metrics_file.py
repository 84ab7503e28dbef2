"""`metrics.jsonl`: one line for every log of a training, the source of truth.

Why: a curve that is lost is worse than no curve. A line is whole or not there, also after `kill -9`, and a resumed
run goes on where its checkpoint was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import numbers
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from latexocr.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsFile(TrainerCallback):
    """Writes every log of the Trainer as one JSON object a line to `metrics.jsonl` in the output folder.

    Each line has `step`, `epoch`, `time` (unix seconds) and all numeric values under the Trainer's own names
    (`loss`, `eval_loss`, ...); values that JSON lacks are the strings `NaN`, `Infinity`, `-Infinity`. A line
    is on the disk before the call returns, so the file is complete after `kill -9`. Training that resumes
    from step S drops the lines after S, and the speed summary of the interrupted part, so that the file ends
    up as if never interrupted; training that starts at step 0 starts the file anew. A disk that is full costs
    one warning: lines wait in memory and are written when there is room. Only the main process writes.
    """

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._repaired = False
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        try:
            _keep_until(Path(args.output_dir) / METRICS_FILE, state.global_step)
        except OSError as error:
            self._warn(error)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        row = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 3)}
        row |= {name: plain_number(value) for name, value in (logs or {}).items() if is_number(value)}
        self._waiting.append(json.dumps(row, allow_nan=False) + "\n")
        try:
            self._write(Path(args.output_dir) / METRICS_FILE)
        except OSError as error:
            self._warn(error)

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._repaired:
            _repair(path)
            self._repaired = True
        while self._waiting:
            with path.open("ab") as file:
                size = file.tell()
                try:
                    file.write(self._waiting[0].encode())
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    self._repaired = False  # if the half line cannot be cut off now, then next time
                    with contextlib.suppress(OSError):
                        os.truncate(path, size)
                    raise
            self._waiting.pop(0)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            logger.warning("%s cannot be written (%s); training goes on", METRICS_FILE, error)
        self._warned = True


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, oldest first; a torn last line (of a run being written) is left out.

    Args:
        path: the file, or the folder that holds it.

    Raises:
        InputError: a line that is not a JSON object.
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = parse_line(line)
        if row is not None:
            rows.append({name: _NON_FINITE.get(str(value), value) for name, value in row.items()})
        elif line and number < len(lines):
            raise InputError(f"{path} line {number}: not a JSON object; remove the line")
    return rows


def is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def plain_number(value: Any) -> int | float | str:
    """int or float whatever numpy type it was; a name for what JSON cannot hold."""
    if isinstance(value, numbers.Integral):
        return int(value)
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _repair(path: Path) -> None:
    """Cut a torn last line off, or give a whole one its line end."""
    if not path.exists():
        return
    content = path.read_bytes()
    body, _, last = content.rpartition(b"\n")
    if not last:
        return
    with path.open("r+b") as file:
        if parse_line(last) is None:
            file.truncate(len(body) + 1 if body else 0)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step` (all of them for step 0, a fresh start) and earlier speed summaries."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    rows = [(line, parse_line(line)) for line in lines]
    kept = [
        line
        for line, row in rows
        if row is not None and step > 0 and row.get("step", 0) <= step and "train_runtime" not in row
    ]
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(b"".join(line + b"\n" for line in kept))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
