"""Data files: the records of a JSON file or a table, read one by one when they are asked for.

What a row may look like is `latexocr.formats`'s business.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from latexocr.errors import InputError
from latexocr.formats import LOCAL, Access, Record, is_tutorial, parse
from latexocr.sources import parquet_files

# JSON's own white space
_OPEN, _COMMA, _CLOSE = (re.compile(rf"[ \t\n\r]*{sign}[ \t\n\r]*") for sign in (r"\[", ",", r"\]\s*\Z"))


class Kinds(NamedTuple):
    """What at least one record of a file is; the common file has none of it.

    Args:
        talk: more than one picture and its answer: texts or turns of its own, several pictures or none.
        video: shows a video.
    """

    talk: bool = False
    video: bool = False


class Records(Sequence[Record]):
    """The records of a file, read one by one when they are asked for.

    Why: 100,000 `Record`s in a list are 100 MB, and every data-loader worker soon has a copy of its own, because
    looking at a Python object writes to it. Kept here is where each one stands in the file.

    Args:
        source: a file whose records have been checked: `source[row]` is one.
        kinds: of all its records.
        rows: (records,) which of them belong to this sequence; all by default.
    """

    def __init__(self, source: Sequence[Record], kinds: Kinds, rows: np.ndarray | None = None) -> None:
        self._source, self.kinds = source, kinds
        self._rows = np.arange(len(source)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self._source[int(self._rows[index])]

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: np.ndarray) -> Records:
        """The records at these places of the sequence."""
        return Records(self._source, self.kinds, self._rows[indices])


class _JsonFile:
    """A file that stays open, so that a new one of the same name does no harm to a run.

    `spans` (records, 2): first byte of each record and the byte behind it.
    """

    def __init__(self, path: Path, access: Access) -> None:
        self.path, self.access, self._file = path, access, path.open("rb", buffering=0)
        self._version = self._current_version()
        self.kinds = Kinds()
        split = _lines if path.suffix == ".jsonl" else _elements
        found = split(path, self._file.read().decode("utf-8"))
        spans = ((start, end) for index, (row, start, end) in enumerate(found) if self._check(row, index))
        self.spans = np.fromiter(spans, np.dtype((np.int64, 2)))

    def _check(self, row: object, index: int) -> bool:
        if not is_tutorial(row):
            self.kinds = _seen(self.kinds, parse(row, index, self.path, self.access))
        return True

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, row: int) -> Record:
        start, stop = self.spans[row].tolist()
        return parse(json.loads(self._read(start, stop)), row, self.path, self.access)

    def _current_version(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _read(self, start: int, stop: int) -> bytes:
        """Raises: InputError: the file has been written to."""
        if self._current_version() != self._version:
            raise InputError(f"{self.path}: was written to while it is in use; start again")
        return os.pread(self._file.fileno(), stop - start, start)  # forked workers share the file's position

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def __setstate__(self, state: dict) -> None:  # workers that are not forked
        self.__dict__.update(state, _file=state["path"].open("rb", buffering=0))


class _Table:
    """A table of `datasets`, which reads its rows from Arrow files on disk; pictures stay encoded."""

    def __init__(self, table: Any, path: Path, access: Access, name: str) -> None:
        self.path, self.access, self.name, self._table = path, access, name, _undecoded(table)
        self.kinds = Kinds()
        for index in range(len(self)):
            self.kinds = _seen(self.kinds, self[index])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> Record:
        return parse(self._table[row], row, self.path, self.access, self.name)


def _seen(kinds: Kinds, record: Record) -> Kinds:
    if record.plain:
        return kinds
    return Kinds(talk=True, video=kinds.video or any(one.kind == "video" for one in record.media))


def _undecoded(table: Any) -> Any:
    """Pictures as bytes and path, alone or in lists: they are decoded where it can be said which row is broken."""
    from datasets import Image, List

    for name, feature in (table.features or {}).items():
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            table = table.cast_column(name, List(Image(decode=False)))
    return table


def read_records(
    path: str | Path, *, access: Access = LOCAL, hub: Literal["modelscope", "huggingface"] = "modelscope"
) -> Records:
    """The records of a data file; each is checked, none is kept in memory.

    Args:
        path: a list of records (.json), one a line (.jsonl), a table (.parquet, or a pattern of them), a folder that
            `datasets` has saved, or a data set on a hub: owner/name, owner/name:subset or owner/name:subset:split.
            Relative paths in it are taken from its own folder, so that the folder can be moved.
        access: what records may name besides files in that folder.
        hub: where an owner/name is looked up.

    Raises:
        InputError: no such file, malformed, no record at all, or one that cannot be used; its index is named.
    """
    path = Path(path)
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise InputError(f"{path}: no such file; `latexocr csv2json` writes one")
        try:
            source: _JsonFile | _Table = _JsonFile(path, access)
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: malformed JSON at line {error.lineno}: {error.msg}") from error
    else:
        source = _Table(*open_table(str(path), hub), access, str(path))
    if not len(source):
        raise InputError(f"{path}: holds no records; give a file that has some")
    return Records(source, source.kinds)


def open_table(name: str, hub: Literal["modelscope", "huggingface"]) -> tuple[Any, Path]:
    """A table of `datasets`, and the file from whose folder its relative paths go.

    Raises:
        InputError: no such file, folder or data set, or not a table.
    """
    from datasets import disable_progress_bars, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    disable_progress_bars()
    if Path(name, "state.json").is_file():
        return load_from_disk(name), Path(name, "state.json")
    if Path(name, "dataset_dict.json").is_file():
        raise InputError(f"{name}: holds several splits; name the folder of one, such as {name}/train")
    local = Path(name).exists() or glob.has_magic(name)
    source, subset, split = (name, None, "train") if local else hub_name(name)
    if local and Path(name).suffix in (".csv", ".tsv"):
        raise InputError(f"{name}: `latexocr csv2json --csv {name} --train-json train.json` makes records of it")
    files = parquet_files(source, hub=hub, subset=subset, split=split)
    try:
        table = load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise InputError(f"{name}: not a readable table ({' '.join(str(error).split())[:200]})") from error
    return table, files[0]


def hub_name(name: str) -> tuple[str, str | None, str]:
    """Owner/name, subset and split.

    >>> hub_name("linxy/LaTeX_OCR:small:test")
    ('linxy/LaTeX_OCR', 'small', 'test')
    """
    source, _, rest = name.partition(":")
    subset, _, split = rest.partition(":")
    return source, subset or None, split or "train"


def _elements(path: Path, text: str) -> Iterator[tuple[object, int, int]]:
    """The elements of a JSON list and where they stand, in bytes."""
    start = _OPEN.match(text)
    if not start:
        raise InputError(f"{path}: needs a list of records, holds {type(json.loads(text)).__name__}")
    decode, at, byte = json.JSONDecoder().raw_decode, start.end(), start.end()
    if _CLOSE.match(text, at):
        return
    while True:
        row, end = decode(text, at)
        length = len(text[at:end].encode())
        yield row, byte, byte + length
        comma = _COMMA.match(text, end)
        if not comma:
            break
        at, byte = comma.end(), byte + length + len(comma.group())
    if not _CLOSE.match(text, end):
        json.loads(text)  # raises, saying what is wrong and where


def _lines(path: Path, text: str) -> Iterator[tuple[object, int, int]]:
    """The lines with something on them and where they stand, in bytes."""
    byte = 0
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        length = len(line.encode())
        if line.strip():
            yield _parse_line(path, number, line), byte, byte + length
        byte += length


def _parse_line(path: Path, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: malformed JSON at line {number}: {error.msg}") from error
