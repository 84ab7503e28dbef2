"""Where rows come from: a hub's data set, parquet files, or a folder of images with a labels file.

Why: everything after this file sees one thing, a `Source` that yields (image, text) rows. A hub is only a
download in front of it: its snapshot is then read exactly like a local folder, so that path is tested without
a network.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from latexocr.checkpoint import HUB_ID
from latexocr.errors import InputError, nearest

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "image_path", "file_name")  # in this order
TEXT_COLUMNS = ("text", "latex", "label")
LABEL_SUFFIXES = (".csv", ".tsv", ".jsonl")
LABEL_STEMS = ("metadata", "labels", "data")  # looked for in this order
SPLIT_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "test"}
BATCH_ROWS = 32  # rows of parquet decoded at a time: photographs of 5 MB each must fit too


class Row(NamedTuple):
    """One row of a source, not yet checked.

    `image` is encoded bytes, the path of a file to read, or None; `image_path` is the source's name for it.
    """

    image: bytes | str | None
    image_path: str
    text: object


@dataclass(frozen=True)
class Source:
    """Rows that can be read again in the same order, and a fingerprint that changes with their content."""

    num_rows: int
    fingerprint: list
    rows: Callable[[], Iterator[Row]]


class HubError(InputError):
    """A hub's data set could not be downloaded."""


def open_source(
    source: str,
    *,
    hub: Literal["modelscope", "huggingface"] = "modelscope",
    subset: str | None = None,
    split: str = "train",
) -> Source:
    """Find the rows behind a hub id, file, folder or glob; columns are checked, rows are not read yet.

    Args:
        source: `owner/name` on a hub; or a parquet file, a glob of them, a folder of them; or a labels file
            (csv, tsv, jsonl) or the folder that holds it.
        hub: where an `owner/name` is looked up.
        subset: configuration of the data set.
        split: split of the data set; a single file or a glob has none.

    Raises:
        InputError: nothing there, unreadable, or without an image and a text column.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, subset=subset, split=split)
    if path.is_file():
        return _open_files([path], source)
    if glob.has_magic(source):
        # Not Path.glob, which refuses absolute patterns.
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True))  # noqa: PTH207
        if not files:
            raise InputError(f"{source}: no file matches this pattern")
        return _open_files(files, source)
    if not HUB_ID.fullmatch(source) or path.suffix in (".parquet", *LABEL_SUFFIXES):
        raise InputError(
            f"{source}: no such file or folder; give a parquet file, a folder, a labels file "
            f"or the owner/name of a data set on a hub"
        )
    return _open_folder(download(source, hub=hub, subset=subset, split=split), subset=subset, split=split)


def parquet_files(
    source: str, *, hub: Literal["modelscope", "huggingface"], subset: str | None = None, split: str = "train"
) -> list[Path]:
    """The parquet files behind a file, a pattern, a folder or a hub id, whatever their columns.

    Raises:
        InputError: nothing there, or no parquet files.
    """
    path = Path(source).expanduser()
    if path.is_file():
        files = [path]
    elif glob.has_magic(source):
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True))  # noqa: PTH207
    else:
        if not path.is_dir() and not HUB_ID.fullmatch(source):
            raise InputError(f"{source}: no such file; `latexocr csv2json` writes one")
        folder = path if path.is_dir() else download(source, hub=hub, subset=subset, split=split)
        config = _card_config(folder, subset)
        patterns = _split_patterns(config, split)
        base = folder / subset if config is None and subset is not None else folder
        files = (
            _parquet_of_split(base, split)
            if patterns is None
            else sorted({file for pattern in patterns for file in folder.glob(pattern)})
        )
    if not files or any(file.suffix != ".parquet" for file in files):
        raise InputError(f"{source}: needed are .parquet files, found {_list(file.name for file in files)}")
    return files


# --- hubs: the only lines that need a network -------------------------------------------------------------


def download(source: str, *, hub: str, subset: str | None, split: str) -> Path:
    """Download a data set's card, then the files of one subset and split only; returns the folder."""
    try:
        folder = _snapshot(source, hub, ["README.md", "*.md"])
        patterns = _split_patterns(_card_config(folder, subset), split)
        if patterns is None and subset is not None:
            patterns = [f"{subset}/*"]
        return _snapshot(source, hub, ["README.md", *patterns] if patterns else None)
    except InputError:
        raise
    except Exception as error:  # each hub library has its own family of errors; the user's way out is the same
        what = " ".join(str(error).split())[:200]
        raise HubError(
            f"{source}: no local path of this name, and {hub} could not deliver it ({what}); "
            f"check id and network, try the other --hub, or give a local parquet file or folder in its place"
        ) from error


def _snapshot(source: str, hub: str, allow_patterns: list[str] | None) -> Path:
    # Not MsDataset: it needs modelscope[datasets], which holds `datasets` at an old version.
    if hub == "modelscope":
        from modelscope import dataset_snapshot_download

        return Path(dataset_snapshot_download(source, allow_patterns=allow_patterns))
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, repo_type="dataset", allow_patterns=allow_patterns))


# --- folders: a hub's snapshot, loose parquet files, or images with labels --------------------------------


