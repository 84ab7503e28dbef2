"""Every accepted record format becomes one `Record`, here and nowhere else."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latexocr.errors import InputError

# JSON's own white space
_OPEN, _COMMA, _CLOSE = (re.compile(rf"[ \t\n\r]*{sign}[ \t\n\r]*") for sign in (r"\[", ",", r"\]\s*\Z"))


@dataclass(frozen=True)
class Record:
    """One formula: where its picture lies and what it says."""

    id: str
    image_path: Path
    text: str
    where: str  # "train.json record 812 (img_0812.png)": how an error names it
    source: str | None = None  # where the formula comes from, if the file says so: scores are told apart by it


class Records(Sequence[Record]):
    """The records of a file, read one by one when they are asked for.

    Why: 100,000 `Record`s in a list are 100 MB, and every data-loader worker soon has a copy of its own, because
    looking at a Python object writes to it. Kept here is where each one stands in the file, 24 bytes.

    Args:
        source: a file whose records have been checked.
        spans: (records in the file, 2) first byte of each and the byte behind it.
        rows: (records,) which of them belong to this sequence; all by default.
    """

    def __init__(self, source: _Source, spans: np.ndarray, rows: np.ndarray | None = None) -> None:
        self._source, self._spans = source, spans
        self._rows = np.arange(len(spans)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        row = int(self._rows[index])
        return _record(json.loads(self._source.read(*self._spans[row].tolist())), row, self._source.path)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: np.ndarray) -> Records:
        """The records at these places of the sequence."""
        return Records(self._source, self._spans, self._rows[indices])


class _Source:
    """A file that stays open, so that a new one of the same name does no harm to a run."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, path.open("rb", buffering=0)
        self._version = self._current_version()

    def _current_version(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def read_all(self) -> bytes:
        return self._file.read()

    def read(self, start: int, stop: int) -> bytes:
        """Raises: InputError: the file has been written to."""
        if self._current_version() != self._version:
            raise InputError(f"{self.path}: was written to while it is in use; start again")
        return os.pread(self._file.fileno(), stop - start, start)  # forked workers share the file's position

    def __getstate__(self) -> dict:
        return {"path": self.path, "_version": self._version}

    def __setstate__(self, state: dict) -> None:  # workers that are not forked
        self.__dict__.update(state, _file=state["path"].open("rb", buffering=0))


def read_records(path: str | Path) -> Records:
    """Read `train.json` / `val.json` in the tutorial's shape (a list), or the same records one a line (.jsonl).

    Relative image paths are taken from the file's own folder, so the folder can be moved.

    Raises:
        InputError: no such file, malformed JSON, no record at all, or one of another shape; its index is named.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; `latexocr csv2json` writes one")
    source, parse = _Source(path), _lines if path.suffix == ".jsonl" else _elements
    try:
        spans = np.fromiter(parse(path, source.read_all().decode("utf-8")), np.dtype((np.int64, 2)))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: malformed JSON at line {error.lineno}: {error.msg}") from error
    if not len(spans):
        raise InputError(f"{path}: holds no records; check the input and --val-size of csv2json")
    return Records(source, spans)


def _elements(path: Path, text: str) -> Iterator[tuple[int, int]]:
    """Where the elements of a JSON list stand, in bytes; the shape of each is checked."""
    start = _OPEN.match(text)
    if not start:
        raise InputError(f"{path}: needs a list of records, holds {type(json.loads(text)).__name__}")
    decode, at, byte = json.JSONDecoder().raw_decode, start.end(), start.end()
    if _CLOSE.match(text, at):
        return
    for index in itertools.count():
        row, end = decode(text, at)
        _values(row, index, path)
        length = len(text[at:end].encode())
        yield byte, byte + length
        comma = _COMMA.match(text, end)
        if not comma:
            break
        at, byte = comma.end(), byte + length + len(comma.group())
    if not _CLOSE.match(text, end):
        json.loads(text)  # raises, saying what is wrong and where


def _lines(path: Path, text: str) -> Iterator[tuple[int, int]]:
    """Where the lines with something on them stand, in bytes; the shape of each is checked."""
    byte = index = 0
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        length = len(line.encode())
        if line.strip():
            _values(_parse_line(path, number, line), index, path)
            yield byte, byte + length
            index += 1
        byte += length


def _parse_line(path: Path, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: malformed JSON at line {number}: {error.msg}") from error


def _record(row: object, index: int, path: Path) -> Record:
    name, image, answer = _values(row, index, path)
    image_path = path.parent / image  # an absolute one stays as it is
    source = None if row.get("source") is None else str(row["source"])
    return Record(name, image_path, answer, f"{path.name} record {index} ({image_path.name})", source)


def _values(row: object, index: int, path: Path) -> tuple[str, str, str]:
    """Id, image path and text."""
    shape = "[user image path, assistant LaTeX] under 'conversations'"
    turns = row.get("conversations") if isinstance(row, dict) else None
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns or []]
    if not isinstance(turns, list) or roles != ["user", "assistant"]:
        found = f"keys {sorted(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{path} record {index}: needs {shape}, has {found} with roles {roles}")
    image, answer = (turn.get("value") for turn in turns)
    if not isinstance(image, str) or not image or not isinstance(answer, str):
        raise InputError(f"{path} record {index}: both values must be text, the first an image path")
    return str(row.get("id", index)), image, answer
