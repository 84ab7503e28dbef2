"""Stage 3: `Record` -> input_ids, labels masked to -100, token types, patches. Written by hand, checked always.

The rules: the prompt comes from the processor's own chat template; image tokens are expanded from the image's
size; only the answer and the end token are supervised; the prompt's ids must be a prefix of the whole; nothing
is ever cut. It runs lazily in data-loader workers, so no pixel is ever cached on disk.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from latexocr.errors import InputError
from latexocr.families import Family
from latexocr.formats import Media, Record, Turn
from latexocr.images import ImageInput, ImagePolicy, Patcher, image_size, load_image
from latexocr.records import Records
from latexocr.video import Header, read_frames, video_header

IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenCounts:
    """Exact lengths of one record in tokens, known without decoding its image."""

    prompt: int  # chat template and instruction, without image tokens; answers that are not supervised, too
    image: int
    answer: int  # with the end token; all that are supervised

    @property
    def total(self) -> int:
        return self.prompt + self.image + self.answer


@dataclass(frozen=True)
class TokenTable(Sequence[TokenCounts]):
    """The `TokenCounts` of many records in 12 bytes each.

    Args:
        prompt: (records,) int32, or a number that is the same for all.
        image: (records,) int32; pictures and videos.
        answer: (records,) int32.
    """

    prompt: np.ndarray
    image: np.ndarray
    answer: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", np.broadcast_to(np.asarray(self.prompt, np.int32), np.shape(self.image)))

    @property
    def total(self) -> np.ndarray:
        """(records,) int32."""
        return self.image + self.answer + self.prompt

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> TokenCounts:
        return TokenCounts(int(self.prompt[index]), int(self.image[index]), int(self.answer[index]))

    def take(self, indices: np.ndarray) -> TokenTable:
        """The counts of the records at these places."""
        return TokenTable(self.prompt[indices], self.image[indices], self.answer[indices])


@dataclass(frozen=True)
class Preprocessor:
    """The hand-written preprocessing function with everything that it depends on.

    Args:
        processor: the checkpoint's own (tokenizer, image processor, chat template).
        family: facts about the model family.
        policy: how a picture becomes a canvas of whole cells.
        prompt: the instruction beside the picture, where a record has none of its own.
        new_tokens: tokens that this training adds -> the ones that each was made of until now.
        supervised_turns: which answers of a conversation are trained.
        empty_thinking: answers without reasoning begin with an empty `<think>` block.
        positions_per_second: of a video, for families that place its frames by time (config.json's tokens_per_second).
    """

    processor: Any
    family: Family
    policy: ImagePolicy
    prompt: str
    new_tokens: dict[int, list[int]] = field(default_factory=dict)
    supervised_turns: Literal["all", "last"] = "all"
    empty_thinking: bool = False
    positions_per_second: float = 2.0

    def __call__(self, record: Record, *, as_bytes: bool = False) -> dict[str, torch.Tensor]:
        """One training sample.

        Args:
            as_bytes: leave the patches for `normalise`, if the image processor's work can be split so.

        Returns:
            input_ids, attention_mask, labels, mm_token_type_ids: (length,);
            pixel_values: (patches, channels * temporal * patch * patch); image_grid_thw: (pictures, 3), both absent
            where nothing is shown; with videos also frame_intervals: (pictures and videos,).

        Raises:
            InputError: a picture or video that cannot be read, or a chat template that does not keep the prompt as a
                prefix.
        """
        if self.is_plain(record):
            return self.sample(record.media[0].load(record.where), record.text, record.where, as_bytes=as_bytes)
        encoded = self._encode(record)
        sample = self._inputs(encoded.input_ids)
        sample["labels"] = np.where(encoded.supervised, encoded.input_ids, IGNORED)
        sample["labels"][0] = IGNORED  # nothing stands before it in its sequence
        return {**_tensors(sample), **self._shown(record, encoded, as_bytes=as_bytes)}

    def prompt_of(self, record: Record, *, as_bytes: bool = False) -> dict[str, torch.Tensor]:
        """What generation of a record's last answer starts from.

        Raises:
            InputError: a document, which asks nothing; see `__call__` for others.
        """
        if self.is_plain(record):
            return self.prompt_features(record.media[0].load(record.where), record.where, as_bytes=as_bytes)
        if record.turns[0].role == "document":
            raise InputError(f"{record.where}: a text with markers asks nothing; give it an 'answer' to evaluate it")
        encoded = self._encode(replace(record, turns=record.turns[:-1]))  # a prompt: nothing in it is supervised
        return {**_tensors(self._inputs(encoded.input_ids)), **self._shown(record, encoded, as_bytes=as_bytes)}

    def is_plain(self, record: Record) -> bool:
        """Whether all but the answer and the picture's size is the same as for other such records."""
        return record.plain and not self.writes_thoughts

    def all_plain(self, records: Records) -> bool:
        """Whether `is_plain` holds for every record of a file, by what is known of the file."""
        return not (records.kinds.talk or self.writes_thoughts)

    @property
    def writes_thoughts(self) -> bool:
        """Whether answers begin with an empty thought that the chat template does not write by itself."""
        return self.empty_thinking and not self.family.empty_reasoning

    @cached_property
    def begins_thought(self) -> bool:
        """Whether the chat template opens a thought in the prompt, as those of thinking models do."""
        return self._prompt_text.rstrip().endswith("<think>")

    @cached_property
    def blank(self) -> dict[str, torch.Tensor]:
        """The smallest picture with the prompt and nothing supervised, for batches that show nothing.

        Why: ranks must do the same. One whose batch has no picture would not enter the vision tower, and the others
        would wait for its gradients or its share of sharded weights for ever.
        """
        smallest = replace(self, policy=ImagePolicy(self.policy.cell, min_visual_tokens=1))
        sample = smallest.prompt_features(Image.new("L", (self.policy.cell,) * 2, "white"), as_bytes=True)
        return {**sample, "labels": torch.full_like(sample["input_ids"], IGNORED)}

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
        return self._inputs(np.concatenate([before, np.full(num_tokens, self.processor.image_token_id), after]))

    def _inputs(self, input_ids: np.ndarray) -> dict[str, np.ndarray]:
        """What a model wants to know of each token."""
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
        """`count_tokens` of many records; those with the same prompt are tokenised together."""
        lengths = np.empty((3, len(records)), np.int32)
        plain = [index for index, record in enumerate(records) if self.is_plain(record)]
        chosen = [records[index] for index in plain]
        answers = (
            self.answers([record.text for record in chosen], [record.where for record in chosen]) if plain else []
        )
        for index, record, answer in zip(plain, chosen, answers, strict=True):
            size = image_size(record.media[0].load(record.where), record.where)
            lengths[:, index] = self.prompt_length, self.policy.visual_tokens(*size), len(answer)
        for index in sorted(set(range(len(records))) - set(plain)):
            encoded = self._encode(records[index])
            num_image, num_answer = np.count_nonzero(encoded.token_types), np.count_nonzero(encoded.supervised)
            lengths[:, index] = len(encoded.input_ids) - num_image - num_answer, num_image, num_answer
        return TokenTable(*lengths)

    # conversations

    def _encode(self, record: Record) -> Encoded:
        """Ids of a conversation with a token for every visual one, from sizes and texts alone.

        Raises:
            InputError: a picture or video that cannot be read; a text with special tokens; a chat template that
                rewrites what was said before, or does not write a text or a picture as it is.
        """
        layouts = [self._layout(media, record) for media in record.media]
        ids, supervised = [], []
        for shown, answer in self._spans(record):
            shown_ids, both = self._ids(shown), self._ids(shown + answer)
            if both[: len(shown_ids)] != shown_ids:
                raise InputError(f"{record.where}: the tokenizer merges the end of the prompt with the answer")
            ids += both
            supervised += [False] * len(shown_ids) + [True] * (len(both) - len(shown_ids))
        return self._expanded(ids, supervised, layouts, record.where)

    def _spans(self, record: Record) -> list[tuple[str, str]]:
        """What is shown and what is said then, in turn; joined it is the template's rendering."""
        for turn in record.turns:
            found = self._special_text.search((turn.reasoning or "") + turn.text)
            if found:
                raise InputError(
                    f"{record.where}: the {turn.role}'s text contains the special token {found[0]}; delete the record"
                )
            if self.family.empty_reasoning and (turn.reasoning or "").strip():
                raise InputError(
                    f"{record.where}: {self.family.name} is asked to answer without reasoning; leave it out"
                )
        if record.turns[0].role == "document":
            return self._document(record.turns[0])
        messages, spans, written = [], [], ""
        last = len(record.turns) - 1
        only_last = self.supervised_turns == "last" or record.turns[last].role != "assistant"
        for number, turn in enumerate(record.turns):
            earlier = turn.role == "assistant" and number < last and only_last
            if turn.role != "assistant" or earlier:  # shown
                messages.append(self._message(turn))
                continue
            prompt = self._render(messages, add_generation_prompt=True)
            messages.append(self._message(turn))
            whole = self._render(messages)
            unthought = prompt.removesuffix(self.family.empty_reasoning)  # as finished conversations have it
            said = messages[-1]["content"][0]["text"] + self.family.end_token
            answer = _answer(said, prompt, whole) or _answer(said, unthought, whole)
            if answer is None:
                raise InputError(f"{record.where}: {self._changed(whole, prompt, turn.text)}")
            if not prompt.startswith(written) or (spans and self.family.empty_reasoning):  # left out of earlier ones
                raise InputError(
                    f"{record.where}: the chat template rewrites earlier turns; add --supervised_turns last"
                )
            spans.append((prompt[len(written) :], answer))
            written = whole[: whole.index(answer, len(unthought)) + len(answer)]
        if record.turns[-1].role != "assistant":  # a prompt
            spans.append((self._render(messages, add_generation_prompt=True)[len(written) :], ""))
        return spans

    def _message(self, turn: Turn) -> dict:
        """As chat templates want it."""
        if turn.role == "assistant":
            return {"role": turn.role, "content": [{"type": "text", "text": self._thought(turn) + turn.text}]}
        parts = turn.parts
        if turn.role == "user" and not turn.text.strip():
            parts = (*(part for part in parts if isinstance(part, Media)), self.prompt)
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p.kind} for p in parts]
        return {"role": turn.role, "content": content}

    def _thought(self, turn: Turn) -> str:
        """What stands in front of an answer: the block in which Qwen's and ERNIE's templates write reasoning."""
        if self.family.empty_reasoning or (turn.reasoning is None and not self.empty_thinking):
            return ""
        return f"<think>\n{(turn.reasoning or '').strip(chr(10))}\n</think>\n\n"

    def _document(self, turn: Turn) -> list[tuple[str, str]]:
        placeholders = iter(self._placeholders([part.kind for part in turn.parts if isinstance(part, Media)]))
        spans = [("", part) if isinstance(part, str) else (next(placeholders), "") for part in turn.parts]
        return [*spans, ("", self.family.end_token)]

    def _placeholders(self, kinds: Sequence[str]) -> list[str]:
        """What the chat template writes for pictures and videos, of which some templates number the pictures."""
        before, after = self._render([{"role": "user", "content": [{"type": "text", "text": "\0"}]}]).split("\0")
        found, written = [], ""
        for number in range(1, len(kinds) + 1):
            shown = self._render([{"role": "user", "content": [{"type": kind} for kind in kinds[:number]]}])
            whole = shown[len(before) : len(shown) - len(after)]
            found.append(whole.removeprefix(written))
            written = whole
        return found

    def _layout(self, media: Media, record: Record) -> Layout:
        """The tokens of a picture or video, from its header."""
        if media.kind == "video":
            return self._video_layout(video_header(media, record.where), record.where)
        tokens = self.policy.visual_tokens(*image_size(media.load(record.where), record.place_of(media)))
        return Layout((self.processor.image_token_id,) * tokens)

    def _video_layout(self, header: Header, where: str) -> Layout:
        """Frames as pictures that follow each other in time.

        For the model a video is a picture with a time axis: the same vision tower, the same features in the place of
        tokens. So its tokens are image tokens here, and only positions (Qwen2.5-VL, arXiv:2502.13923, section 2.1.2)
        or time stamps between the frames (Qwen3-VL) tell them apart. No rank ever does what another does not.
        """
        if self.family.video is None:
            raise InputError(f"{where}: {self.family.name} is not trained on videos here; remove the record")
        image_id, per_frame = self.processor.image_token_id, self.policy.visual_tokens(*header.size)
        steps = len(header.frames) // self._frames_per_token
        if self.family.video != "timestamps":
            seconds = self._frames_per_token / header.sampled_fps
            interval = self.positions_per_second * seconds if self.family.video == "seconds" else 1.0
            return Layout((image_id,) * (steps * per_frame), interval)
        tokens: list[int] = []
        start, end = (self._ids(text) for text in self.family.vision_marks)
        for step in range(steps):
            frames = header.frames[step * self._frames_per_token : (step + 1) * self._frames_per_token]
            seconds = (frames[0] + frames[-1]) / 2 / header.fps
            tokens += [*self._ids(f"<{seconds:.1f} seconds>"), *start, *[image_id] * per_frame, *end]
        return Layout(tuple(tokens))

    def _expanded(self, ids: list[int], supervised: list[bool], layouts: list[Layout], where: str) -> Encoded:
        """Each picture's one token becomes those of its layout."""
        marks = {self.processor.image_token_id, getattr(self.processor, "video_token_id", None)}
        places = [at for at, token in enumerate(ids) if token in marks]
        if len(places) != len(layouts):
            raise InputError(
                f"{where}: the chat template writes {len(places)} pictures and videos, the record shows {len(layouts)}"
            )
        whole, flags, at = [], [], 0
        for place, layout in zip(places, layouts, strict=True):
            whole += [*ids[at:place], *layout.tokens]
            flags += [*supervised[at:place], *[False] * len(layout.tokens)]
            at = place + 1
        input_ids = np.array([*whole, *ids[at:]])
        types = (input_ids == self.processor.image_token_id).astype(np.int64)
        return Encoded(input_ids, types, np.array([*flags, *supervised[at:]], bool), [one.interval for one in layouts])

    def _shown(self, record: Record, encoded: Encoded, *, as_bytes: bool) -> dict[str, torch.Tensor]:
        """Patches and grids of all that a record shows; as numbers where a video is among it."""
        media = record.media
        if not media:
            return {}
        videos = any(one.kind == "video" for one in media)
        found = [
            self._frames(one, record.where) if one.kind == "video"
            else self.patches(one.load(record.where), record.place_of(one), as_bytes=as_bytes and not videos)
            for one in media
        ]  # fmt: skip
        shown = {key: joined([one[key] for one in found]) for key in ("pixel_values", "image_grid_thw")}
        if self.family.video == "seconds" and videos:
            shown["frame_intervals"] = torch.tensor(encoded.intervals)
        return shown

    def _frames(self, media: Media, where: str) -> dict[str, torch.Tensor]:
        """A video's patches by the checkpoint's own video processor; each frame is prepared as a picture is."""
        header = video_header(media, where)
        frames = np.stack([np.asarray(self.policy.apply(frame)) for frame in read_frames(media, header, where)])
        found = self.processor.video_processor(
            [torch.from_numpy(frames).permute(0, 3, 1, 2)],
            do_resize=False,
            do_sample_frames=False,
            return_tensors="pt",
        )
        grid = found["video_grid_thw"]
        if self.family.video == "timestamps":  # every step is a picture of its own
            grid = torch.tensor([[1, *grid[0, 1:].tolist()]] * int(grid[0, 0]))
        return {"pixel_values": found["pixel_values_videos"], "image_grid_thw": grid}

    def _render(self, messages: list[dict], **options: bool) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, **options)

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        tokens = self.processor.tokenizer.added_tokens_decoder.values()
        return re.compile("|".join(re.escape(token.content) for token in tokens if token.special))

    @property
    def _frames_per_token(self) -> int:
        return self.processor.video_processor.temporal_patch_size

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
        whole = self._render([*self._messages, {"role": "assistant", "content": [{"type": "text", "text": text}]}])
        prompt = self._prompt_text.removesuffix(self.family.empty_reasoning)
        if whole.startswith(prompt + text + self.family.end_token):
            return None
        return self._changed(whole, prompt, text)

    @staticmethod
    def _changed(whole: str, prompt: str, text: str) -> str:
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
        return self._render(self._messages, add_generation_prompt=True)

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