def _open_folder(folder: Path, *, subset: str | None, split: str) -> Source:
    config = _card_config(folder, subset)
    patterns = _split_patterns(config, split)
    if patterns is not None:
        files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
        if not files:
            raise InputError(f"{folder}: its card promises {', '.join(patterns)} for split {split}, but no such file")
        return _open_files(files, f"{folder} (split {split})")
    base = folder / config["data_dir"] if config and config.get("data_dir") else folder
    if config is None and subset is not None:
        base = folder / subset
        if not base.is_dir():
            names = sorted(child.name for child in folder.iterdir() if child.is_dir())
            raise InputError(f"{folder}: no subset {subset!r}{nearest(subset, names)} (folders here: {_list(names)})")
    if next(base.rglob("*.parquet"), None) is not None:
        return _open_files(_parquet_of_split(base, split), f"{base} (split {split})")
    return _open_labels(_find_labels(base, split))


def _card_config(folder: Path, subset: str | None) -> dict | None:
    """The `configs:` entry of the data set card (README.md's YAML head) for this subset; None without any."""
    card = folder / "README.md"
    head = card.is_file() and re.match(r"---\n(.*?)\n---", card.read_text("utf-8-sig", errors="replace"), re.DOTALL)
    if not head:
        return None
    import yaml

    try:
        configs = (yaml.safe_load(head.group(1)) or {}).get("configs") or []
    except (yaml.YAMLError, AttributeError) as error:
        raise InputError(f"{card}: its YAML head cannot be read ({' '.join(str(error).split())})") from error
    by_name = {config.get("config_name", "default"): config for config in configs}
    if not by_name:
        return None
    default = next((name for name, config in by_name.items() if config.get("default")), "default")
    name = subset or (default if len(by_name) > 1 else next(iter(by_name)))
    if name not in by_name:
        raise InputError(
            f"{folder}: no subset {name!r}{nearest(name, by_name)}; give --subset, one of {_list(by_name)}"
        )
    return by_name[name]


def _split_patterns(config: dict | None, split: str) -> list[str] | None:
    """File patterns of a split. A card writes `data_files` as a string, a list, or {split, path} entries."""
    files = (config or {}).get("data_files")
    if not files:
        return None
    if isinstance(files, str) or (isinstance(files, list) and isinstance(files[0], str)):
        files = {"train": files}
    elif isinstance(files, list):
        files = {entry["split"]: entry["path"] for entry in files}
    name = _known_split(split, files, f"subset {config.get('config_name', 'default')!r}")
    prefix = f"{config['data_dir'].rstrip('/')}/" if config.get("data_dir") else ""
    return [prefix + pattern for pattern in ([files[name]] if isinstance(files[name], str) else files[name])]


def _parquet_of_split(folder: Path, split: str) -> list[Path]:
    """Parquet files of a split by the rules of Hugging Face datasets (train-0000.parquet, val/..., ...)."""
    import tempfile

    from datasets import load_dataset_builder

    with tempfile.TemporaryDirectory() as cache_dir:  # the builder wants a cache; nothing is prepared in it
        try:
            files = load_dataset_builder(str(folder), cache_dir=cache_dir).config.data_files
        except Exception as error:
            raise InputError(
                f"{folder}: datasets finds no splits here ({' '.join(str(error).split())[:200]}); "
                f"give the parquet files themselves, such as '{folder}/*.parquet'"
            ) from error
    files = {str(name): found for name, found in files.items()}
    found = [Path(file) for file in files[_known_split(split, files, str(folder))]]
    if not any(file.suffix == ".parquet" for file in found):
        raise InputError(f"{folder}: split {split} is not in parquet files ({_list(f.name for f in found)})")
    return sorted(file for file in found if file.suffix == ".parquet")


def _known_split(split: str, splits: dict, where: str) -> str:
    for name in (split, SPLIT_ALIASES.get(split)):
        if name in splits:
            return name
    raise InputError(f"{where}: no split {split!r}; it has {_list(splits)} (give one as --split)")


def _find_labels(folder: Path, split: str) -> Path:
    folders = [folder, *(folder / name for name in (split, SPLIT_ALIASES.get(split)) if name)]
    for place in folders:
        for stem in LABEL_STEMS:
            for suffix in reversed(LABEL_SUFFIXES):
                if (place / f"{stem}{suffix}").is_file():
                    return place / f"{stem}{suffix}"
        found = sorted(file for file in place.glob("*") if file.suffix in LABEL_SUFFIXES)
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"{place}: several labels files ({_list(f.name for f in found)}); give one as --source")
    raise InputError(
        f"{folder}: neither parquet files nor a labels file; needed is metadata.jsonl, labels.csv, "
        f"labels.tsv or labels.jsonl with the columns file_name and text"
    )


# --- files ------------------------------------------------------------------------------------------------


def _open_files(files: list[Path], source: str) -> Source:
    if all(file.suffix == ".parquet" for file in files):
        return _open_parquet(files)
    if len(files) == 1 and files[0].suffix in LABEL_SUFFIXES:
        return _open_labels(files[0])
    raise InputError(
        f"{source}: needed are .parquet files or one labels file ({', '.join(LABEL_SUFFIXES)}), "
        f"found {_list(file.name for file in files)}"
    )


