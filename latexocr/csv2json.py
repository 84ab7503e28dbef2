"""Stage 2: data.csv -> train.json and val.json, a formula never on both sides.

Why: LaTeX_OCR repeats formulas (only 290 distinct texts among 1,200 handwritten ones). A split by rows puts
the same formula into training and validation, and the validation score then measures memory. Here rows with
the same canonical formula travel together.
"""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from latexocr.errors import InputError

SHARED_FROM = 20_000  # texts; starting processes to normalise fewer takes longer than doing it here


class _Row(NamedTuple):
    table: Path
    image_path: str
    text: str


@dataclass(frozen=True)
class Csv2JsonResult:
    """Counts of the split; printed, it is the summary line."""

    train_json: Path
    val_json: Path | None
    num_train: int
    num_val: int
    num_train_formulas: int
    num_val_formulas: int
    seed: int

    def __str__(self) -> str:
        summary = f"{self.train_json}: {self.num_train} rows of {self.num_train_formulas} formulas"
        if self.val_json is None:
            return summary
        return (
            f"{summary}; {self.val_json}: {self.num_val} rows of {self.num_val_formulas} other formulas "
            f"(seed {self.seed})"
        )


def csv2json(
    csv: Path | list[Path],
    train_json: Path,
    val_json: Path | None = None,
    *,
    val_size: int | float | None = None,
    normalize: Literal[0, 1, 2] | None = None,
    seed: int = 42,
) -> Csv2JsonResult:
    """Split one or more tables like data.csv into train.json and val.json in the tutorial's conversation format.

    The split is random by seed. Rows whose formulas are equal but for spaces and redundant braces stay on one
    side, so validation may get a few rows fewer than asked for, never more unless a single formula fills it.

    Args:
        csv: tables with the columns image_path and text; paths are relative to each table's folder.
        train_json: file for the training records; its paths are relative to its own folder.
        val_json: file for the validation records; without one, all rows are for training.
        val_size: rows for validation, as a count (200) or a fraction (0.1), 0 for none; 0.05 where left out.
        normalize: write the texts in canonical spelling at this level of `latexocr.metrics.normalize`, so that a model
            need not guess which of several spellings is meant; left out, they stay as they are.
        seed: another seed gives another split.

    Returns:
        Counts of rows and formulas on both sides.

    Raises:
        InputError: a missing file, column or image, a blank text, or a val_size that leaves no training rows or has no
            val_json.
    """
    tables = [Path(table) for table in (csv if isinstance(csv, list | tuple) else [csv])]
    targets = [Path(train_json), *([Path(val_json)] if val_json is not None else [])]
    if len({file.absolute() for file in (*tables, *targets)}) < len(tables) + len(targets):
        raise InputError(f"{train_json}: each table, train and validation all need files of their own")
    rows = [row for table in tables for row in _read_rows(table)]
    if normalize is not None:
        texts = _normalized([row.text for row in rows], normalize)
        rows = [row._replace(text=text) for row, text in zip(rows, texts, strict=True)]
    if val_json is None and val_size:
        raise InputError(f"val_size {val_size}: needs a val_json to write these rows to")
    num_val = _num_val(0.05 if val_size is None else val_size, len(rows)) if val_json is not None else 0
    formulas = _group_by_formula([row.text for row in rows])
    chosen = _choose(formulas, num_val, seed)
    val_rows = {row for formula in chosen for row in formulas[formula]}
    train = [row for row in range(len(rows)) if row not in val_rows]
    sides = (train, sorted(val_rows))  # of the files that are asked for
    _write_all({target: _records(rows, side, target) for target, side in zip(targets, sides, strict=False)})
    return Csv2JsonResult(
        targets[0],
        targets[1] if len(targets) == 2 else None,
        len(train),
        len(val_rows),
        len(formulas) - len(chosen),
        len(chosen),
        seed,
    )


