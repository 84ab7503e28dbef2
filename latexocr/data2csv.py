"""Stage 1: a data set of formula images -> `images/`, `data.csv` and `rejected.csv`.

Why: training needs pictures that decode, texts that mean something and a table that a person can open. Every
row of the source ends in exactly one of the two tables. The work is cut into chunks of rows; a chunk is
finished when its part file exists, and the tables are the parts in order. So a run that is killed at any
moment continues where it was, and ends with the same bytes as a run that was not.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from latexocr.errors import InputError
from latexocr.sources import HubError, Row, Source, open_source
from latexocr.workers import ordered_map

logger = logging.getLogger(__name__)

CHUNK_ROWS = 128
CHUNK_BYTES = 8 << 20  # large pictures make shorter chunks, so memory stays flat
FOLDER_ROWS = 10_000  # pictures per folder: file managers and network disks choke on more
LOCK_SECONDS = 30
FORMAT = 1  # raise it when the same source and options give other files; old folders are then made anew

STATE = ".data2csv.json"
PARTS = ".data2csv.parts"


@dataclass(frozen=True)
class Data2CsvResult:
    """What became of every row: `num_rows == num_kept + sum(rejected.values())`."""

    csv: Path
    rejected_csv: Path
    num_rows: int
    num_kept: int
    rejected: dict[str, int]

    def __str__(self) -> str:
        """
        >>> print(Data2CsvResult(Path("d/data.csv"), Path("d/rejected.csv"), 9, 7, {"blank text": 2}))
        d/data.csv: 7 of 9 rows kept, 2 rejected (blank text 2; see d/rejected.csv)
        """
        why = ", ".join(f"{reason} {count}" for reason, count in self.rejected.items())
        tail = f" ({why}; see {self.rejected_csv})" if why else ""
        num_rejected = self.num_rows - self.num_kept
        return f"{self.csv}: {self.num_kept} of {self.num_rows} rows kept, {num_rejected} rejected{tail}"


class Chunk(NamedTuple):
    """Consecutive rows, one unit of work; its boundaries depend on the source alone."""

    index: int
    first_row: int
    rows: list[Row]


def data2csv(
    source: str = "AI-ModelScope/LaTeX_OCR",
    output_dir: Path = Path("outputs/data"),
    *,
    hub: Literal["modelscope", "huggingface"] = "modelscope",
    subset: str | None = None,
    split: str = "train",
    max_samples: int | None = None,
    num_workers: int | None = None,
) -> Data2CsvResult:
    """Turn a data set of formula images into pictures on disk and the table data.csv.

    Pictures that are already a plain PNG or JPEG keep their bytes; others become lossless PNG, flattened on
    white and upright. Rows that cannot be used go to rejected.csv with the reason. Run again, it continues
    after an interruption, does nothing when finished, and starts over when source or options changed.

    Args:
        source: hub id such as AI-ModelScope/LaTeX_OCR; or a parquet file, glob or folder with the columns
            image and text; or a labels file (csv, tsv, jsonl) of images, or its folder.
        output_dir: folder for data.csv, rejected.csv and images/; may be moved afterwards.
        hub: where a hub id is looked up.
        subset: configuration of the data set, such as small or human_handwrite.
        split: split of the data set; does not apply to a file or glob.
        max_samples: read only the first so many rows.
        num_workers: processes; default is one per core.

    Returns:
        Paths and counts; printed, it is the summary line.

    Raises:
        InputError: source missing or unusable, hub unreachable, output folder not writable or not ours, or not one
            row that can be used (the tables say why).
    """
    output_dir = Path(output_dir).expanduser()
    for name, value in (("max-samples", max_samples), ("num-workers", num_workers)):
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: needed is a number of at least 1")
    options = {
        "source": str(source),
        "hub": hub,
        "subset": subset,
        "split": split,
        "max_samples": max_samples,
        "format": FORMAT,
    }
    try:
        found = open_source(str(source), hub=hub, subset=subset, split=split)
    except HubError as error:
        result = _finished(output_dir, options)
        if result is None:
            raise
        logger.warning("%s; %s is finished from an earlier run and stays", error, output_dir)
        return result
    num_rows = min(found.num_rows, max_samples or found.num_rows)
    with _output_folder(output_dir) as lock:
        result = _finished(output_dir, options, found.fingerprint)
        if result is not None:
            logger.info("%s: finished already, nothing to do", output_dir)
        else:
            _prepare(output_dir, {"options": options, "fingerprint": found.fingerprint})
            _store_rows(found, output_dir, num_rows, num_workers or os.cpu_count() or 1, lock)
            result = _write_tables(output_dir, num_rows)
        shutil.rmtree(output_dir / PARTS, ignore_errors=True)
    if not result.num_kept:
        raise InputError(f"{result}: nothing is left to use")
    return result


# --- the output folder: whose it is, and how far it is ----------------------------------------------------


@contextlib.contextmanager
def _output_folder(output_dir: Path) -> Iterator[int]:
    """Create and lock the folder, and turn a refusal of the operating system into one line for the user.

    The lock sits on the folder itself and is inherited by the worker processes: after a `kill -9`, a new run
    waits until the last worker of the old one has gone.
    """
    import fcntl

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(output_dir, os.O_RDONLY)
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while not _locked(fcntl, lock):
                if time.monotonic() > deadline:
                    raise InputError(f"{output_dir}: another data2csv writes here; wait for it to end")
                time.sleep(0.05)
            yield lock
        finally:
            os.close(lock)
    except OSError as error:
        raise InputError(
            f"{error.filename or output_dir}: cannot be written ({error.strerror or error}); "
            f"mend that or choose another --output-dir, then run again (it continues)"
        ) from error


def _locked(fcntl, folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network disk without locks
        logger.warning("this disk has no file locks: do not run two data2csv into one folder")
    return True


def _finished(output_dir: Path, options: dict, fingerprint: list | None = None) -> Data2CsvResult | None:
    """The result of an earlier finished run with these options whose files are all still there."""
    state = _read_state(output_dir) or {}
    same = state.get("options") == options and fingerprint in (None, state.get("fingerprint"))
    if not same or "num_rows" not in state:
        return None
    if not (output_dir / "data.csv").is_file() or not (output_dir / "rejected.csv").is_file():
        return None
    csv.field_size_limit(1 << 30)
    with (output_dir / "data.csv").open(encoding="utf-8", newline="") as lines:
        if not all((output_dir / row[0]).is_file() for row in list(csv.reader(lines))[1:] if row):
            return None
    return _result(output_dir, state)


def _result(output_dir: Path, state: dict) -> Data2CsvResult:
    counts = (state["num_rows"], state["num_kept"], state["rejected"])
    return Data2CsvResult(output_dir / "data.csv", output_dir / "rejected.csv", *counts)


def _prepare(output_dir: Path, job: dict) -> None:
    """Leave the folder as this job needs it: its own unfinished work kept, another job's files removed."""
    state = _read_state(output_dir)
    if state is None:
        names = ("data.csv", "rejected.csv", "images", PARTS)
        foreign = [name for name in names if (output_dir / name).exists()]
        if foreign:
            raise InputError(
                f"{output_dir}: holds {', '.join(foreign)} that data2csv did not make; "
                f"move them away or choose another --output-dir"
            )
    elif state != job:  # a finished state is never equal: it has counts
        _refuse_if_edited(output_dir, state)
        _remove_own_files(output_dir)
    _write(output_dir / STATE, json.dumps(job, indent=1))  # first: what comes after it is ours
    (output_dir / PARTS).mkdir(exist_ok=True)


