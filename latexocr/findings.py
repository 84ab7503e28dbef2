"""The checks of `latexocr doctor`: facts about rows in, cases of what is wrong out.

Each check is a function that yields (name, case); `CHECKS` says what a name means, how bad it is, and the way out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from latexocr.images import ImagePolicy
from latexocr.likeness import Look, alike, near_pairs
from latexocr.metrics.canonical import is_formula, normalize
from latexocr.metrics.tokens import tokenize

Severity = Literal["problem", "warning", "note"]

FAR = 6.0  # robust standard deviations from the median
FAR_AT_LEAST = math.log(2)  # where nearly all rows are alike, a factor below two is nothing yet
FEW = 0.02  # share of rows that may be outliers: more of them are a part of the distribution
FEWEST_ROWS = 20  # a median of fewer says nothing
COMMON = 1000  # rows from which on a command that stands in only one of them is worth a look
STRETCHED = 2.0  # change of the aspect ratio
SHRUNK, ENLARGED = 0.5, 4.0  # scale


class Check(NamedTuple):
    """What a finding means; `side`: whose rows are counted, where it is not all of them."""

    severity: Severity
    title: str
    advice: str
    side: str | None = None


CHECKS = {
    "unreadable_pictures": Check("problem", "pictures that cannot be read", "mend the files or remove the rows"),
    "blank_pictures": Check("problem", "blank pictures", "remove the rows: they teach a model to invent"),
    "blank_texts": Check("problem", "blank texts", "write the texts or remove the rows"),
    "two_texts": Check("problem", "one picture, two texts", "keep the right one: nobody can learn both"),
    "leaked_texts": Check(
        "problem", "validation formulas that stand in the training data",
        "split by formula, as csv2json does; until then validation scores are too good", "val",
    ),
    "leaked_pictures": Check(
        "problem", "validation pictures that stand in the training data", "remove one side's", "val"
    ),
    "nearly_two_texts": Check("warning", "nearly the same picture, two texts", "look at both: one text may be wrong"),
    "nearly_leaked_pictures": Check(
        "warning", "validation pictures that nearly stand in the training data", "look at them; remove one side's",
        "val",
    ),
    "unparsed_texts": Check("warning", "texts that are no well-formed LaTeX", "mend braces, \\left, \\begin"),
    "refused_texts": Check("warning", "texts that LaTeX refuses", "mend them or remove the rows"),
    "misshapen": Check(
        "warning", "pictures whose shape does not fit their text", "look at them: the text may be another picture's"
    ),
    "stretched": Check("warning", "pictures that the image policy stretches", "train with --image_mode fit"),
    "shrunk": Check("warning", "pictures that the image policy shrinks below half", "raise --max_visual_tokens"),
    "spellings": Check(
        "warning", "formulas that are spelled in several ways", "choose one: normalize(text, level=1) is one"
    ),
    "spacings": Check(
        "note", "formulas with several spacings, sizes or styles", "choose one where the picture does not show it"
    ),
    "same_print": Check("note", "other formulas that print the very same", "choose one spelling"),
    "enlarged": Check("note", "pictures that the image policy enlarges 4 times or more", "lower --min_visual_tokens"),
    "duplicates": Check("note", "the same picture with the same text", "harmless; such a row counts more in training"),
    "near_duplicates": Check("note", "nearly the same picture with the same text", "harmless, likewise"),
    "rare_commands": Check("note", "commands that stand in one row only", "look for typing errors"),
    "long_texts": Check("note", "texts of unusual length", "look at them; the longest decides about memory"),
    "odd_sizes": Check("note", "pictures of unusual size", "look at them: scanned pages, thumbnails"),
}  # fmt: skip


@dataclass(slots=True)
class Row:
    """What is kept of a row: facts, not pixels.

    Args:
        where: how a person finds it.
        text: empty where there is none.
        side: "train" or "val".
        size: width and height in pixels; None where the picture cannot be read.
        problem: why it cannot be read.
        look: see `latexocr.likeness`; its box is None on a blank picture.
    """

    where: str
    text: str
    side: str
    size: tuple[int, int] | None = None
    problem: str | None = None
    look: Look | None = None


class Case(NamedTuple):
    """One occurrence of what a check looks for: the rows concerned, by number, and what is to be seen."""

    rows: list[int]
    why: str = ""


@dataclass
class Facts:
    """What the checks look at.

    Args:
        rows: of all sides, training rows first.
        policy: how pictures become what the model sees.
        renderings: text -> `latexocr.render.Rendering`; empty where there is no LaTeX.
        load: row numbers -> their pictures, flattened, in any order.
    """

    rows: list[Row]
    policy: ImagePolicy
    renderings: dict[str, Any]
    load: Callable[[set[int]], Iterator[tuple[int, Image.Image]]]
    _canonical: dict[int, list[str]] = field(default_factory=dict)

    def canonical(self, level: int) -> list[str]:
        """Each row's text in canonical form."""
        if level not in self._canonical:
            known = {text: normalize(text, level=level) for text in {row.text for row in self.rows}}
            self._canonical[level] = [known[row.text] for row in self.rows]
        return self._canonical[level]

    @cached_property
    def texted(self) -> list[int]:
        """Numbers of the rows that have a text."""
        return [number for number, row in enumerate(self.rows) if row.text.strip()]

    @cached_property
    def inked(self) -> list[int]:
        """Numbers of the rows whose picture shows something."""
        return [number for number, row in enumerate(self.rows) if row.look and row.look.box]


