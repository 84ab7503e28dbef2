"""New tokens: words that the tokenizer would take apart become one token each, with embeddings that are trained.

An adapter holds the rows of the new tokens (peft's `trainable_token_indices`); the embedding matrix stays frozen and
is never copied. Where the head is not tied to it, the head's rows are trained and kept too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.integrations import gather_params_ctx
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel

from latexocr.errors import InputError

logger = logging.getLogger(__name__)


def read_words(new_tokens: Sequence[str]) -> list[str]:
    """The words that `new_tokens` means: itself, or the lines of files that are named.

    Raises:
        InputError: a file that is no text, a blank word or one that comes twice.
    """
    words = []
    for word in new_tokens:
        try:
            is_file = Path(word).is_file()
            words += filter(None, Path(word).read_text(encoding="utf-8").splitlines()) if is_file else [word]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"new_tokens: {word[:100]}: no word and no file of words in UTF-8 ({error})") from error
    double = sorted({word for word in words if words.count(word) > 1 or not word.strip()})
    if double:
        raise InputError(f"new_tokens: {double[0]!r} is blank or comes twice")
    return words


def add_tokens(tokenizer: Any, words: Sequence[str]) -> dict[int, list[int]]:
    """Teach `tokenizer` the words.

    Returns:
        Ids of those that were no tokens yet -> ids of the tokens that they were made of.

    Raises:
        InputError: all of them are tokens already.
    """
    known = tokenizer.get_vocab()
    added = [word for word in words if word not in known]
    if words and not added:
        raise InputError(f"new_tokens: {words[0]!r} and all others are tokens already; leave them out")
    if len(added) < len(words):
        logger.info(f"new_tokens: {len(words) - len(added)} of {len(words)} are tokens already, left as they are")
    pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in added]
    tokenizer.add_tokens(added)
    return dict(zip(tokenizer.convert_tokens_to_ids(added), pieces, strict=True))


def add_rows(model: PreTrainedModel, num_tokens: int) -> None:
    """Room for `num_tokens` tokens in the embeddings and the head; many checkpoints have spare rows."""
    if num_tokens > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)


@torch.no_grad()
def make_room(model: PreTrainedModel, pieces: dict[int, list[int]]) -> None:
    """Rows for new tokens, each the mean of the tokens that its word was made of until now.

    Args:
        model: the base.
        pieces: see `add_tokens`.
    """
    if not pieces:
        return
    add_rows(model, max(pieces) + 1)
    matrices = {part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    for weight in matrices:  # one where they are tied
        with gather_params_ctx(weight):  # shards of ZeRO-3
            for token, parts in pieces.items():
                weight[token] = weight[parts].float().mean(0)


class FewTokens(TrainableTokensLayer):
    """peft's layer, which copies the whole matrix in every step and differentiates the copy, with a forward pass that
    looks at the rows of the new tokens alone. Made by `train_rows`, never constructed."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.merged or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        rows, base = self.trainable_tokens_delta[name], self.base_layer
        if self.ids.device != rows.device:
            self.ids = self.ids.to(rows.device)
        if isinstance(base, torch.nn.Linear):
            logits = linear(x, base.weight, base.bias)
            return logits.index_copy(-1, self.ids, linear(x, rows.to(x.dtype)).to(logits.dtype))
        place = torch.searchsorted(self.ids, x).clamp(max=len(self.ids) - 1)
        new = self.ids[place] == x
        y = base(x)
        return torch.where(new[..., None], embedding(place, rows).to(y.dtype), y)


def token_indices(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, list[int]]:
    """`trainable_token_indices` for peft, which itself ties a head that is tied to the embeddings."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return {name: list(ids) for name in (("embed_tokens",) if tied else ("embed_tokens", "lm_head"))}


def train_rows(model: torch.nn.Module) -> None:
    """Turn peft's layers of `model` into `FewTokens`; what is trained is float32, as adapters are."""
    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = FewTokens
            (name,) = module.token_indices
            module.ids = torch.tensor(module.token_indices[name])
            rows = module.trainable_tokens_delta[name]
            rows.data = rows.data.float()