def _refuse_if_edited(output_dir: Path, state: dict) -> None:
    table = output_dir / "data.csv"
    written = state.get("data_csv_sha256")
    if written and table.is_file() and hashlib.sha256(table.read_bytes()).hexdigest() != written:
        raise InputError(
            f"{table}: edited since data2csv wrote it, and would now be replaced (source or options changed, "
            f"or images are missing); move it away or choose another --output-dir"
        )


def _remove_own_files(output_dir: Path) -> None:
    """Remove what data2csv made, nothing else; data.csv first, so a kill meanwhile does not look finished."""
    for name in ("data.csv", "rejected.csv", "data.csv.tmp", "rejected.csv.tmp"):
        (output_dir / name).unlink(missing_ok=True)
    shutil.rmtree(output_dir / PARTS, ignore_errors=True)
    for folder in (output_dir / "images").glob("*"):
        if re.fullmatch(r"\d{4,}", folder.name) and folder.is_dir():
            for file in folder.iterdir():
                if re.fullmatch(r"\d{8,}\.(png|jpg)(\.tmp)?", file.name):
                    file.unlink()
            _remove_if_empty(folder)
    _remove_if_empty(output_dir / "images")


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _read_state(output_dir: Path) -> dict | None:
    try:
        return json.loads((output_dir / STATE).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise InputError(f"{output_dir / STATE}: damaged ({error}); remove the folder's files") from error


def _write(path: Path, content: str | bytes) -> None:
    """Write under a temporary name, then rename: the file is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    temporary.replace(path)


# --- rows in, parts out -----------------------------------------------------------------------------------


def _store_rows(source: Source, output_dir: Path, num_rows: int, num_workers: int, lock: int) -> None:
    """Store every chunk that has no part file yet; at most two chunks a worker are in memory at any time."""
    from tqdm.auto import tqdm

    done = {int(part.stem) for part in (output_dir / PARTS).glob("*.json")}
    with tqdm(total=num_rows, unit="row", desc="data2csv") as bar:

        def jobs() -> Iterator[tuple[Path, Chunk]]:
            for chunk in _chunks(source, num_rows):
                if chunk.index in done:
                    bar.update(len(chunk.rows))
                else:
                    yield output_dir.absolute(), chunk

        for num_stored in ordered_map(
            store_chunk, jobs(), num_workers=num_workers, where=_rows_of_job, pass_fds=[lock]
        ):
            bar.update(num_stored)


def _rows_of_job(job: tuple[Path, Chunk]) -> str:
    _, chunk = job
    return f"rows {chunk.first_row} to {chunk.first_row + len(chunk.rows) - 1}: "


def _chunks(source: Source, num_rows: int) -> Iterator[Chunk]:
    rows: list[Row] = []
    index = first_row = num_bytes = 0
    for number, row in enumerate(source.rows()):
        if number == num_rows:
            break
        if rows and (len(rows) == CHUNK_ROWS or num_bytes > CHUNK_BYTES):
            yield Chunk(index, first_row, rows)
            index, first_row, rows, num_bytes = index + 1, number, [], 0
        rows.append(row)
        num_bytes += len(row.image) if isinstance(row.image, bytes) else 0
    if rows:
        yield Chunk(index, first_row, rows)


def store_chunk(job: tuple[Path, Chunk]) -> int:
    """Write a chunk's pictures, then its part file; a part file says that all its pictures are on disk.

    Args:
        job: output folder and chunk.

    Returns:
        The number of its rows.
    """
    output_dir, chunk = job
    kept, rejected = [], []
    (output_dir / "images").mkdir(exist_ok=True)
    for number, row in enumerate(chunk.rows, chunk.first_row):
        reason = _text_problem(row.text)
        if reason is None:
            try:
                data, suffix = to_stored(_read_image(row.image))
            except ValueError as error:  # PictureError, and paths that no file system takes
                reason = str(error)
        if reason is not None:
            text = "" if row.text is None else str(row.text).replace("\0", "\\x00")  # CSV readers stop at NUL
            rejected.append([number, row.image_path, text, reason])
            continue
        path = f"images/{number // FOLDER_ROWS:04d}/{number:08d}{suffix}"
        (output_dir / path).parent.mkdir(exist_ok=True)
        _write(output_dir / path, data)
        kept.append([path, row.text])
    # ASCII: a rejected text may hold lone surrogates, which UTF-8 does not have.
    part = json.dumps({"kept": kept, "rejected": rejected}, ensure_ascii=True)
    _write(output_dir / PARTS / f"{chunk.index:08d}.json", part)
    return len(chunk.rows)


def to_stored(data: bytes) -> tuple[bytes, str]:
    """The bytes to store for an encoded picture, and their file suffix.

    A PNG or JPEG that every reader shows alike (grey or RGB, opaque, upright, one frame) is kept byte for
    byte: a second JPEG encoding would blur thin strokes. Anything else becomes a lossless PNG.

    Args:
        data: an encoded picture of any raster format.

    Raises:
        PictureError: undecodable, of absurd size, or a single colour.
    """
    from latexocr.pictures import PictureError, flatten, is_blank, load_picture, orientation

    image = load_picture(io.BytesIO(data))
    picture = flatten(image)
    if is_blank(picture):
        raise PictureError("blank image: a single colour")
    fit = (
        image.format in ("PNG", "JPEG")
        and image.mode in ("1", "L", "RGB")
        and not image.has_transparency_data
        and not getattr(image, "is_animated", False)
        and orientation(image) == 1
    )
    if fit:
        return data, ".png" if image.format == "PNG" else ".jpg"
    picture.info = {}  # or PIL copies the source's colour profile and transparency
    buffer = io.BytesIO()
    # Ink on paper is runs of one grey: run-length matches give smaller files than zlib's default in half the time.
    picture.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue(), ".png"


def _text_problem(text: object) -> str | None:
    if text is None or (isinstance(text, str) and not text.strip()):
        return "blank text"
    if not isinstance(text, str):
        return f"unusable text: {type(text).__name__} instead of a string"
    if re.search("[\0\ud800-\udfff]", text):
        return "unusable text: holds NUL or half a surrogate pair"
    return None


def _read_image(image: bytes | str | None) -> bytes:
    from latexocr.pictures import PictureError

    if isinstance(image, str):
        file = Path(image)
        if not file.is_file():
            raise PictureError(f"missing image: no such file: {file}")
        try:
            image = file.read_bytes()
        except OSError as error:
            raise PictureError(f"missing image: {error.strerror}") from error
    if image is None:
        raise PictureError("missing image: no bytes and no path")
    if not image:
        raise PictureError("undecodable image: empty")
    return image


# --- tables -----------------------------------------------------------------------------------------------


def _write_tables(output_dir: Path, num_rows: int) -> Data2CsvResult:
    """Join the parts into data.csv and rejected.csv, then mark the folder finished."""
    num_kept, rejected = 0, Counter()
    kept_tmp, rejected_tmp = output_dir / "data.csv.tmp", output_dir / "rejected.csv.tmp"
    with (
        kept_tmp.open("w", encoding="utf-8", newline="") as kept_file,
        rejected_tmp.open("w", encoding="utf-8", newline="", errors="backslashreplace") as rejected_file,
    ):
        kept_file.write("image_path,text\n")
        rejected_file.write("row,image_path,text,reason\n")
        for part in sorted((output_dir / PARTS).glob("*.json"), key=lambda part: int(part.stem)):
            rows = json.loads(part.read_text("utf-8"))
            kept_file.writelines(map(_csv_line, rows["kept"]))
            rejected_file.writelines(map(_csv_line, rows["rejected"]))
            num_kept += len(rows["kept"])
            rejected.update(reason.partition(":")[0] for *_, reason in rows["rejected"])
    assert num_kept + rejected.total() == num_rows, "a row was lost between source and tables"
    state = _read_state(output_dir) | {
        "num_rows": num_rows,
        "num_kept": num_kept,
        "rejected": dict(sorted(rejected.items())),
        "data_csv_sha256": hashlib.sha256(kept_tmp.read_bytes()).hexdigest(),
    }
    kept_tmp.replace(output_dir / "data.csv")
    rejected_tmp.replace(output_dir / "rejected.csv")
    _write(output_dir / STATE, json.dumps(state, indent=1))
    return _result(output_dir, state)


def _csv_line(fields: list) -> str:
    # Not csv.writer: before Python 3.13 it leaves a lone \r unquoted, and readers then break the row there.
    texts = [str(field) for field in fields]
    return ",".join(f'"{t.replace(chr(34), chr(34) * 2)}"' if re.search('[",\r\n]', t) else t for t in texts) + "\n"