Cases = Iterator[tuple[str, Case]]


def find(facts: Facts) -> dict[str, list[Case]]:
    """All cases of all checks, worst check first; checks without a case are left out."""
    found = defaultdict(list)
    for check in (pictures, treatments, texts, spellings, likeness, leaked_texts, shapes, sizes, rare_commands):
        for name, case in check(facts):
            found[name].append(case)
    return {name: found[name] for name in CHECKS if name in found}


def pictures(facts: Facts) -> Cases:
    """Unreadable and blank ones."""
    for number, row in enumerate(facts.rows):
        if row.problem:
            yield "unreadable_pictures", Case([number], row.problem)
        elif row.look.box is None:
            yield "blank_pictures", Case([number], f"{row.size[0]}x{row.size[1]} pixels without ink")


def treatments(facts: Facts) -> Cases:
    """Pictures that the image policy changes so much that symbols suffer."""
    for number, row in enumerate(facts.rows):
        if row.size is None:
            continue
        (width, height), content = row.size, facts.policy.layout(*row.size)[:2]
        across, along = content[0] / width, content[1] / height
        scale, why = math.sqrt(across * along), f"{width}x{height} -> {content[0]}x{content[1]} pixels"
        if max(across / along, along / across) > STRETCHED:
            yield "stretched", Case([number], why)
        if scale < SHRUNK:
            yield "shrunk", Case([number], why)
        if scale > ENLARGED:
            yield "enlarged", Case([number], why)


def texts(facts: Facts) -> Cases:
    """Blank, malformed, and refused by LaTeX."""
    for number, row in enumerate(facts.rows):
        rendering = facts.renderings.get(row.text)
        if not row.text.strip():
            yield "blank_texts", Case([number])
        elif not is_formula(row.text):
            yield "unparsed_texts", Case([number])
        elif rendering and rendering.error:
            yield "refused_texts", Case([number], rendering.error)


def spellings(facts: Facts) -> Cases:
    """One formula, several texts; each looser sense of "one" is reported only where the stricter ones do not hold."""
    keys = [facts.canonical(level) for level in (0, 1, 2)]
    for name, loose, strict in (("spellings", keys[1], keys[0]), ("spacings", keys[2], keys[1])):
        for rows in _groups(facts.texted, loose.__getitem__):
            if len({strict[row] for row in rows}) > 1:
                yield name, _variants(rows, strict)
    rendered = [row for row in facts.texted if _prints(facts.renderings.get(facts.rows[row].text))]
    prints = {row: _print(facts.renderings[facts.rows[row].text]) for row in rendered}
    for rows in _groups(rendered, prints.__getitem__):
        if len({keys[2][row] for row in rows}) > 1:
            yield "same_print", _variants(rows, keys[2])


def _prints(rendering: Any) -> bool:
    return rendering is not None and rendering.error is None and bool(rendering.glyphs)


def _print(rendering: Any) -> Hashable:
    """Equal for renderings of the same glyphs and rules in the same places, to a tenth of a point."""
    left, top = (
        min(values) for values in zip(*((one.x, one.y) for one in (*rendering.glyphs, *rendering.rules)), strict=True)
    )
    glyphs = sorted(
        (one.font, one.size, one.code, round(one.x - left, 1), round(one.y - top, 1)) for one in rendering.glyphs
    )
    rules = sorted(
        tuple(round(value, 1) for value in (one.x - left, one.y - top, one.width, one.height))
        for one in rendering.rules
    )
    return tuple(glyphs), tuple(rules)


def _variants(rows: list[int], texts: list[str]) -> Case:
    """A case whose first rows show the different texts, the commonest first."""
    groups = sorted(_grouped(rows, texts.__getitem__).values(), key=len, reverse=True)
    return Case([group[0] for group in groups] + [row for group in groups for row in group[1:]])


def likeness(facts: Facts) -> Cases:
    """The same picture twice, and nearly the same: harmless with one text, not with two, and not in validation."""
    by_digest = _grouped(facts.inked, lambda row: facts.rows[row].look.digest)
    for rows in by_digest.values():
        if len(rows) > 1:
            yield from _same_picture(facts, rows, "two_texts", "leaked_pictures", "duplicates")
    firsts = [rows[0] for rows in by_digest.values()]
    for cluster in _nearly_alike(facts, firsts):
        rows = sorted(row for first in cluster for row in by_digest[facts.rows[first].look.digest])
        yield from _same_picture(facts, rows, "nearly_two_texts", "nearly_leaked_pictures", "near_duplicates")


