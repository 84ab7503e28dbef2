r"""Comparing what two formulas print, from their glyph and rule boxes (`latexocr.render`).

Why: two texts are the same formula if they print the same, whatever the spelling; and a wrong one is judged by
how much of the print is right. No raster, no colours: a box knows its font, character, size and place exactly.

"Up to horizontal space" means: the same boxes in the order in which TeX prints them (left to right, above before
below), at the same heights, every rule over and under the same glyphs. Where they stand from left to right may
differ, and with it the length of rules and of arrows drawn in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# TeX rounds every move to 1/65536 point; sums of such errors stay far below this, real shifts far above.
TOLERANCE_PT = 0.01


def same_picture(a: Any, b: Any, *, horizontal_space: bool = True) -> bool:
    """Whether two renderings print the same glyphs and rules in the same places.

    Args:
        a: a `latexocr.render.Rendering`; one that did not render is the same as nothing.
        b: the other.
        horizontal_space: False: horizontal space may differ; see the head of this module.
    """
    if a.error or b.error:
        return False
    counts_agree = len(a.glyphs) == len(b.glyphs) and len(a.rules) == len(b.rules)
    if counts_agree and _placed_equally(a, b):
        return True
    return not horizontal_space and _in_order_equally(boxes(a), boxes(b))


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
    size: float  # of a rule: its thickness
    code: int
    x: float
    y: float
    width: float
    above: tuple[int, ...]  # of a rule: positions of the glyphs on it
    below: tuple[int, ...]  # ... and of those under it


def boxes(rendering: Any) -> list[Box]:
    """Glyphs and rules in one list in the order of print; what is drawn from pieces of several glyphs is one box."""
    glyphs = _merge_ellipses(_merge_pieces(rendering.glyphs))
    found = []
    for number, glyph in enumerate(glyphs):
        span = _span(glyph, rendering.rules, glyphs) if glyph.code >= _LONG else ((), ())
        found.append((float(number), Box(*glyph, *span)))
    for rule in rendering.rules:
        if not any(
            glyph.code >= _LONG and abs(glyph.y - rule.y) <= TOLERANCE_PT for glyph in glyphs
        ):  # part of a brace
            above, below = _span(rule, rendering.rules, glyphs)
            box = Box("", rule.height, 0, rule.x, rule.y, rule.width, above, below)
            found.append((_place(rule, above, below, glyphs), box))
    return [box for _, box in sorted(found, key=lambda pair: pair[0])]


def _merge_pieces(glyphs: Sequence[Any]) -> list[Any]:
    """One glyph for the pieces of a long arrow or horizontal brace, and of a tall bracket.

    A long one gets a code that no font has, whatever its length: that is horizontal space.
    """
    merged: list[Any] = []
    for glyph in glyphs:
        last = merged[-1] if merged else None
        if last is not None and _continues_long(last, glyph):
            code = _LONG * (last.code < _LONG) + last.code + (glyph.code if _is(_HEADS, glyph) else 0)
            merged[-1] = last._replace(code=code, width=glyph.x + glyph.width - last.x)
        elif last is None or not _continues_bracket(last, glyph):
            merged.append(glyph)
    return merged


def _is(places: set[tuple[str, int]], glyph: Any) -> bool:
    return (glyph.font.rstrip("0123456789"), glyph.code % _LONG) in places


def _continues_long(last: Any, glyph: Any) -> bool:
    if abs(glyph.y - last.y) > TOLERANCE_PT:
        return False
    if _is(_BRACE, glyph):
        return _is(_BRACE, last) and glyph.x + TOLERANCE_PT > last.x + last.width
    is_arrow = _is(_BARS | _HEADS, glyph) and (last.code >= _LONG or _is(_BARS | _HEADS, last))
    return is_arrow and last.x <= glyph.x < last.x + last.width - 0.1


def _merge_ellipses(glyphs: list[Any]) -> list[Any]:
    r"""One glyph, of a code that no font has, for three dots in a row: `\ldots` and `\cdots` are one symbol."""
    merged: list[Any] = []
    for glyph in glyphs:
        merged.append(glyph)
        first, *others = merged[-3:]
        is_dots = (glyph.font.rstrip("0123456789"), glyph.code) in _DOTS and len(others) == 2
        if is_dots and all(g[:3] == first[:3] and abs(g.y - first.y) <= TOLERANCE_PT for g in others):
            width = glyph.x + glyph.width - first.x
            merged[-3:] = [first._replace(code=_ELLIPSIS + first.code, width=width)]
    return merged


def _continues_bracket(last: Any, glyph: Any) -> bool:
    if glyph.font != last.font or abs(glyph.x - last.x) > TOLERANCE_PT or not glyph.font.startswith("cmex"):
        return False
    return glyph.code == _MIDDLE_OF_BRACE or _SIZED.get(("cmex", glyph.code)) == _SIZED.get(("cmex", last.code), 0)


def _span(rule: Any, rules: Sequence[Any], glyphs: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which glyphs stand on a horizontal rule and which under it: those printed just before and after it.

    A longer rule shields what is beyond it. In a matrix the row above or below does not belong to the rule either:
    its glyphs are not neighbours in the order of print.
    """
    above, below = [], []
    longer = [other for other in rules if other.width > rule.width + TOLERANCE_PT]
    for number, glyph in enumerate(glyphs):
        middle = glyph.x + glyph.width / 2
        if (
            glyph.y != rule.y
            and _covers(rule, middle)
            and not any(_is_between(other, rule.y, glyph.y, middle) for other in longer)
        ):
            (above if glyph.y > rule.y else below).append(number)
    above = _run(above[::-1])[::-1]
    below = _run([number for number in below if not above or number > above[-1]] or below)
    if above and below and above[-1] + 1 != below[0]:  # one side is another row; the gap on the other is small
        gap_above = glyphs[above[-1]].y - rule.y - 0.2 * glyphs[above[-1]].size
        gap_below = rule.y - glyphs[below[0]].y - 0.7 * glyphs[below[0]].size
        if gap_above < gap_below:
            below = []
        else:
            above = []
    return tuple(above), tuple(below)


