"""Answers that never came to an end: a model that repeats itself until it is stopped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Shortest stretch of repetition that counts, in tokens and in copies, and the longest block that is repeated. Of
# 79,023 real formulas 4 repeat as much.
MIN_TOKENS = 24
MIN_COPIES = 4
MAX_BLOCK = 40


def runs_away(prediction: Sequence[str], reference: Sequence[str]) -> bool:
    """Whether a block of tokens stands many times in a row, more often than the reference's own repetition.

    Why not only the token limit: nobody knows it of a file of predictions, and some loops end by themselves. Why the
    reference: a matrix of zeros repeats itself rightly.
    """
    repeated = longest_repetition(prediction)
    return repeated >= MIN_TOKENS and repeated > 2 * longest_repetition(reference)


def longest_repetition(tokens: Sequence[str]) -> int:
    """Tokens in the longest stretch that is at least four copies of one block of up to 40 tokens; 0 without any.

    >>> longest_repetition("a b c b c b c b c d".split())
    8
    """
    num_spare = len(tokens) - len(set(tokens))
    if num_spare < MIN_COPIES - 1:  # most formulas
        return 0
    numbers = {token: number for number, token in enumerate(set(tokens))}
    values = np.array([numbers[token] for token in tokens])
    longest = 0
    for block in range(1, min(MAX_BLOCK, len(tokens) // MIN_COPIES) + 1):
        breaks = np.flatnonzero(values[block:] != values[:-block])
        run = int(np.diff(breaks, prepend=-1, append=len(tokens) - block).max()) - 1
        if run >= (MIN_COPIES - 1) * block:
            longest = max(longest, run + block)
    return longest
