"""Stage 3: `Record` -> input_ids, labels masked to -100, token types, patches. Written by hand, checked always.

The rules: the prompt comes from the processor's own chat template; image tokens are expanded from the image's
size; only the answer and the end token are supervised; the prompt's ids must be a prefix of the whole; nothing
is ever cut. It runs lazily in data-loader workers, so no pixel is ever cached on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from latexocr.errors import InputError
from latexocr.families import Family
from latexocr.images import ImageInput, ImagePolicy, Patcher, image_size, load_image
from latexocr.records import Record, Records

IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index
MASKED = -1  # dataset index of a sample without supervised tokens, which evens out the ranks of an epoch's last step
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenCounts:
    """Exact lengths of one record in tokens, known without decoding its image."""

    prompt: int  # chat template and instruction, without image tokens
    image: int
    answer: int  # with the end token

    @property
    def total(self) -> int:
        return self.prompt + self.image + self.answer


@dataclass(frozen=True)
class TokenTable(Sequence[TokenCounts]):
    """The `TokenCounts` of many records in 8 bytes each.

    Args:
        prompt: the same for all.
        image: (records,) int32.
        answer: (records,) int32.
    """

    prompt: int
    image: np.ndarray
    answer: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """(records,) int32."""
        return self.image + self.answer + np.int32(self.prompt)

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> TokenCounts:
        return TokenCounts(self.prompt, int(self.image[index]), int(self.answer[index]))

    def take(self, indices: np.ndarray) -> TokenTable:
        """The counts of the records at these places."""
        return TokenTable(self.prompt, self.image[indices], self.answer[indices])


@dataclass(frozen=True)
class Preprocessor:
    """The hand-written preprocessing function with everything that it depends on.

    Args:
        processor: the checkpoint's own (tokenizer, image processor, chat template).
        family: facts about the model family.
        policy: how a picture becomes a canvas of whole cells.
        prompt: the instruction beside the picture.
        new_tokens: tokens that this training adds -> the ones that each was made of until now.
    """

    processor: Any
    family: Family
    policy: ImagePolicy
    prompt: str
    new_tokens: dict[int, list[int]] = field(default_factory=dict)

    def __call__(self, record: Record) -> dict[str, torch.Tensor]:
        """One training sample.

        Returns:
            input_ids, attention_mask, labels, mm_token_type_ids: (length,);
            pixel_values: (patches, channels * temporal * patch * patch); image_grid_thw: (1, 3).

        Raises:
            InputError: the image cannot be read, or the chat template does not keep the prompt as a prefix.
        """
        return self.sample(record.image_path, record.text, record.where)

    def sample(
        self, image: ImageInput, text: str, where: str | None = None, *, as_bytes: bool = False
    ) -> dict[str, torch.Tensor]:
        """`__call__` for a picture and an answer that are not in a record.

        Args:
            as_bytes: leave the patches for `normalise`, if the image processor's work can be split so.
        """
        return self.sample_of(self.patches(image, where, as_bytes=as_bytes), text, where)

    def sample_of(
        self, vision: dict[str, torch.Tensor], text: str, where: str | None = None, *, measured: bool = False
    ) -> dict[str, torch.Tensor]:
        """`sample` for an image's tensors: `patches` gives them, or a cache of features with their grid.

        Args:
            measured: `count_all` has seen the text; it need not be rendered again, a fifth of a sample's time.
        """
        if not measured:
            self._check_renderings([text], [where])
        (answer,) = self._answers([text], [where])
        prompt = self._prompt(vision["image_grid_thw"])
        supervised = {"input_ids": answer, "attention_mask": 1, **dict(self.family.padded)}
        whole = {key: _longer(values, len(answer), supervised[key]) for key, values in prompt.items()}
        whole["labels"] = whole["input_ids"].copy()
        whole["labels"][: -len(answer)] = IGNORED
        return {**_tensors(whole), **vision}

    def prompt_features(
        self, image: ImageInput, where: str | None = None, *, as_bytes: bool = False
    ) -> dict[str, torch.Tensor]:
        """What generation starts from: the same prompt, token types and patches as in training, no answer."""
        vision = self.patches(image, where, as_bytes=as_bytes)
        return {**_tensors(self._prompt(vision["image_grid_thw"])), **vision}

    def patches(
        self, image: ImageInput, where: str | None = None, *, as_bytes: bool = False
    ) -> dict[str, torch.Tensor]:
        """`pixel_values` (patches, channels * temporal * patch * patch) and `image_grid_thw` (1, 3) of a picture."""
        picture = self.policy.canvas(load_image(image, where))
        if self._patcher is None:
            found = self.processor.image_processor([picture.convert("RGB")], do_resize=False, return_tensors="pt")
            return {"pixel_values": found["pixel_values"], "image_grid_thw": found["image_grid_thw"]}
        pixel_values, grid_thw = self._patcher.cut(picture)
        return {
            "pixel_values": pixel_values if as_bytes else self.normalise(pixel_values),
            "image_grid_thw": grid_thw,
        }

    def normalise(self, pixel_values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What the model gets from the patches of a sample or a batch `as_bytes`; others stay as they are."""
        return pixel_values if pixel_values.is_floating_point() else self._patcher.normalise(pixel_values, dtype)

    def _prompt(self, grid_thw: torch.Tensor) -> dict[str, np.ndarray]:
        """What a token has, in numpy, where short arrays cost less than in torch."""
        num_tokens = int(grid_thw.prod()) // self.patches_per_token
        before, after = self._prompt_halves
        input_ids = np.concatenate([before, np.full(num_tokens, self.processor.image_token_id), after])
        return {
            "input_ids": input_ids,
            "attention_mask": np.ones_like(input_ids),
            **{key: np.isin(input_ids, ids).astype(np.int64) for key, ids in self._image_ids.items()},
        }

    def answers(self, texts: Sequence[str], wheres: Sequence[str | None]) -> list[list[int]]:
        """Ids of answer and end token of each text: those of the template's rendering of the whole conversation.

        Only what the answer can change is tokenised: the text from the prompt's last special token on, at which
        tokenizers split before they do anything else.

        Raises:
            InputError: the template changes an answer, the tokenizer merges it with the prompt, or it contains a
                special token; `wheres` names it.
        """
        self._check_renderings(texts, wheres)
        return self._answers(texts, wheres)

    def _answers(self, texts: Sequence[str], wheres: Sequence[str | None]) -> list[list[int]]:
        tail, tail_ids = self._prompt_tail
        end = self.family.end_token
        encoded = self.processor.tokenizer(
            [tail + text + end for text in texts], add_special_tokens=False, return_attention_mask=False
        )
        answers = []
        for ids, where in zip(encoded["input_ids"], wheres, strict=True):
            answer_ids = ids[len(tail_ids) :]
            if ids[: len(tail_ids)] != tail_ids:
                raise InputError(f"{where or 'answer'}: the tokenizer merges the end of the prompt with the answer")
            if not self._special_ids.isdisjoint(answer_ids[:-1]):
                token = next(token for token in answer_ids if token in self._special_ids)
                name = self.processor.tokenizer.convert_ids_to_tokens(token)
                raise InputError(f"{where or 'answer'}: the text contains the special token {name}; delete the record")
            answers.append(answer_ids)
        return answers

    def count_tokens(self, record: Record) -> TokenCounts:
        """Exact token counts from the image's header and the texts, without decoding a pixel."""
        return self.count_all([record])[0]

    def count_all(self, records: Sequence[Record]) -> TokenTable:
        """`count_tokens` of many records, tokenised together."""
        image = [self.policy.visual_tokens(*image_size(record.image_path, record.where)) for record in records]
        answers = self.answers([record.text for record in records], [record.where for record in records])
        lengths = np.array([image, [len(answer) for answer in answers]], np.int32)
        return TokenTable(self.prompt_length, *lengths)

    @property
    def patches_per_token(self) -> int:
        """Vision patches that are merged into one image token."""
        return self.processor.image_processor.merge_size**2

    @property
    def prompt_length(self) -> int:
        """Tokens of chat template and instruction, without image tokens."""
        return len(self._prompt_ids) - 1

    def _check_renderings(self, texts: Sequence[str], wheres: Sequence[str | None]) -> None:
        """That the template writes each text as it is, in its place; one text is rendered, many mostly together.

        Rendering is most of what measuring 100,000 texts would cost. Templates replace (what all texts together show)
        or trim (what a text with each first and last character shows).
        """
        together = len(texts) > 1 and self._rendering_error("\n".join(texts)) is None
        for text, where in zip(texts, wheres, strict=True):
            ends = text[:1], text[-1:]
            if together and ends in self._ends_seen:
                continue
            error = self._rendering_error(text)
            if error:
                raise InputError(f"{where or 'answer'}: {error}")
            self._ends_seen.add(ends)

    def _rendering_error(self, text: str) -> str | None:
        conversation = [*self._messages, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        whole = self.processor.apply_chat_template(conversation, tokenize=False)
        prompt = self._prompt_text.removesuffix(self.family.empty_reasoning)
        if whole.startswith(prompt + text + self.family.end_token):
            return None
        return (
            "the chat template changes the answer or does not start with the prompt; "
            f"it rendered {whole[len(prompt) :][:80]!r} for {text[:80]!r}"
        )

    @cached_property
    def _ends_seen(self) -> set[tuple[str, str]]:
        """First and last characters of texts that the template left as they were."""
        return set()

    @cached_property
    def _patcher(self) -> Patcher | None:
        image_processor = self.processor.image_processor
        patcher = Patcher.equal_to(image_processor)
        if patcher is None:
            logger.info(f"{type(image_processor).__name__} makes the patches itself, which is slower")
        return patcher

    @cached_property
    def plain_ids(self) -> np.ndarray:
        """(tokens,) all ids but those of special tokens."""
        return np.setdiff1d(np.arange(len(self.processor.tokenizer)), list(self._special_ids))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        tokens = self.processor.tokenizer.added_tokens_decoder
        return frozenset(index for index, token in tokens.items() if token.special)

    @cached_property
    def _image_ids(self) -> dict[str, list[int]]:
        """Key of a batch -> ids of the tokens that are of type 1 (image) in it."""
        image, tokenizer = self.processor.image_token_id, self.processor.tokenizer
        framed = [image, *tokenizer.convert_tokens_to_ids(list(self.family.framing_tokens))]
        return {key: [image] if key == "mm_token_type_ids" else framed for key, _ in self.family.padded}

    @cached_property
    def _messages(self) -> list[dict]:
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.prompt}]}]

    @cached_property
    def _prompt_text(self) -> str:
        return self.processor.apply_chat_template(self._messages, tokenize=False, add_generation_prompt=True)

    @cached_property
    def _prompt_ids(self) -> list[int]:
        return self._ids(self._prompt_text)

    @cached_property
    def _prompt_tail(self) -> tuple[str, list[int]]:
        """Text and ids of the prompt from its last special token on, or all of it."""
        ids, text = self._prompt_ids, self._prompt_text
        special = [at for at, token in enumerate(ids) if token in self._special_ids]
        if special:
            start = text.rfind(self.processor.tokenizer.convert_ids_to_tokens(ids[special[-1]]))
            if start >= 0 and self._ids(text[start:]) == ids[special[-1] :]:
                return text[start:], ids[special[-1] :]
        return text, ids

    @cached_property
    def _prompt_halves(self) -> tuple[list[int], list[int]]:
        """Prompt ids before and after the image token that the template writes once per image."""
        ids, image_id = self._prompt_ids, self.processor.image_token_id
        if ids.count(image_id) != 1:
            raise InputError(f"the chat template writes {ids.count(image_id)} image tokens for one image, needs 1")
        at = ids.index(image_id)
        return ids[:at], ids[at + 1 :]

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def _longer(values: np.ndarray, length: int, fill: list[int] | int) -> np.ndarray:
    """(n,) -> (n + length,), the new part filled."""
    result = np.empty(len(values) + length, values.dtype)
    result[:-length], result[-length:] = values, fill
    return result


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(values) for key, values in arrays.items()}


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
        length = np.count_nonzero(sample["labels"].numpy() != IGNORED) - 1
        answer = sample["input_ids"].numpy()[-length - 1 : -1]
        wrong = rng.random(length) < self.token_corruption
        answer[wrong] = ids[rng.integers(len(ids), size=np.count_nonzero(wrong))]


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
        sample = self.preprocessor.sample_of(self._vision(row, record, rng), record.text, record.where, measured=True)
        if self.variation and self.variation.token_corruption:
            self.variation.corrupt(sample, self.preprocessor.plain_ids, rng)
        if index == MASKED:
            sample["labels"].fill_(IGNORED)
        return sample

    def _vision(self, row: int, record: Record, rng: np.random.Generator | None) -> dict[str, torch.Tensor]:
        if self.vision is not None:
            return self.vision(row)
        image: ImageInput = record.image_path
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
    return TokenTable(preprocessor.prompt_length, *np.concatenate(tables, axis=1))


class _Spans(Dataset):
    """Runs of neighbouring records -> their lengths of image and answer (2, records), or the error."""

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
        return torch.from_numpy(np.stack([table.image, table.answer]))


def decode_sample(sample: dict[str, torch.Tensor], preprocessor: Preprocessor) -> str:
    """A sample's ids as text, image tokens counted, the supervised span between ⟦ and ⟧.

    It is decoded from the tensors that training gets, so it shows what is there and not what was meant.
    """
    tokenizer, image_id = preprocessor.processor.tokenizer, preprocessor.processor.image_token_id
    pieces: list[tuple[str, list[int]]] = []
    for token, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True):
        kind = "answer" if label != IGNORED else "image" if token == image_id else "prompt"
        if not pieces or pieces[-1][0] != kind:
            pieces.append((kind, []))
        pieces[-1][1].append(token)
    texts = []
    for kind, ids in pieces:
        text = f"{tokenizer.decode(ids[:1])}x{len(ids)}" if kind == "image" else tokenizer.decode(ids)
        texts.append(f"⟦{text}⟧" if kind == "answer" else text)
    return "".join(texts)