def _covers(rule: Any, x: float) -> bool:
    return rule.x - TOLERANCE_PT <= x <= rule.x + rule.width + TOLERANCE_PT


def _is_between(rule: Any, one_y: float, other_y: float, x: float) -> bool:
    low, high = sorted((one_y, other_y))
    return low + TOLERANCE_PT < rule.y < high - TOLERANCE_PT and _covers(rule, x)


def _run(numbers: list[int]) -> list[int]:
    """The first numbers, as long as each is the neighbour of the one before."""
    end = next((k for k in range(1, len(numbers)) if abs(numbers[k] - numbers[k - 1]) != 1), len(numbers))
    return numbers[:end]


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
        if one.font != other.font or one.code != other.code or one.above != other.above or one.below != other.below:
            return False
        if abs(one.size - other.size) > TOLERANCE_PT:
            return False
        if abs((one.y - a[0].y) - (other.y - b[0].y)) > TOLERANCE_PT:
            return False
        is_shape = not one.font and not (one.above or one.below)
        if is_shape and abs(one.width - other.width) > TOLERANCE_PT:
            return False
    return True


# What a matched box loses: for another size, for another place; and what is left of a letter in another alphabet,
# and of a box that is there but not in the same order. All found by looking at pairs; none is fitted to a score.
SIZE_LOSS = 0.25
PLACE_LOSS = 0.5
OTHER_ALPHABET = 0.5
OUT_OF_ORDER = 0.5
# A script that moves because its neighbour is wrong is not wrong itself: TeX lowers a subscript by up to 1 pt for
# a superscript above it. Just under the 1.5 pt of the smallest shift with a meaning (sub1 of cmsy10), per 10 pt.
SHIFT_PER_SIZE = 0.14
# A row of a matrix that stands higher because another is missing keeps its inner order, and most of its credit.
ONLY_RELATIVE = 0.6


def glyph_f1(prediction: Any, reference: Any) -> float:
    r"""How much of the reference's print the prediction has, and the other way round: 0 to 1.

    Why: partial credit that sees structure. Two formulas are two lists of boxes in the order of print. The best
    pairing in order, then the best pairing of what is left over (at half credit), match equal symbols; a matched
    box counts 1, less for a wrong size, a wrong height, or standing on or under other bars. The score is twice the
    matched credit over the number of boxes on both sides. Heights are judged from the baseline or, if that is
    better, from the neighbours, and widths not at all, so one missing box costs one box, and horizontal space
    nothing.

    1 if and only if `same_picture(prediction, reference, horizontal_space=False)`; anything else is at least half a
    box away from 1. 0 if either does not render.

    Args:
        prediction: a `latexocr.render.Rendering`.
        reference: the other; the score is symmetric.
    """
    if prediction.error or reference.error:
        return 0.0
    ours, theirs = boxes(prediction), boxes(reference)
    if same_picture(prediction, reference) or _in_order_equally(ours, theirs):
        return 1.0
    if not ours or not theirs:
        return 0.0
    credit = _credit(ours, theirs)
    total = max(_matched(credit), _matched(credit.T))  # ties are broken by side
    num_boxes = len(ours) + len(theirs)
    return float(min(2 * total, num_boxes - 1) / num_boxes)


