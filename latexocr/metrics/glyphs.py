r"""Comparing what two formulas print, from their glyph and rule boxes (`latexocr.render`).

Why: two texts are the same formula if they print the same, whatever the spelling; and a wrong one is judged by
how much of the print is right. No raster, no colours: a box knows its font, character, size and place exactly.

"Up to horizontal space" means: the same boxes in the order in which TeX prints them (left to right, above before
below), at the same heights, every rule over and under the same glyphs. Where they stand from left to right may
differ, and with it the length of rules and of arrows drawn in pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

# TeX rounds every move to 1/65536 point; sums of such errors stay far below this, real shifts far above.
TOLERANCE_PT = 0.01


def same_picture(a: Any, b: Any, *, horizontal_space: bool = True) -> bool:
    """Whether two renderings print the same glyphs and rules in the same places.

    Args:
        a: a `latexocr.render.Rendering`; one that did not render is the same as nothing.
        b: the other.
        horizontal_space: False: horizontal space may differ; see the head of this module.
    """
    if a.error or b.error or len(a.rules) != len(b.rules):
        return False
    if horizontal_space:
        return len(a.glyphs) == len(b.glyphs) and _placed_equally(a, b)
    return _placed_equally(a, b) or _in_order_equally(boxes(a), boxes(b))


def _placed_equally(a: Any, b: Any) -> bool:
    x = _Grid([item.x - _left(r) for r in (a, b) for item in (*r.glyphs, *r.rules)])
    y = _Grid([item.y - _bottom(r) for r in (a, b) for item in (*r.glyphs, *r.rules)])
    size = _Grid([side for r in (a, b) for rule in r.rules for side in (rule.width, rule.height)])

    def placed(r: Any) -> list[tuple]:
        left, bottom = _left(r), _bottom(r)
        glyphs = [(g.font, g.size, g.code, x[g.x - left], y[g.y - bottom]) for g in r.glyphs]
        rules = [("", size[k.width], size[k.height], x[k.x - left], y[k.y - bottom]) for k in r.rules]
        return sorted([*glyphs, *rules])

    return placed(a) == placed(b)


def _left(rendering: Any) -> float:
    return min((item.x for item in (*rendering.glyphs, *rendering.rules)), default=0.0)


def _bottom(rendering: Any) -> float:
    return min((item.y for item in (*rendering.glyphs, *rendering.rules)), default=0.0)


class _Grid(dict):
    """Numbers -> rank, equal for numbers that rounding alone may have set apart."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        rank, previous = 0, None
        for value in sorted(set(values)):
            if previous is not None and value - previous > TOLERANCE_PT:
                rank += 1
            self[value] = rank
            previous = value


class Box(NamedTuple):
    """A glyph or rule among its fellows, in the order of print; lengths in TeX points, y upwards."""

    font: str  # empty for a rule
    code: int
    size: float  # of a rule: its thickness
    x: float
    y: float
    width: float
    above: tuple[int, ...]  # of a rule: positions of the glyphs on it
    below: tuple[int, ...]  # ... and of those under it


def boxes(rendering: Any) -> list[Box]:
    """Glyphs and rules in one list in the order of print; a glyph repeated to make a long arrow is one box."""
    glyphs = _merge_runs(rendering.glyphs)
    spans = [_span(rule, rendering.rules, glyphs) for rule in rendering.rules]
    found = [(number, Box(g.font, g.code, g.size, g.x, g.y, g.width, (), ())) for number, g in enumerate(glyphs)]
    for rule, (above, below) in zip(rendering.rules, spans, strict=True):
        box = Box("", 0, rule.height, rule.x, rule.y, rule.width, above, below)
        found.append((_place(rule, above, below, glyphs), box))
    return [box for _, box in sorted(found, key=lambda pair: pair[0])]


def _merge_runs(glyphs: Sequence[Any]) -> list[Any]:
    """One glyph for each run of a glyph that overlaps itself, sideways (arrows) or upwards (tall brackets)."""
    merged: list[Any] = []
    for glyph in glyphs:
        last = merged[-1] if merged else None
        if last is not None and glyph[:3] == last[:3]:
            in_row = abs(glyph.y - last.y) <= TOLERANCE_PT and glyph.x < last.x + last.width - 0.1
            in_column = abs(glyph.x - last.x) <= TOLERANCE_PT and glyph.font.startswith("cmex")
            if in_row or in_column:
                merged[-1] = last._replace(width=max(last.width, glyph.x + glyph.width - last.x))
                continue
        merged.append(glyph)
    return merged


def _span(rule: Any, rules: Sequence[Any], glyphs: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which glyphs stand on a horizontal rule and which under it; a longer rule between shields them."""
    right = rule.x + rule.width
    above, below = [], []
    for number, glyph in enumerate(glyphs):
        if not rule.x - TOLERANCE_PT <= glyph.x + glyph.width / 2 <= right + TOLERANCE_PT:
            continue
        low, high = sorted((rule.y, glyph.y))
        if any(
            low + TOLERANCE_PT < other.y < high - TOLERANCE_PT
            and other.width > rule.width + TOLERANCE_PT
            and other.x <= glyph.x + glyph.width / 2 <= other.x + other.width
            for other in rules
        ):
            continue
        (above if glyph.y > rule.y else below).append(number)
    return tuple(above), tuple(below)


def _place(rule: Any, above: tuple[int, ...], below: tuple[int, ...], glyphs: Sequence[Any]) -> float:
    """Where in the order of print a rule stands: TeX sets what is above it first, then the rule, then the rest."""
    if below:
        return below[0] - 0.5
    if above:
        return above[-1] + 0.5
    level = [n for n, g in enumerate(glyphs) if g.x < rule.x and rule.y - 10 <= g.y <= rule.y + rule.height + 10]
    return (level[-1] if level else -1) + 0.5


def _in_order_equally(a: list[Box], b: list[Box]) -> bool:
    if len(a) != len(b):
        return False
    for one, other in zip(a, b, strict=True):
        if one[:2] != other[:2] or one.above != other.above or one.below != other.below:
            return False
        if abs(one.size - other.size) > TOLERANCE_PT:
            return False
        if abs((one.y - a[0].y) - (other.y - b[0].y)) > TOLERANCE_PT:
            return False
        is_shape = not one.font and not (one.above or one.below)
        if is_shape and abs(one.width - other.width) > TOLERANCE_PT:
            return False
    return True


def glyph_f1(prediction: Any, reference: Any) -> float:
    """How much of the reference's print the prediction has, and the other way round: 0 to 1."""
    if same_picture(prediction, reference, horizontal_space=False):
        return 1.0
    if prediction.error or reference.error:
        return 0.0
    ours, theirs = (Counter((g.font, g.size, g.code) for g in r.glyphs) for r in (prediction, reference))
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / (total + 1)
