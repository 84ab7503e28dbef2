r"""What a formula is made of, so that scores can be told by length and by structure."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

# A slice's word: the tokens that put a formula into it.
STRUCTURES = {
    "fraction": re.compile(r"\\([dtc]?frac|[dt]?binom|over|atop|choose|genfrac)"),
    "root": re.compile(r"\\(sqrt|root)"),
    "matrix": re.compile(r"\\begin\{(array|[pbBvV]?matrix|smallmatrix)\*?\}"),
    "lines": re.compile(r"\\begin\{(d?cases|align(ed|at|edat)?|split|gather(ed)?|eqnarray|multline)\*?\}"),
}
PLAIN = "none of these"
LENGTHS = (10, 20, 40, 80, 160)
MAX_SOURCES = 20
RARE = "all others"
DEEPEST = 3  # script depths from here on are one slice


def describe(tokens: Sequence[str]) -> dict[str, Any]:
    r"""Length in tokens, structure and depth of scripts of one formula in canonical form.

    >>> describe(r"\frac { 1 } { x _ { i ^ { 2 } } }".split())
    {'length': 15, 'structure': ['fraction'], 'script_depth': 2}
    """
    structure = [word for word, sign in STRUCTURES.items() if any(map(sign.fullmatch, tokens))]
    return {"length": len(tokens), "structure": structure or [PLAIN], "script_depth": script_depth(tokens)}


def script_depth(tokens: Sequence[str]) -> int:
    """How deep sub- and superscripts are nested: 0 for `x`, 1 for `x_i`, 2 for `x_{i^2}`."""
    deepest = depth = 0
    is_script: list[bool] = []  # of each open brace
    for before, token in pairwise(["", *tokens]):
        if token == "{":
            is_script.append(before in ("_", "^"))
            depth += is_script[-1]
        elif token == "}" and is_script:
            depth -= is_script.pop()
        deepest = max(deepest, depth + (token in ("_", "^")))
    return deepest


def slices_of(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The slices that a row with the keys of `describe` is in, as (kind, slice)."""
    upper = next((upper for upper in LENGTHS if row["length"] <= upper), None)
    lower = max((other + 1 for other in LENGTHS if other < row["length"]), default=0)
    yield "length", f"{lower}-{upper}" if upper else f"{lower}+"
    for word in row["structure"]:
        yield "structure", word
    depth = row["script_depth"]
    yield "script_depth", f"{DEEPEST}+" if depth >= DEEPEST else str(depth)
    if row.get("source") is not None:
        yield "source", str(row["source"])


def members(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[int]]:
    """Which rows are in which slice, slices in the order to show them; rare sources are one slice together."""
    sources = Counter(str(row["source"]) for row in rows if row.get("source") is not None)
    common = {source for source, _ in sources.most_common(MAX_SOURCES)}
    found = defaultdict(list)
    for number, row in enumerate(rows):
        rare = row.get("source") is not None and str(row["source"]) not in common
        for key in slices_of({**row, "source": RARE} if rare else row):
            found[key].append(number)
    kinds = ["length", "structure", "script_depth", "source"]
    words = [*STRUCTURES, PLAIN]

    def place(key: tuple[str, str]) -> tuple[int, int, str]:
        by, name = key
        number = int(re.match(r"\d*", name)[0] or 0) if by == "length" else words.index(name) if name in words else 0
        return kinds.index(by), number, name

    return dict(sorted(found.items(), key=lambda item: place(item[0])))
