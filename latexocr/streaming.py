"""Training records as they come, for data that does not fit on the disk or is not to be read twice.

Why not the streams of `datasets`: a resumed run must go on with the batch that is due, on any rank and worker, without
decoding what it has seen. So the order is arithmetic: row i of the files (in an order of their own in every pass)
belongs to worker i % n of all workers of all ranks; each worker shuffles what passes through its buffer by a seed, and
the first batches of a resumed run are counted off as raw rows. It is the same order for the same ranks and workers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import IterableDataset, get_worker_info

from latexocr.checkpoint import HUB_ID
from latexocr.errors import InputError
from latexocr.formats import LOCAL, Access, Record, parse
from latexocr.preprocess import Preprocessor
from latexocr.records import Kinds, Records, hub_name
from latexocr.sources import parquet_files

BUFFER = 1000  # rows among which a worker picks the next one
PROBED = 64  # records that are looked at before training
Row = tuple[str, int, Any]  # file, number in it, content: a line or a table's row


class Stream(IterableDataset):
    """Micro-batches for ever, collated; a record that is too long is left out and counted.

    Args:
        path: see `open_stream`.
        preprocessor: makes samples.
        collate: makes a batch of samples.
        max_length: most tokens of a record.
        overlong: "drop" leaves a longer record out of its batch, "error" refuses it.
        batch_size: records of a rank and micro-batch, fewer where some are left out.
        rank: whose batches these are, of `world_size`.
        seed: of the order.
    """

    def __init__(
        self,
        path: str,
        preprocessor: Preprocessor,
        collate: Callable[[list[dict]], dict[str, Any]],
        *,
        access: Access,
        hub: Literal["modelscope", "huggingface"],
        max_length: int,
        overlong: Literal["drop", "error"],
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.files, self.preprocessor, self.collate, self.access = (
            open_stream(path, hub),
            preprocessor,
            collate,
            access,
        )
        self.max_length, self.overlong, self.batch_size = max_length, overlong, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.first_batch = self.epoch = 0
        self._dropped = torch.zeros((), dtype=torch.long).share_memory_()  # workers add to it

    @property
    def num_dropped(self) -> int:
        """Records left out so far by this rank, those of batches that were prepared in vain included."""
        return int(self._dropped)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: a stream begins again by itself."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # the loader asks its workers in turn, beginning with the first: that one takes the turn that is due
        turn = (self.first_batch + worker) % workers
        rows = self._rows(self.rank * workers + turn, self.world_size * workers)
        seen = (self.first_batch - turn + workers - 1) // workers * self.batch_size
        for _ in islice(rows, seen):
            pass
        while True:
            yield self._batch(list(islice(rows, self.batch_size)))

    def _rows(self, node: int, nodes: int) -> Iterator[Row]:
        """This node's rows in shuffled order, pass after pass."""
        for number in count():
            files = list(self.files)
            random.Random(f"{self.seed} {number}").shuffle(files)
            chance, buffer = random.Random(f"{self.seed} {number} {node}"), []
            for row in islice(read_rows(files), node, None, nodes):
                buffer.append(row)
                if len(buffer) > BUFFER:
                    yield _taken(buffer, chance)
            if not buffer:
                raise InputError(
                    f"{self.files[0]}: fewer rows than ranks and workers ({nodes}); leave out --streaming"
                )
            while buffer:
                yield _taken(buffer, chance)

    def _batch(self, rows: list[Row]) -> dict[str, Any]:
        samples = []
        for row in rows:
            record = record_of(row, self.access)
            sample = self.preprocessor(record, as_bytes=True)
            if len(sample["input_ids"]) <= self.max_length:
                samples.append(sample)
            elif self.overlong == "error":
                raise InputError(
                    f"{record.where} has {len(sample['input_ids'])} tokens, more than max_length {self.max_length}; "
                    "raise --max_length or use --overlong drop"
                )
            else:
                self._dropped += 1
        shown = [sample for sample in samples if "pixel_values" in sample]
        if any(sample["pixel_values"].is_floating_point() for sample in shown):  # a video, which is never bytes
            for sample in shown:
                sample["pixel_values"] = self.preprocessor.normalise(sample["pixel_values"])
        return self.collate(samples or [self.preprocessor.blank])


def _taken(buffer: list[Row], chance: random.Random) -> Row:
    at = chance.randrange(len(buffer))
    buffer[at], buffer[-1] = buffer[-1], buffer[at]
    return buffer.pop()


def first_records(
    path: str, access: Access = LOCAL, hub: Literal["modelscope", "huggingface"] = "modelscope"
) -> Records:
    """The first records of a stream, by which its shape is known before training.

    Raises:
        InputError: no records, or one that cannot be used.
    """
    records = [record_of(row, access) for row in islice(read_rows(open_stream(path, hub)), PROBED)]
    if not records:
        raise InputError(f"{path}: holds no records")
    talk = [record for record in records if not record.plain]
    videos = any(media.kind == "video" for record in talk for media in record.media)
    return Records(records, Kinds(talk=bool(talk), video=videos))


def open_stream(path: str, hub: Literal["modelscope", "huggingface"]) -> list[str]:
    """The files of a stream: one record a line (.jsonl), or tables (.parquet, also on a hub, where they stay).

    Raises:
        InputError: something that cannot be read row by row.
    """
    if path.endswith(".jsonl") and Path(path).is_file():
        return [path]
    if path.endswith((".json", ".jsonl", ".csv", ".tsv")) or Path(path, "state.json").is_file():
        raise InputError(f"{path}: --streaming reads .jsonl (one record a line) and .parquet files; or leave it out")
    source, subset, split = hub_name(path)
    if Path(path).exists() or not HUB_ID.fullmatch(source):
        return [str(file) for file in parquet_files(path, hub=hub)]
    if hub != "huggingface":
        raise InputError(f"{path}: only --hub huggingface hands out rows without a download; or leave out --streaming")
    from datasets import load_dataset_builder

    try:
        files = load_dataset_builder(source, subset).config.data_files[split]
    except Exception as error:  # each cause has its own family of errors; the way out is the same
        raise InputError(f"{path}: cannot be streamed ({' '.join(str(error).split())[:200]})") from error
    return [str(file) for file in files]


def read_rows(files: list[str]) -> Iterator[Row]:
    """The rows of all files; nothing is kept."""
    for file in files:
        yield from _lines(file) if file.endswith(".jsonl") else _table(file)


def _lines(file: str) -> Iterator[Row]:
    with Path(file).open(encoding="utf-8") as lines:
        for number, line in enumerate(line for line in lines if line.strip()):
            yield file, number, line


def _table(file: str) -> Iterator[Row]:
    import fsspec
    import pyarrow.parquet as pq

    with fsspec.open(file, "rb") as content, pq.ParquetFile(content) as table:
        rows = (row for batch in table.iter_batches(32) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield file, number, row


def record_of(row: Row, access: Access) -> Record:
    """Raises: InputError: malformed, or of no known shape."""
    file, number, content = row
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except json.JSONDecodeError as error:
            raise InputError(f"{file} record {number}: malformed JSON ({error.msg})") from error
    return parse(content, number, Path(file), access)
