"""The loss: mean over supervised tokens of the effective batch, without ever holding all logits.

Why: a vocabulary of 151,936 entries makes the logits of a batch and their gradient larger than all its activations.
The head is frozen, so the gradient of its input can be computed chunk by chunk in the forward pass, and each chunk's
logits are overwritten by their own gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from latexocr.preprocess import IGNORED
from latexocr.quantization import whole_beside

CHUNK_ELEMENTS = 2**26  # logits held at a time: 128 MiB in bfloat16


def supervised_targets(labels: torch.Tensor, logits_to_keep: torch.Tensor) -> torch.Tensor:
    """(batch * columns,) the token that each kept column predicts, `IGNORED` where it is not supervised."""
    return labels[:, logits_to_keep + 1].flatten()


def supervised_loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int
) -> torch.Tensor:
    """Sum of the token losses over the number of supervised tokens in the whole effective batch.

    Args:
        logits: (batch, columns, vocabulary).
        targets: (batch * columns,), see `supervised_targets`.
        num_items_in_batch: supervised tokens of all micro-batches and ranks of this optimiser step.
    """
    total = cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
    return total / torch.as_tensor(num_items_in_batch).clamp(min=1)  # a rank's share of a last step can be empty


def router_loss(
    outputs: Any, config: Any, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int
) -> torch.Tensor:
    """What a mixture of experts adds for unequal use of its experts.

    It is a property of a whole micro-batch: each counts by its share of the supervised tokens, so that the weight
    beside the token loss is the same for any split (the value is not: Switch Transformer, arXiv:2101.03961, (4)-(6)).

    Args:
        outputs: of the model, with `aux_loss` (it gives one if its configuration says `output_router_logits`).
        config: of the model; its text part has the weight.
        targets: (batch * columns,), see `supervised_targets`.
        num_items_in_batch: as in `supervised_loss`.
    """
    share = (targets != IGNORED).sum() / torch.as_tensor(num_items_in_batch).clamp(min=1)
    return config.get_text_config().router_aux_loss_coef * share * outputs.aux_loss


def cross_entropy_in_place(
    logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor, ignored: int = IGNORED
) -> torch.Tensor:
    """(rows,) losses in float32; `logits` (rows, vocabulary) become the gradient of `scale` times their sum."""
    if logits.is_cuda and logits.dtype != torch.float32:
        from latexocr import kernels

        return kernels.cross_entropy_in_place(logits, targets, scale, ignored)
    log_probs = logits.float().log_softmax(-1)
    supervised = targets != ignored
    at = targets.where(supervised, 0)[:, None]
    losses = -log_probs.gather(1, at)[:, 0] * supervised
    grads = log_probs.exp().scatter_add(1, at, torch.full_like(at, -1, dtype=log_probs.dtype))
    logits.copy_(grads * (supervised * scale)[:, None])
    return losses


class _HeadLoss(torch.autograd.Function):
    """The sum of token losses times `scale`, from what goes into a frozen head."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: LossHead, targets: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        hidden = hidden.to(head.computes_in)
        rows = max(1, CHUNK_ELEMENTS // head.out_features)
        grad, total = torch.empty_like(hidden), torch.zeros((), device=hidden.device)
        for chunk, grad_chunk in zip(hidden.split(rows), grad.split(rows), strict=True):
            logits = hidden.new_empty(len(chunk), head.out_features)
            for part, weight in head.slices():
                torch.mm(chunk, weight.T, out=logits[:, part])
            here, targets = targets[: len(chunk)], targets[len(chunk) :]
            total += cross_entropy_in_place(logits, here, scale).sum()
            if ctx.needs_input_grad[0]:
                grad_chunk.copy_(sum((logits[:, part] @ weight).float() for part, weight in head.slices()))
        ctx.save_for_backward(grad)
        return total * scale

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple:
        return ctx.saved_tensors[0] * grad_loss, None, None, None


def head_loss(
    hidden: torch.Tensor, head: LossHead, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int
) -> torch.Tensor:
    """`supervised_loss` from the input of a frozen head without bias, which gets no gradient.

    Args:
        hidden: (batch, columns, width).
        head: see `detach_head`.
        targets: (batch * columns,), see `supervised_targets`.
        num_items_in_batch: as in `supervised_loss`.
    """
    scale = 1.0 / torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=hidden.device).clamp(min=1)
    return _HeadLoss.apply(hidden.flatten(0, 1), head, targets, scale)


class LossHead:
    """A frozen `lm_head` that hands its input on in training, where the loss is computed by `head_loss`.

    Made by `detach_head`, never constructed.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.training else super().forward(hidden)

    @property
    def computes_in(self) -> torch.dtype:
        """The type of its products."""
        return self.weight.dtype if self.weight.is_floating_point() else self.compute_dtype

    def slices(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Places in the vocabulary, and the weights (tokens, width) there: all at once, or made whole one by one."""
        if self.weight.is_floating_point():
            yield slice(0, self.out_features), self.weight
            return
        rows = CHUNK_ELEMENTS // self.in_features
        for start in range(0, self.out_features, rows):
            part = slice(start, min(start + rows, self.out_features))
            nothing = torch.empty(part.stop - start, 0, dtype=self.computes_in, device=self.weight.device)
            yield part, whole_beside(self, nothing, rows=part)


@cache
def _loss_head(kind: type) -> type:
    return type(f"Loss{kind.__name__}", (LossHead, kind), {"__module__": __name__})


def detach_head(model: Any) -> LossHead | None:
    """Turn the output layer of `model` into a `LossHead`; None where that is not possible."""
    head = model.get_output_embeddings()
    if isinstance(head, LossHead):  # a second trainer on the same model
        return head
    usual = type(head) is torch.nn.Linear or type(head).__name__ == "Linear4bit"  # bitsandbytes may not be there
    if not usual or head.bias is not None or head.weight.requires_grad:
        return None
    head.__class__ = _loss_head(type(head))
    return head
