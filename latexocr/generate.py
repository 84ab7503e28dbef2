"""Batched generation, the same for validation during training and for inference afterwards.

Every answer carries its confidence: the probability that the model gives to this whole answer, the product over its
tokens and the end token, at temperature 1. It claims how often such answers are right, so that `calibration_error`
(`latexocr.metrics.calibration`) can hold it against exact match; a mean over tokens would claim nothing. `LatexOCR`
raises it to the power that training's validation has found (`confidence_exponent` in latexocr.json).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress, takewhile
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

from latexocr.decoding import Answer, Decoder, Normalise
from latexocr.formats import Record
from latexocr.modeling import activation_dtype, inner_model
from latexocr.preprocess import Preprocessor

THOUGHT = "<think>", "</think>"  # what stands between is reasoning, no answer


@dataclass(frozen=True)
class Generated:
    """One answer.

    Args:
        text: LaTeX.
        num_tokens: its length with the end token.
        finished: whether it ended by itself (False: a runaway).
        confidence: the model's probability of this whole answer, from `LatexOCR` to a fitted power; 0 for one that
            did not end, of which only the beginning is known.
        warning: why it should not be relied upon, for people; None where nothing is known against it.
    """

    text: str
    num_tokens: int
    finished: bool
    confidence: float
    warning: str | None = None

    def as_row(self, record: Record) -> dict[str, Any]:
        """A line of predictions.jsonl: the answer to this record's image."""
        return {
            "id": record.id,
            **({} if record.image_path is None else {"image_path": str(record.image_path)}),
            **({} if record.source is None else {"source": record.source}),
            "reference": record.text,
            "prediction": self.text,
            "num_tokens": self.num_tokens,
            "finished": self.finished,
            "confidence": self.rounded_confidence,
        }

    @property
    def rounded_confidence(self) -> float:
        """Four digits, which is more than it is worth, so that files can be read."""
        return float(f"{self.confidence:.4g}")


def generate(
    model: Any,
    batches: Sequence[dict[str, torch.Tensor]],
    preprocessor: Preprocessor,
    config: GenerationConfig,
    *,
    decoder: Decoder | None = None,
    **options: Any,
) -> list[Generated]:
    """Generate one answer a row of `batches` (prompts, each batch collated).

    Args:
        model: the model or the adapter around it, in evaluation mode.
        batches: tensors of shape (rows, length) and the images' patches; moved to the model's device.
        preprocessor: gives tokenizer and end token.
        config: greedy or sampling settings with `max_new_tokens`.
        decoder: for the same model and settings, from `decoder_for`: decodes all batches at once, and fast. Without
            it `model.generate` decodes one after the other.
        options: passed on to `model.generate` (streamer, synced_gpus).
    """
    tokenizer = preprocessor.processor.tokenizer
    ends = {config.eos_token_id} if isinstance(config.eos_token_id, int) else set(config.eos_token_id)
    normalise = partial(preprocessor.normalise, dtype=activation_dtype(inner_model(model)))
    rows = (
        decoder(batches, normalise)
        if decoder
        else [row for batch in batches for row in _stock(model, batch, normalise, config, options)]
    )
    sizes = ((len(batch["input_ids"]), batch.get("num_samples")) for batch in batches)
    asked = [number is None or at < number for size, number in sizes for at in range(size)]  # not the collator's blank
    skipped = _unprinted(tokenizer)
    answers = []
    for row, loss in compress(rows, asked):
        ids = list(takewhile(lambda token: token not in ends, row))
        finished = len(ids) < len(row)
        # clean_up_tokenization_spaces would eat the spaces before punctuation that LaTeX_OCR's texts have
        text = tokenizer.decode([token for token in ids if token not in skipped], clean_up_tokenization_spaces=False)
        text = "".join(answer_pieces([text], begun=preprocessor.begins_thought))
        confidence = math.exp(-loss) if finished and not math.isnan(loss) else 0.0
        answers.append(Generated(text, len(ids) + finished, finished, confidence))
    return answers


def answer_pieces(pieces: Iterable[str], *, begun: bool) -> Iterator[str]:
    """Leave a thought in front of an answer out, and the blanks behind it; one that never ends is all that there is.

    Args:
        pieces: of a text, as they come or as one. What may still be a thought is held back.
        begun: whether the prompt has begun the thought already.

    >>> list(answer_pieces(["<thi", "nk>hm</", "think>", "\\n", " x ", "+ y"], begun=False))
    ['x ', '+ y']
    """
    opening, closing = THOUGHT
    pieces, held = (piece for piece in pieces), ""  # a generator ends for good, a streamer would wait for more
    for piece in pieces:
        held += piece
        start = held.lstrip()
        if not begun and start[: len(opening)] != opening[: len(start)]:
            break
        if closing in held:
            pieces, held = chain([held.partition(closing)[2]], pieces), ""
            while not held and (piece := next(pieces, None)) is not None:
                held = piece.lstrip()
            break
    yield from filter(None, chain([held], pieces))


class PieceStreamer(TextIteratorStreamer):
    """Text as `model.generate` makes it, with the marks of a thought."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, clean_up_tokenization_spaces=False)
        self._skipped = torch.tensor(sorted(_unprinted(tokenizer)))

    def put(self, value: torch.Tensor) -> None:
        super().put(value[~torch.isin(value, self._skipped)])


def _unprinted(tokenizer: Any) -> set[int]:
    """Special tokens. Some tokenizers count the marks of a thought among them."""
    tokens = tokenizer.added_tokens_decoder
    return {index for index, token in tokens.items() if token.special and token.content not in THOUGHT}


@torch.no_grad()
def _stock(
    model: Any, batch: dict[str, torch.Tensor], normalise: Normalise, config: GenerationConfig, options: dict[str, Any]
) -> list[Answer]:
    length = batch["input_ids"].shape[1]
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "num_samples"}
    inputs["pixel_values"] = normalise(inputs["pixel_values"]).to(activation_dtype(inner_model(model)))
    meter = _LossMeter()
    processors = LogitsProcessorList([meter])
    tokens = model.generate(**inputs, generation_config=config, logits_processor=processors, **options)[:, length:]
    losses = meter.losses(tokens)
    ends = torch.isin(tokens, torch.tensor(config.eos_token_id, device=tokens.device))
    losses = losses.masked_fill(ends.cumsum(1) - ends.int() > 0, 0)  # what follows the first end is padding
    return [Answer(*row) for row in zip(tokens.tolist(), losses.sum(1).tolist(), strict=True)]


class _LossMeter(LogitsProcessor):
    """-ln p of every generated token. `output_logits` would keep the whole vocabulary of every step: gigabytes.

    It comes before temperature and the like, and learns at each step which token the step before it took.
    """

    def __init__(self) -> None:
        self._logits: torch.Tensor | None = None
        self._losses: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._take(input_ids[:, -1])
        self._logits = scores
        return scores

    def losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """(rows, tokens) float64, for the tokens (rows, tokens) that were generated."""
        self._take(tokens[:, -1])
        return torch.stack(self._losses, dim=1).double()

    def _take(self, tokens: torch.Tensor) -> None:
        if self._logits is not None:
            self._losses.append(cross_entropy(self._logits, tokens, reduction="none"))