def _same_picture(facts: Facts, rows: list[int], two_texts: str, leaked: str, duplicates: str) -> Cases:
    one_text = len({facts.canonical(2)[row] for row in rows}) == 1
    if not one_text:
        yield two_texts, _variants(rows, facts.canonical(2))
    if len({facts.rows[row].side for row in rows}) > 1:
        yield leaked, Case(rows[::-1])  # the validation rows first
    elif one_text:
        yield duplicates, Case(rows)


def _nearly_alike(facts: Facts, firsts: list[int]) -> list[set[int]]:
    """Rows whose pictures are nearly the same, in chains; only the pictures in question are loaded again.

    Two that are in one chain already are not compared: a thousand copies of a picture are half a million pairs.
    """
    pairs = [(firsts[a], firsts[b]) for a, b in near_pairs([facts.rows[row].look for row in firsts])]
    loaded = dict(facts.load({row for pair in pairs for row in pair}))
    cluster_of: dict[int, set[int]] = {row: {row} for row in loaded}
    for row, other in pairs:
        ours, theirs = cluster_of[row], cluster_of[other]
        if ours is not theirs and alike(loaded[row], loaded[other]):
            merged = ours | theirs
            cluster_of |= dict.fromkeys(merged, merged)
    return [one for one in {id(cluster): cluster for cluster in cluster_of.values()}.values() if len(one) > 1]


def leaked_texts(facts: Facts) -> Cases:
    """Validation formulas that were trained on, whatever their spelling."""
    for rows in _groups(facts.texted, facts.canonical(1).__getitem__):
        by_side = _grouped(rows, lambda row: facts.rows[row].side)
        if len(by_side) > 1:
            yield "leaked_texts", Case([*by_side["val"], *by_side["train"][:1]])


def shapes(facts: Facts) -> Cases:
    """Pictures much wider or narrower than what their text prints."""
    rows = [row for row in facts.inked if _prints(facts.renderings.get(facts.rows[row].text))]
    ratios = []
    for row in rows:
        left, top, right, bottom = facts.rows[row].look.box
        width, height = _extent(facts.renderings[facts.rows[row].text])
        ratios.append(math.log((right - left) / (bottom - top) * height / width))
    for place in _far_out(ratios):
        factor = math.exp(ratios[place] - float(np.median(ratios)))
        wide = f"{factor:.1f} times as wide" if factor > 1 else f"{1 / factor:.1f} times as high"
        yield "misshapen", Case([rows[place]], f"{wide} as what its text prints")


def _extent(rendering: Any) -> tuple[float, float]:
    """Width and height in points, of at least one letter."""
    ends = [(one.x, one.x + one.width, one.y) for one in (*rendering.glyphs, *rendering.rules)]
    left, right, heights = zip(*ends, strict=True)
    letter = max((glyph.size for glyph in rendering.glyphs), default=10.0)
    return max(right) - min(left) + 0.2 * letter, max(heights) - min(heights) + 0.8 * letter


def sizes(facts: Facts) -> Cases:
    """Texts and pictures far from all others in length and size."""
    lengths = [math.log(len(tokenize(facts.rows[row].text))) for row in facts.texted]
    for place in _far_out(lengths):
        yield "long_texts", Case([facts.texted[place]], f"{math.exp(lengths[place]):.0f} tokens")
    sized = [number for number, row in enumerate(facts.rows) if row.size]
    odd = {
        sized[place]: None
        for side in (0, 1)
        for place in _far_out([math.log(facts.rows[row].size[side]) for row in sized])
    }
    for row in odd:
        yield "odd_sizes", Case([row], "{}x{} pixels".format(*facts.rows[row].size))


def _far_out(values: list[float]) -> list[int]:
    """Places of the outliers by median absolute deviation, the farthest first."""
    if len(values) < FEWEST_ROWS:
        return []
    distances = np.abs(np.array(values) - np.median(values))
    spread = 1.4826 * float(np.median(distances))  # a standard deviation if normal
    limit = max(FAR * spread, FAR_AT_LEAST, 1.5 * float(np.quantile(distances, 1 - FEW)))
    return [int(place) for place in np.argsort(-distances) if distances[place] > limit]


def rare_commands(facts: Facts) -> Cases:
    """Commands of a single row, where there are rows enough to see them twice."""
    if len(facts.texted) < COMMON:
        return
    rows_of = defaultdict(list)
    for row in facts.texted:
        for token in {token for token in tokenize(facts.rows[row].text) if token[0] == "\\" and token[1:].isalpha()}:
            rows_of[token].append(row)
    for token, rows in sorted(rows_of.items()):
        if len(rows) == 1:
            yield "rare_commands", Case(rows, token)


def _grouped(rows: Iterable[int], key: Callable[[int], Hashable]) -> dict[Hashable, list[int]]:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def _groups(rows: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Rows of equal key, where there are several; the largest first."""
    return sorted((group for group in _grouped(rows, key).values() if len(group) > 1), key=len, reverse=True)
