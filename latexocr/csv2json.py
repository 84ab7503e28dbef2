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
from dataclasses import dataclass
from pathlib import Path

from latexocr.errors import InputError


@dataclass(frozen=True)
class Csv2JsonResult:
    """Counts of the split; printed, it is the summary line."""

    train_json: Path
    val_json: Path
    num_train: int
    num_val: int
    num_train_formulas: int
    num_val_formulas: int
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.train_json}: {self.num_train} rows of {self.num_train_formulas} formulas; "
            f"{self.val_json}: {self.num_val} rows of {self.num_val_formulas} other formulas "
            f"(seed {self.seed})"
        )


def csv2json(
    csv: Path,
    train_json: Path,
    val_json: Path,
    *,
    val_size: int | float = 0.05,
    seed: int = 42,
) -> Csv2JsonResult:
    """Split data.csv into train.json and val.json in the tutorial's conversation format.

    The split is random by seed. Rows whose formulas are equal but for spaces and redundant braces stay on one
    side, so validation may get a few rows fewer than asked for, never more unless a single formula fills it.

    Args:
        csv: table with the columns image_path and text; paths are relative to its folder.
        train_json: file for the training records; its paths are relative to its own folder.
        val_json: file for the validation records.
        val_size: rows for validation, as a count (200) or a fraction (0.05); 0 for none.
        seed: another seed gives another split.

    Returns:
        Counts of rows and formulas on both sides.

    Raises:
        InputError: a missing file, column or image, a blank text, or a val_size that leaves no training rows.
    """
    csv, train_json, val_json = Path(csv), Path(train_json), Path(val_json)
    if len({file.absolute() for file in (csv, train_json, val_json)}) < 3:
        raise InputError(f"{train_json}: the table, train and validation need three files")
    rows = _read_rows(csv)
    num_val = _num_val(val_size, len(rows))
    formulas = _group_by_formula([text for _, text in rows])
    chosen = _choose(formulas, num_val, seed)
    val_rows = {row for formula in chosen for row in formulas[formula]}
    train = [row for row in range(len(rows)) if row not in val_rows]
    _write_both(
        {
            train_json: _records(rows, train, csv, train_json),
            val_json: _records(rows, sorted(val_rows), csv, val_json),
        }
    )
    return Csv2JsonResult(
        train_json, val_json, len(train), len(val_rows), len(formulas) - len(chosen), len(chosen), seed
    )


def _read_rows(file: Path) -> list[tuple[str, str]]:
    """(image_path, text) of every row, each checked; `nan` and `NA` are texts here, so no pandas."""
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
        rows.append((image_path, text))
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
    from tqdm.auto import tqdm

    from latexocr.metrics import normalize

    groups: dict[str, list[int]] = {}
    for row, text in enumerate(tqdm(texts, unit="row", desc="csv2json")):
        groups.setdefault(normalize(text, level=1), []).append(row)
    return groups


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


def _records(rows: list[tuple[str, str]], numbers: list[int], csv: Path, target: Path) -> list[dict]:
    """The tutorial's records; an id tells the row of the CSV (identity_1 is the first) on both sides."""
    # realpath: `../images` out of a linked folder leads elsewhere than the link's own parent.
    to_csv = os.path.relpath(os.path.realpath(csv.parent), os.path.realpath(target.parent))
    return [
        {
            "id": f"identity_{number + 1}",
            "conversations": [
                {"role": "user", "value": Path(os.path.normpath(Path(to_csv) / rows[number][0])).as_posix()},
                {"role": "assistant", "value": rows[number][1]},
            ],
        }
        for number in numbers
    ]


def _write_both(files: dict[Path, list[dict]]) -> None:
    """Both files or none: they are renamed only when both are on disk."""
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