def _open_parquet(files: list[Path]) -> Source:
    num_rows = 0
    columns = {}
    for file in files:
        with _parquet(file) as parquet:
            schema = parquet.schema_arrow
            columns[file] = _pick_columns(schema.names, str(file))
            image = columns[file][0]
            _check_image_type(schema.field(image).type, f"{file}: column {image!r}")
            num_rows += parquet.metadata.num_rows

    if not num_rows:
        raise InputError(f"{_list(files)}: no rows")

    def rows() -> Iterator[Row]:
        for file in files:
            yield from _parquet_rows(file, *columns[file])

    return Source(num_rows, [_fingerprint(file) for file in files], rows)


def _parquet(file: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Through a small buffer: the default reads a whole row group, which may be the whole file.
        return pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a readable parquet file ({' '.join(str(error).split())})") from error


def _check_image_type(kind, where: str) -> None:
    import pyarrow.types as types

    if types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind}:
        return
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_string(kind) or types.is_large_string(kind):
        return
    raise InputError(f"{where} holds {kind}; needed are encoded images (struct of bytes and path, binary) or paths")


def _parquet_rows(file: Path, image_column: str, text_column: str) -> Iterator[Row]:
    import pyarrow as pa

    with _parquet(file) as parquet:
        batches = parquet.iter_batches(BATCH_ROWS, columns=[image_column, text_column], use_threads=False)
        try:
            for batch in batches:
                images, texts = batch.column(image_column), batch.column(text_column)
                for image, text in zip(images, texts, strict=True):  # one row at a time: images are large
                    yield _image_row(image.as_py(), text.as_py(), file.parent)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: damaged parquet file ({' '.join(str(error).split())})") from error


def _image_row(image: dict | bytes | str | None, text: object, folder: Path) -> Row:
    data, name = image, ""
    if isinstance(image, dict):
        name = image.get("path") or ""
        data = image.get("bytes")
        data = data if data is not None else name or None
    if isinstance(data, str):
        return Row(str(folder / data), data, text)
    return Row(data, name, text)


def _open_labels(file: Path) -> Source:
    """A labels file is read once before any work: broken line 5,000 must not be found after 4,999 images."""
    read = jsonl_records if file.suffix == ".jsonl" else csv_records
    image_column = text_column = None
    num_rows = 0
    images = hashlib.sha256()
    for record in read(file):
        if image_column is None:
            image_column, text_column = _pick_columns(list(record), str(file))
        num_rows += 1
        path = _image_file(record.get(image_column), file.parent)
        images.update(repr(_fingerprint(Path(path)) if path else None).encode(errors="backslashreplace"))
    if not num_rows:
        raise InputError(f"{file}: no rows")

    def rows() -> Iterator[Row]:
        for record in read(file):
            name = record.get(image_column)
            yield Row(_image_file(name, file.parent), "" if name is None else str(name), record.get(text_column))

    return Source(num_rows, [_fingerprint(file), images.hexdigest()], rows)


def _image_file(name: object, folder: Path) -> str | None:
    return str(folder / name) if isinstance(name, str) and name.strip() else None


def jsonl_records(file: Path) -> Iterator[dict]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:  # numbers stay as they are written: a label 1.50 is text
                    record = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
                except ValueError as error:
                    raise InputError(f"{file}, line {number}: malformed JSON ({error})") from error
                if not isinstance(record, dict):
                    raise InputError(
                        f'{file}, line {number}: needed is an object like {{"file_name": ..., "text": ...}}'
                    )
                yield record
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 ({error.reason}); convert it to UTF-8") from error


def csv_records(file: Path) -> Iterator[dict]:
    """Rows of a csv or tsv file; a row that does not fit the header is an error, not a guess."""
    csv.field_size_limit(1 << 30)  # the module's own limit is 128 KiB a field
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            header = next(reader, None)
            if header is None:
                raise InputError(f"{file}: empty file; needed is a header line such as image_path,text")
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise InputError(
                        f"{file}, line {reader.line_num}: {len(fields)} fields, header has {len(header)};"
                        f" put texts that hold the separator in double quotes"
                    )
                yield dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise InputError(f"{file}, line {reader.line_num}: malformed ({error}); check the quotes") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 ({error.reason}); convert it to UTF-8") from error


def _pick_columns(names: list[str], where: str) -> tuple[str, str]:
    """The image column and the text column among these names."""
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    text = next((name for name in TEXT_COLUMNS if name in names), None)
    for found, what, known in ((image, "image", IMAGE_COLUMNS), (text, "text", TEXT_COLUMNS)):
        if found is None:
            raise InputError(
                f"{where}: no {what} column ({', '.join(known)}) among its columns {_list(names)}; rename one"
            )
    return image, text


def _fingerprint(file: Path) -> list:
    try:
        stat = file.stat()
    except (
        OSError,
        ValueError,
    ):  # a missing image is a rejected row, and its appearing later a changed source
        return [str(file)]
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]


def _list(names) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"