class Layout(NamedTuple):
    """What stands for a picture or a video among the tokens.

    Args:
        tokens: ids; all but time stamps and their marks are image tokens.
        interval: positions in time from one grid of patches to the next.
    """

    tokens: tuple[int, ...]
    interval: float = 1.0


class Encoded(NamedTuple):
    """A conversation's ids.

    Args:
        input_ids: (length,)
        token_types: (length,) 1 for image tokens.
        supervised: (length,)
        intervals: see `Layout`, of each picture and video.
    """

    input_ids: np.ndarray
    token_types: np.ndarray
    supervised: np.ndarray
    intervals: list[float]


def _answer(text: str, prompt: str, whole: str) -> str | None:
    """The part of `text` that the rendering `whole` has behind `prompt`; None if it is not there.

    A template for thinking models may have begun the block in the prompt already.

    >>> _answer("<think>\\n\\n</think>\\n\\nx", "assistant: <think>\\n", "assistant: <think>\\n\\n</think>\\n\\nx")
    '\\n</think>\\n\\nx'
    """
    if not whole.startswith(prompt):
        return None
    begun = next((at for at in range(len(text), 0, -1) if prompt.endswith(text[:at])), 0) if "<think>" in text else 0
    rest = whole[len(prompt) :]
    return next((text[at:] for at in (0, begun) if rest.startswith(text[at:])), None)


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts along the first dimension; patches as bytes get three planes each where one picture has colours."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].dtype == torch.uint8:
        planes = max(part.shape[1] for part in parts)
        parts = [part.expand(-1, planes, -1) for part in parts]
    return torch.cat(parts)


def _longer(values: np.ndarray, length: int, fill: list[int] | int) -> np.ndarray:
    """(n,) -> (n + length,), the new part filled."""
    result = np.empty(len(values) + length, values.dtype)
    result[:-length], result[-length:] = values, fill
    return result


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(values) for key, values in arrays.items()}


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
