"""Every accepted record format becomes one `Record`, here and nowhere else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from latexocr.errors import InputError


@dataclass(frozen=True)
class Record:
    """One formula: where its picture lies and what it says."""

    id: str
    image_path: Path
    text: str
    where: str  # "train.json record 812 (img_0812.png)": how an error names it


def read_records(path: str | Path) -> list[Record]:
    """Read `train.json` / `val.json` in the tutorial's shape (a list), or the same records one a line (.jsonl).

    Relative image paths are taken from the file's own folder, so the folder can be moved.

    Raises:
        InputError: no such file, malformed JSON, no record at all, or one of another shape; its index is named.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; `latexocr csv2json` writes one")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [
                _parse_line(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()
            ]
        else:
            rows = json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: malformed JSON at line {error.lineno}: {error.msg}") from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: needs a list of records, holds {type(rows).__name__}")
    if not rows:
        raise InputError(f"{path}: holds no records; check the input and --val-size of csv2json")
    return [_record(row, index, path) for index, row in enumerate(rows)]


def _parse_line(path: Path, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: malformed JSON at line {number}: {error.msg}") from error


def _record(row: object, index: int, path: Path) -> Record:
    shape = "[user image path, assistant LaTeX] under 'conversations'"
    turns = row.get("conversations") if isinstance(row, dict) else None
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns or []]
    if not isinstance(turns, list) or roles != ["user", "assistant"]:
        found = f"keys {sorted(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{path} record {index}: needs {shape}, has {found} with roles {roles}")
    image, answer = (turn.get("value") for turn in turns)
    if not isinstance(image, str) or not image or not isinstance(answer, str):
        raise InputError(f"{path} record {index}: both values must be text, the first an image path")
    image_path = Path(image) if Path(image).is_absolute() else path.parent / image
    return Record(str(row.get("id", index)), image_path, answer, f"{path.name} record {index} ({image_path.name})")
