"""Exceptions whose message is for the user, not for a programmer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What was given cannot be used; the message names the file or row, what is needed and the way out.

    The command line prints it as a single line and exits with status 2; Python callers can catch it apart from
    programming errors. It is a `ValueError`, so code that knows nothing of this package handles it sensibly.
    """


class MergeMismatch(RuntimeError):
    """A merged model does not answer as base + adapter; what was written is removed again."""


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`; did you mean 'lora_r'?` for a name close to a known one, else an empty string.

    >>> nearest("lora_rank", ["lora_r", "output_dir"])
    "; did you mean 'lora_r'?"
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {found[0]!r}?" if found else ""