def _matched(credit: np.ndarray) -> float:
    """Credit of the best pairing in order, and half of that of the best pairing of the rest."""
    pairs = _in_order(credit)
    rest = credit.copy()
    for row, column in pairs:
        rest[row, :] = rest[:, column] = 0
    return sum(credit[pair] for pair in pairs) + OUT_OF_ORDER * _assigned(rest)


def _assigned(credit: np.ndarray) -> float:
    """Credit of the best pairing without regard to order."""
    if not credit.any():
        return 0.0
    from scipy.optimize import linear_sum_assignment

    return credit[linear_sum_assignment(credit, maximize=True)].sum()


def _in_order(credit: np.ndarray) -> list[tuple[int, int]]:
    """The pairs of the best pairing that keeps the order of both sides (longest common subsequence with weights)."""
    best = np.zeros((len(credit) + 1, credit.shape[1] + 1))
    for row, gains in enumerate(credit):
        best[row + 1, 1:] = np.maximum.accumulate(np.maximum(best[row, 1:], best[row, :-1] + gains))
    pairs = []
    row, column = credit.shape
    while row and column:
        if best[row, column] == best[row - 1, column]:
            row -= 1
        elif best[row, column] == best[row, column - 1]:
            column -= 1
        else:
            row, column = row - 1, column - 1
            pairs.append((row, column))
    return pairs


def _credit(ours: list[Box], theirs: list[Box]) -> np.ndarray:
    """What each pair of boxes would count if matched (ours, theirs), 0 to 1."""
    a, b = _features(ours), _features(theirs)
    symbol = np.equal.outer(a["symbol"], b["symbol"])
    letter = np.equal.outer(a["letter"], b["letter"]) & (a["letter"] > 0)[:, None]
    size = np.equal.outer(a["code"], b["code"]) & (np.abs(np.subtract.outer(a["size"], b["size"])) <= TOLERANCE_PT)
    reach = SHIFT_PER_SIZE * np.minimum.outer(a["type_size"], b["type_size"])

    def near(name: str) -> np.ndarray:
        return np.abs(np.subtract.outer(a[name], b[name])) <= reach

    other_size = symbol & ~np.equal.outer(a["code"], b["code"])  # of a bracket: its height says nothing of its place
    place = np.maximum(near("y") | other_size, ONLY_RELATIVE * (near("rise") + near("fall").astype(float)) / 2)
    bars = np.equal.outer(a["num_under"], b["num_under"]) & np.equal.outer(a["num_over"], b["num_over"])
    cover = (_share(a["num_above"], b["num_above"]) + _share(a["num_below"], b["num_below"])) / 2
    lost = SIZE_LOSS * (1 - size * cover) + PLACE_LOSS * (1 - place * (1 + bars) / 2)
    return np.maximum(symbol, OTHER_ALPHABET * letter) * (1 - lost)