def _read_rows(file: Path) -> list[_Row]:
    """Every row, checked; `nan` and `NA` are texts here, so no pandas."""
    from latexocr.sources import csv_records

    if not file.is_file():
        raise InputError(f"{file}: no such file; make it with latexocr data2csv")
    rows = []
    for number, record in enumerate(csv_records(file)):
        missing = [name for name in ("image_path", "text") if name not in record]
        if missing:
            raise InputError(f"{file}: no column {missing[0]} among {', '.join(record)}; rename one")
        image_path, text = record["image_path"], record["text"]
        where = f"{file}, row {number} ({image_path})"
        if not text.strip():
            raise InputError(f"{where}: the text is blank; remove the row")
        image = file.parent / image_path
        if not image.is_file():
            raise InputError(f"{where}: no such image under {file.parent}; mend or remove the row")
        if image.stat().st_size == 0:
            raise InputError(f"{where}: the image file is empty; mend or remove the row")
        rows.append(_Row(file, image_path, text))
    if not rows:
        raise InputError(f"{file}: no rows")
    return rows


def _num_val(val_size: int | float, num_rows: int) -> int:
    """Rows asked for: a whole number is a count, a number between 0 and 1 a fraction (at least one row)."""
    if 0 < val_size < 1:
        num_val = max(1, round(val_size * num_rows))
    elif val_size == 0 or (isinstance(val_size, int) and val_size > 0):  # 1.0 could mean one row or all: refused
        num_val = int(val_size)
    else:
        raise InputError(f"val_size {val_size}: needed is a count such as 200 or a fraction such as 0.05")
    if num_val >= num_rows:
        raise InputError(f"val_size {val_size}: leaves nothing to train on, there are only {num_rows} rows")
    return num_val


def _group_by_formula(texts: list[str]) -> dict[str, list[int]]:
    """Canonical formula -> its rows."""
    groups: dict[str, list[int]] = {}
    for row, formula in enumerate(_normalized(texts, 1)):
        groups.setdefault(formula, []).append(row)
    return groups


def _normalized(texts: Sequence[str], level: int) -> list[str]:
    """All texts in canonical spelling; many are shared among the cores."""
    from concurrent.futures import ProcessPoolExecutor

    from tqdm.auto import tqdm

    from latexocr.metrics import normalize

    bar = partial(tqdm, total=len(texts), unit="row", desc="csv2json")
    if len(texts) < SHARED_FROM:
        return [normalize(text, level=level) for text in bar(texts)]
    with ProcessPoolExecutor() as pool:
        return list(bar(pool.map(partial(normalize, level=level), texts, chunksize=1000)))


def _choose(groups: dict[str, list[int]], num_val: int, seed: int) -> list[str]:
    """Formulas for validation: in random order, each that still fits into `num_val` rows."""
    if num_val == 0:
        return []
    if len(groups) == 1:
        raise InputError("all rows show one formula: there is nothing to split; use --val-size 0")
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    chosen, room = [], num_val
    for formula in order:
        if len(groups[formula]) <= room:
            chosen.append(formula)
            room -= len(groups[formula])
    return chosen or [min(order, key=lambda formula: len(groups[formula]))]


def _records(rows: list[_Row], numbers: list[int], target: Path) -> list[dict]:
    """The tutorial's records; an id tells the row of the tables (identity_1 is the first) on both sides."""
    # realpath: `../images` out of a linked folder leads elsewhere than the link's own parent.
    folder = os.path.realpath(target.parent)
    to_table = {
        table: os.path.relpath(os.path.realpath(table.parent), folder) for table in {row.table for row in rows}
    }

    def relative(row: _Row) -> str:
        return Path(os.path.normpath(Path(to_table[row.table]) / row.image_path)).as_posix()

    return [
        {
            "id": f"identity_{number + 1}",
            "conversations": [
                {"role": "user", "value": relative(rows[number])},
                {"role": "assistant", "value": rows[number].text},
            ],
        }
        for number in numbers
    ]


def _write_all(files: dict[Path, list[dict]]) -> None:
    """All files or none: they are renamed only when all are on disk."""
    temporary = {path: path.with_name(path.name + ".tmp") for path in files}
    try:
        for path, records in files.items():
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary[path].open("w", encoding="utf-8", newline="\n") as file:
                json.dump(records, file, ensure_ascii=False, indent=2)
                file.write("\n")
        for path in files:
            temporary[path].replace(path)
    except OSError as error:
        for path in temporary.values():
            try:
                path.unlink(missing_ok=True)
            except OSError:
                continue
        raise InputError(f"{error.filename}: cannot be written ({error.strerror}); choose another file") from error
