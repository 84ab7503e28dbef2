"""Stage 3: `Record` -> input_ids, labels masked to -100, token types, patches. Written by hand, checked always.

The rules: the prompt comes from the processor's own chat template; image tokens are expanded from the image's
size; only the answer and the end token are supervised; the prompt's ids must be a prefix of the whole; nothing
is ever cut. It runs lazily in data-loader workers, so no pixel is ever cached on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from latexocr.errors import InputError
from latexocr.families import Family
from latexocr.images import ImageInput, ImagePolicy, image_size, load_image
from latexocr.records import Record

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
class Preprocessor:
    """The hand-written preprocessing function with everything that it depends on.

    Args:
        processor: the checkpoint's own (tokenizer, image processor, chat template).
        family: facts about the model family.
        policy: how a picture becomes a canvas of whole cells.
        prompt: the instruction beside the picture.
    """

    processor: Any
    family: Family
    policy: ImagePolicy
    prompt: str

    def __call__(self, record: Record) -> dict[str, torch.Tensor]:
        """One training sample.

        Returns:
            input_ids, attention_mask, labels, mm_token_type_ids: (length,);
            pixel_values: (patches, channels * temporal * patch * patch); image_grid_thw: (1, 3).

        Raises:
            InputError: the image cannot be read, or the chat template does not keep the prompt as a prefix.
        """
        return self.sample(record.image_path, record.text, record.where)

    def sample(self, image: ImageInput, text: str, where: str | None = None) -> dict[str, torch.Tensor]:
        """`__call__` for a picture and an answer that are not in a record."""
        return self.sample_of(self.patches(image, where), text, where)

    def sample_of(
        self, vision: dict[str, torch.Tensor], text: str, where: str | None = None
    ) -> dict[str, torch.Tensor]:
        """`__call__` for an image's tensors, as `patches` gives them."""
        features = self._prompt_around(vision)
        prompt_ids = features["input_ids"]
        answer_ids = torch.tensor(self.answer_ids(text, where))
        features["input_ids"] = torch.cat([prompt_ids, answer_ids])
        features["labels"] = torch.cat([torch.full_like(prompt_ids, IGNORED), answer_ids])
        features["attention_mask"] = torch.ones_like(features["input_ids"])
        for key, value in self.family.padded:
            features[key] = torch.cat([features[key], torch.full_like(answer_ids, value)])
        return features

    def prompt_features(self, image: ImageInput, where: str | None = None) -> dict[str, torch.Tensor]:
        """What generation starts from: the same prompt, token types and patches as in training, no answer."""
        return self._prompt_around(self.patches(image, where))

    def patches(self, image: ImageInput, where: str | None = None) -> dict[str, torch.Tensor]:
        """`pixel_values` (patches, channels * temporal * patch * patch) and `image_grid_thw` (1, 3) of a picture."""
        picture = self.policy.apply(load_image(image, where))
        # The policy has done the resizing; the image processor normalises and cuts patches.
        patches = self.processor.image_processor(images=[picture], do_resize=False, return_tensors="pt")
        return {"pixel_values": patches["pixel_values"], "image_grid_thw": patches["image_grid_thw"]}

    def _prompt_around(self, vision: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        num_tokens = int(vision["image_grid_thw"].prod()) // self.processor.image_processor.merge_size**2
        before, after = self._prompt_halves
        input_ids = torch.tensor([*before, *[self.processor.image_token_id] * num_tokens, *after])
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == self.processor.image_token_id).long(),
            **vision,
        }

    def answer_ids(self, text: str, where: str | None = None) -> list[int]:
        """Ids of answer and end token, taken from the template's rendering of the whole conversation."""
        conversation = [
            *self._messages,
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ]
        whole = self.processor.apply_chat_template(conversation, tokenize=False)
        supervised = text + self.family.end_token
        if not whole.startswith(self._prompt_text + supervised):
            raise InputError(
                f"{where or 'answer'}: the chat template changes the answer or does not start with the prompt; "
                f"it rendered {whole[len(self._prompt_text) :][:80]!r} for {text[:80]!r}"
            )
        whole_ids = self._ids(self._prompt_text + supervised)
        prompt_ids = self._prompt_ids
        if whole_ids[: len(prompt_ids)] != prompt_ids:
            raise InputError(f"{where or 'answer'}: the tokenizer merges the end of the prompt with the answer")
        answer_ids = whole_ids[len(prompt_ids) :]
        for token in answer_ids[:-1]:
            if token in self._special_ids:
                name = self.processor.tokenizer.convert_ids_to_tokens(token)
                raise InputError(f"{where or 'answer'}: the text contains the special token {name}; delete the record")
        return answer_ids

    def count_tokens(self, record: Record) -> TokenCounts:
        """Exact token counts from the image's header and the texts, without decoding a pixel."""
        width, height = image_size(record.image_path, record.where)
        image_tokens = self.policy.visual_tokens(width, height)
        return TokenCounts(len(self._prompt_ids) - 1, image_tokens, len(self.answer_ids(record.text, record.where)))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        tokens = self.processor.tokenizer.added_tokens_decoder
        return frozenset(index for index, token in tokens.items() if token.special)

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
    def _prompt_halves(self) -> tuple[list[int], list[int]]:
        """Prompt ids before and after the image token that the template writes once per image."""
        ids, image_id = self._prompt_ids, self.processor.image_token_id
        if ids.count(image_id) != 1:
            raise InputError(f"the chat template writes {ids.count(image_id)} image tokens for one image, needs 1")
        at = ids.index(image_id)
        return ids[:at], ids[at + 1 :]

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