def _share(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smaller of two counts as part of the larger; 1 for none and none."""
    return (np.minimum.outer(a, b) + 1) / (np.maximum.outer(a, b) + 1)


def _features(items: list[Box]) -> dict[str, np.ndarray]:
    """What is compared of each box, as arrays."""
    is_rule = np.array([not box.font for box in items])
    glyph_number = np.cumsum(~is_rule) - 1
    over, under = (np.bincount([n for box in items for n in side(box)], minlength=len(items)) for side in _SIDES)
    y = np.array([box.y for box in items])
    size = np.array([box.size for box in items])
    # From the box before, and to the next one; the baseline stands in at the ends.
    rise, fall = np.diff(y, prepend=0.0), np.diff(y, append=0.0)
    return {
        "symbol": np.array([hash(_symbol(box)) for box in items]),
        "letter": np.array([_letter(box) for box in items]),
        "code": np.array([box.code for box in items]),
        "size": size,
        "type_size": np.where(is_rule, 10.0, size),
        "y": y,
        "rise": rise,
        "fall": fall,
        "num_over": np.where(is_rule, 0, over[glyph_number]),
        "num_under": np.where(is_rule, 0, under[glyph_number]),
        "num_above": np.array([len(box.above) for box in items]),
        "num_below": np.array([len(box.below) for box in items]),
    }


_SIDES = (lambda box: box.above, lambda box: box.below)


def _symbol(box: Box) -> object:
    """What a person would call it: the same for all sizes of a bracket or sum."""
    if not box.font:
        return "bar" if box.width >= box.size else "post"
    if box.font.startswith("STIX"):  # mathtext: the code is Unicode, the sizes are fonts
        return ("STIX", box.code) if "Size" in box.font or not chr(box.code).isalnum() else (box.font, box.code)
    family = box.font.rstrip("0123456789")
    return _SIZED.get((family, box.code), (family, box.code))


def _letter(box: Box) -> int:
    """ASCII code of a letter or digit in any alphabet (italic, bold, blackboard, ...), 0 for all other boxes."""
    family = box.font.rstrip("0123456789")
    character = chr(box.code)
    if not character.isascii() or not character.isalnum() or family in ("", "cmex", "msam"):
        return 0
    only_capitals = family in ("cmsy", "cmbsy", "msbm", "rsfs")
    return box.code if character.isupper() or not only_capitals else 0


# Sizes and pieces of one symbol. Source: font tables of cmr10, cmsy10 and cmex10, The TeXbook, appendix F.
_SIZED = {
    place: symbol
    for symbol, text_size, sizes_and_pieces in (
        ("(", ("cmr", 40), (0, 16, 18, 32, 48, 64, 66)),
        (")", ("cmr", 41), (1, 17, 19, 33, 49, 65, 67)),
        ("[", ("cmr", 91), (2, 20, 34, 104, 50, 52, 54)),
        ("]", ("cmr", 93), (3, 21, 35, 105, 51, 53, 55)),
        ("lfloor", ("cmsy", 98), (4, 22, 36, 106)),
        ("rfloor", ("cmsy", 99), (5, 23, 37, 107)),
        ("lceil", ("cmsy", 100), (6, 24, 38, 108)),
        ("rceil", ("cmsy", 101), (7, 25, 39, 109)),
        ("{", ("cmsy", 102), (8, 26, 40, 110, 56, 58, 60, 62)),
        ("}", ("cmsy", 103), (9, 27, 41, 111, 57, 59, 61)),
        ("langle", ("cmsy", 104), (10, 28, 42, 68)),
        ("rangle", ("cmsy", 105), (11, 29, 43, 69)),
        ("|", ("cmsy", 106), (12,)),
        ("parallel", ("cmsy", 107), (13,)),
        ("/", ("cmmi", 61), (14, 30, 44, 46)),
        ("backslash", ("cmsy", 110), (15, 31, 45, 47)),
        ("sqrt", ("cmsy", 112), (112, 113, 114, 115, 116, 117, 118)),
        ("bigsqcup", None, (70, 71)),
        ("oint", None, (72, 73)),
        ("bigodot", None, (74, 75)),
        ("bigoplus", None, (76, 77)),
        ("bigotimes", None, (78, 79)),
        ("sum", None, (80, 88)),
        ("prod", None, (81, 89)),
        ("int", None, (82, 90)),
        ("bigcup", None, (83, 91)),
        ("bigcap", None, (84, 92)),
        ("biguplus", None, (85, 93)),
        ("bigwedge", None, (86, 94)),
        ("bigvee", None, (87, 95)),
        ("coprod", None, (96, 97)),
        ("widehat", None, (98, 99, 100)),
        ("widetilde", None, (101, 102, 103)),
    )
    for place in ([text_size] if text_size else []) + [("cmex", code) for code in sizes_and_pieces]
}
_DOTS = {("cmmi", 58), ("cmr", 46), ("cmsy", 1)}
_ELLIPSIS = 1000
_BARS = {("cmsy", 0), ("cmr", 61)}  # minus and equals sign: what long arrows are lengthened with
_HEADS = {("cmsy", code) for code in (32, 33, 36, 40, 41, 44)}
_BRACE = {("cmex", code) for code in (122, 123, 124, 125)}  # pieces of \overbrace and \underbrace, joined by rules
_LONG = 2000
_MIDDLE_OF_BRACE = 62  # the one piece that both braces are stretched with
