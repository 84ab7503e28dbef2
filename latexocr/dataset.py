"""Training data: which records fit, what is varied in every epoch, and the samples that workers ask for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from latexocr.errors import InputError
from latexocr.formats import Record
from latexocr.images import ImageInput, load_image
from latexocr.preprocess import IGNORED, Preprocessor, TokenTable
from latexocr.records import Records

MASKED = -1  # dataset index of a sample without supervised tokens, which evens out the ranks of an epoch's last step
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variation:
    """What is different about a record in every epoch, so that the model learns to look instead of to remember.

    Args:
        token_corruption: share of the answer's tokens that the decoder is shown wrong: random other ones, while the
            labels stay right. A decoder that cannot trust what it wrote has to look at the picture.
        augment: a style of `latexocr.styles`, None for pictures as they are. Some scale or turn: lengths and budgets
            remain those of the pictures as they are.
        seed: with epoch and record it says what becomes of a record, on any worker and rank, resumed or not.
    """

    token_corruption: float = 0.0
    augment: str | None = None
    seed: int = 0

    def picture(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """`image` in the style.

        Raises:
            InputError: an unknown style.
        """
        if self.augment is None:
            return image
        from latexocr.augment import augment

        return augment(image, self.augment, rng)

    def corrupt(self, sample: dict[str, torch.Tensor], ids: np.ndarray, rng: np.random.Generator) -> None:
        """Replace that share of the answer's `input_ids`, in place; never the end token.

        Args:
            sample: of `Preprocessor.sample`.
            ids: what tokens are replaced with.
            rng: the record's own.
        """
        supervised = np.flatnonzero(sample["labels"].numpy() != IGNORED)
        inner = supervised[:-1][np.diff(supervised) == 1]  # all but the last of each answer
        wrong = inner[rng.random(len(inner)) < self.token_corruption]
        sample["input_ids"].numpy()[wrong] = ids[rng.integers(len(ids), size=len(wrong))]


class FormulaDataset(Dataset):
    """Records, preprocessed one by one when a data-loader worker asks for them.

    Args:
        records: measured ones (`select`), whose texts are known to be what the chat template writes.
        preprocessor: the one that measured them.
        as_bytes: a twenty-fourth of the memory for a picture; `Preprocessor.normalise` is to follow on the device.
        variation: for training; None for records as they are.

    `vision`, when it is set, gives the tensors of a record's image by index, and the image is not decoded.
    """

    vision: Callable[[int], dict[str, torch.Tensor]] | None = None

    def __init__(
        self,
        records: Sequence[Record],
        preprocessor: Preprocessor,
        *,
        as_bytes: bool = False,
        variation: Variation | None = None,
    ) -> None:
        self.records, self.preprocessor, self.as_bytes = records, preprocessor, as_bytes
        self.variation = variation
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that outlive an epoch see the next

    def set_epoch(self, epoch: int) -> None:
        """From now on records vary as in this epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = 0 if index == MASKED else index
        record, rng = self.records[row], self._rng(row)
        if self.preprocessor.is_plain(record):
            vision = self._vision(row, record, rng)
            sample = self.preprocessor.sample_of(vision, record.text, record.where, measured=True)
        else:
            sample = self.preprocessor(record, as_bytes=self.as_bytes)
        if self.variation and self.variation.token_corruption:
            self.variation.corrupt(sample, self.preprocessor.plain_ids, rng)
        if index == MASKED:
            sample["labels"].fill_(IGNORED)
        return sample

    def _vision(self, row: int, record: Record, rng: np.random.Generator | None) -> dict[str, torch.Tensor]:
        if self.vision is not None:
            return self.vision(row)
        image: ImageInput = record.media[0].load(record.where)
        if self.variation and self.variation.augment:
            image = self.variation.picture(load_image(image, record.where), rng)
        return self.preprocessor.patches(image, record.where, as_bytes=self.as_bytes)

    def _rng(self, row: int) -> np.random.Generator | None:
        return np.random.default_rng((self.variation.seed, int(self._epoch), row)) if self.variation else None


@dataclass(frozen=True)
class Selection:
    """Records that fit, their lengths, and what was dropped."""

    records: Records
    counts: TokenTable
    dropped: Records


def select(
    records: Records,
    preprocessor: Preprocessor,
    *,
    max_length: int,
    overlong: Literal["drop", "error"] = "drop",
    num_workers: int = 0,
) -> Selection:
    """Measure every record and leave out the overlong ones: never cut, always counted.

    Args:
        max_length: most tokens of prompt, image, answer and end token together.
        overlong: "drop" leaves the record out and reports it, "error" refuses the data set.
        num_workers: processes that measure.

    Raises:
        InputError: an overlong record under "error"; an unreadable image; nothing left.
    """
    counts = measure(records, preprocessor, num_workers=num_workers)
    fits = counts.total <= max_length
    kept, dropped = np.flatnonzero(fits), np.flatnonzero(~fits)
    if len(dropped):
        record, count = records[dropped[0]], counts[dropped[0]]
        message = (
            f"{len(dropped):,} of {len(records):,} records are longer than max_length {max_length}, first: "
            f"{record.where} has {count.total} tokens ({count.image} of the image, {count.answer} of the answer)"
        )
        if overlong == "error":
            raise InputError(f"{message}; raise --max_length or use --overlong drop")
        if not len(kept):
            raise InputError(f"{message}; nothing is left to use: raise --max_length or lower --max_visual_tokens")
        logger.warning(f"dropped: {message}")
    return Selection(records.take(kept), counts.take(kept), records.take(dropped))


def measure(records: Records, preprocessor: Preprocessor, *, num_workers: int = 0) -> TokenTable:
    """`Preprocessor.count_tokens` of all records, in processes of their own where there are many.

    Raises:
        InputError: an image or a text that cannot be used; the first one in the file is named.
    """
    spans = _Spans(records, preprocessor)
    loader = DataLoader(spans, batch_size=None, num_workers=num_workers if len(spans) > 1 else 0)
    tables = []
    with tqdm(total=len(records), desc="measuring", unit="record", delay=2, leave=False) as bar:
        for found in loader:
            if isinstance(found, InputError):
                raise found
            tables.append(found)
            bar.update(found.shape[1])
    return TokenTable(*np.concatenate(tables, axis=1))


class _Spans(Dataset):
    """Runs of neighbouring records -> their lengths of prompt, image and answer (3, records), or the error."""

    SIZE = 512

    def __init__(self, records: Records, preprocessor: Preprocessor) -> None:
        self.records, self.preprocessor = records, preprocessor

    def __len__(self) -> int:
        return -(-len(self.records) // self.SIZE)

    def __getitem__(self, index: int) -> torch.Tensor | InputError:
        try:
            table = self.preprocessor.count_all(list(self.records[index * self.SIZE : (index + 1) * self.SIZE]))
        except InputError as error:  # the loader would wrap its message in a traceback
            return error
        return torch.from_numpy(np.stack([table.prompt, table.image, table.answer]))