class FormulaDataset(Dataset):
    """Records, preprocessed one by one when a data-loader worker asks for them.

    `vision`, when it is set, gives the tensors of a record's image by index, and the image is not decoded.
    """

    vision: Callable[[int], dict[str, torch.Tensor]] | None = None

    def __init__(self, records: Sequence[Record], preprocessor: Preprocessor) -> None:
        self.records, self.preprocessor = records, preprocessor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = 0 if index == MASKED else index
        if self.vision is None:
            sample = self.preprocessor(self.records[row])
        else:
            sample = self.preprocessor.sample_of(self.vision(row), self.records[row].text, self.records[row].where)
        if index == MASKED:
            sample["labels"] = torch.full_like(sample["labels"], IGNORED)
        return sample


@dataclass(frozen=True)
class Selection:
    """Records that fit, their lengths, and what was dropped."""

    records: list[Record]
    counts: list[TokenCounts]
    dropped: list[tuple[Record, TokenCounts]]


def select(
    records: Sequence[Record],
    preprocessor: Preprocessor,
    *,
    max_length: int,
    overlong: Literal["drop", "error"] = "drop",
    num_threads: int = 8,
) -> Selection:
    """Measure every record and leave out the overlong ones: never cut, always counted.

    Args:
        max_length: most tokens of prompt, image, answer and end token together.
        overlong: "drop" leaves the record out and reports it, "error" refuses the data set.
        num_threads: image headers are read in parallel.

    Raises:
        InputError: an overlong record under "error"; an unreadable image; nothing left.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        counts = list(pool.map(preprocessor.count_tokens, records))
    kept = [index for index, count in enumerate(counts) if count.total <= max_length]
    dropped = [(records[i], counts[i]) for i in range(len(records)) if counts[i].total > max_length]
    if dropped:
        record, count = dropped[0]
        message = (
            f"{len(dropped):,} of {len(records):,} records are longer than max_length {max_length}, first: "
            f"{record.where} has {count.total} tokens ({count.image} of the image, {count.answer} of the answer)"
        )
        if overlong == "error":
            raise InputError(f"{message}; raise --max_length or use --overlong drop")
        if not kept:
            raise InputError(f"{message}; nothing is left to use: raise --max_length or lower --max_visual_tokens")
        logger.warning(f"dropped: {message}")
    return Selection([records[i] for i in kept], [counts[i] for i in kept], dropped)


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
