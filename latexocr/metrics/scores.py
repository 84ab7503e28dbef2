r"""The metrics: predictions and references -> figures.

Why: papers use five BLEUs and four edit distances under the same names. Here each variant is one entry of
`METRICS`, whose text says what it computes. Shares, rates and distances are fractions from 0 to 1 (pix2tex's distance
has no upper end), BLEU runs from 0 to 100, as sacrebleu prints it.

Ours read canonical tokens (`normalize`, level 1). Those named after a paper read the text as it is written, as the
paper's own program does, so that its table can be put beside ours:

| key | program | what it is |
|---|---|---|
| `bleu_im2markup`, `edit_distance_im2markup` | im2markup | corpus BLEU of words, pooled distance of words |
| `bleu_pix2tex`, `edit_distance_pix2tex` | pix2tex | mean BLEU of rows; mean of characters wrong per character |
| `bleu_unimernet`, `edit_distance_unimernet` | UniMERNet | 13a BLEU, mean character distance, blanks squeezed |

A word is what stands between blanks. pix2tex averages BLEU over batches of pictures of one size, on the tokens
of its own tokenizer; here a batch is one row, of words. im2markup prints 1 - distance.

The same decisions hold everywhere: the i-th prediction belongs to the i-th reference; lists of different length,
empty lists and rows that are no strings raise `InputError`; an empty string is an ordinary row (a model that
answered nothing), equal to another empty one and at distance 1 from anything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, Literal

import numpy as np

from latexocr.errors import InputError
from latexocr.metrics.canonical import is_formula, normalized_tokens
from latexocr.metrics.glyphs import glyph_f1, same_picture
from latexocr.metrics.runaway import runs_away

Rows = Sequence[Sequence[str]]  # one row: tokens, or the characters of a string
Form = Callable[["Pairs"], tuple[Rows, Rows]]
_NAN = float("nan")


class Pairs:
    """Predictions with their references, and every form of them that a metric reads, made once.

    Args:
        predictions: LaTeX, one string a row.
        references: LaTeX, as many strings.
        finished: whether each answer ended by itself; None where nobody knows.
        pictures: `latexocr.render.Rendering`s of all predictions and of all references; None: no picture metrics.

    Raises:
        InputError: empty lists, lists of different length, or a row that is no string.
    """

    def __init__(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        *,
        finished: Sequence[bool | None] | None = None,
        pictures: tuple[Sequence[Any], Sequence[Any]] | None = None,
    ) -> None:
        _check(predictions, references)
        self.predictions, self.references, self.pictures = list(predictions), list(references), pictures
        self.finished = list(finished) if finished is not None else [None] * len(references)
        self.tokens = cache(self._tokens)
        self.ngrams = cache(partial(_ngram_counts, self))

    def _tokens(self, level: int) -> tuple[Rows, Rows]:
        texts = self.predictions, self.references
        return tuple([normalized_tokens(text, level=level) for text in side] for side in texts)

    @cached_property
    def token_errors(self) -> np.ndarray:
        """(rows,) insertions, deletions and substitutions of canonical tokens."""
        from rapidfuzz.distance import Levenshtein

        return np.array([Levenshtein.distance(a, b) for a, b in zip(*self.tokens(1), strict=True)], dtype=float)

    @cached_property
    def unparsed(self) -> dict[str, int]:
        """How many texts are no well-formed formulas: they are compared as they are written, at every level."""
        found = {}
        sides = {"predictions": self.predictions, "references": self.references}
        for (name, texts), as_written, canonical in zip(sides.items(), self.tokens(0), self.tokens(1), strict=True):
            rows = zip(texts, as_written, canonical, strict=True)
            found[f"unparsed_{name}"] = sum(a == b and not is_formula(text) for text, a, b in rows)
        return found

    @cached_property
    def renders(self) -> np.ndarray:
        """(rows, 2) whether prediction and reference render."""
        return np.array([[side.error is None for side in pair] for pair in zip(*self.pictures, strict=True)])


@dataclass(frozen=True)
class Metric:
    """A metric as data, so that its figure, interval, slices and row values come from one table.

    Args:
        name: key in metrics.json.
        what: one line for people: definition and scale.
        better: which direction is better.
        per_row: what each row adds: (rows, k).
        value: sums over rows (..., k) -> figures (...); NaN where there is none.
        row_value: the same for a single row where that differs (BLEU of a row without any 4-gram).
        needs_pictures: whether it reads renderings.
    """

    name: str
    what: str
    better: Literal["higher", "lower"]
    per_row: Callable[[Pairs], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    row_value: Callable[[np.ndarray], np.ndarray] | None = None
    needs_pictures: bool = False

    def __call__(self, predictions: Sequence[str], references: Sequence[str]) -> float:
        """The figure alone, for metrics that need no pictures.

        Raises:
            InputError: as `score`, or the metric needs pictures.
        """
        if self.needs_pictures:
            raise InputError(f"{self.name} compares pictures; give them to score(..., pictures=(...))")
        return float(self.value(self.per_row(Pairs(predictions, references)).sum(axis=0)))

    def of_row(self, rows: np.ndarray) -> np.ndarray:
        """(rows, k) -> (rows,)."""
        return (self.row_value or self.value)(rows)


def score(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    finished: Sequence[bool | None] | None = None,
    pictures: tuple[Sequence[Any], Sequence[Any]] | None = None,
) -> dict[str, float]:
    r"""All metrics under their names, with counts: `num_rows`, `unparsed_predictions`, `unparsed_references`.

    Args:
        predictions: LaTeX, one string a row.
        references: LaTeX, as many strings.
        finished: whether each answer ended by itself, for `runaway_rate`.
        pictures: renderings of both; picture metrics are left out without them.

    Raises:
        InputError: empty lists, lists of different length, or a row that is no string.

    >>> score([r"\frac12", "x"], [r"\frac{1}{2}", "y"])["exact_match"]
    0.5
    """
    return figures(Pairs(predictions, references, finished=finished, pictures=pictures))


def figures(pairs: Pairs) -> dict[str, float]:
    """All metrics that these rows have a value for, and the counts; see `score`."""
    found = {metric.name: float(metric.value(metric.per_row(pairs).sum(axis=0))) for metric in metrics_of(pairs)}
    return {name: value for name, value in found.items() if value == value} | counts(pairs)


def metrics_of(pairs: Pairs) -> list[Metric]:
    """The metrics that these rows have."""
    return [metric for metric in METRICS.values() if pairs.pictures is not None or not metric.needs_pictures]


def counts(pairs: Pairs) -> dict[str, float]:
    """What the figures rest on."""
    found = {"num_rows": float(len(pairs.references)), **pairs.unparsed}
    if pairs.pictures is not None:
        found["unrendered_references"] = int((~pairs.renders[:, 1]).sum())
    return {name: float(count) for name, count in found.items()}


# ---- forms of the texts ------------------------------------------------------------------------------------

# One bracketed word after these is text to UniMERNet, and loses all its blanks.
_TEXT = re.compile(r"\\(?:operatorname|mathrm|mathbf|text)\s?\*? \{.*?\}")
# A letter of another script is neither a letter nor a sign to it.
_NEEDLESS_BLANK = re.compile(r"(?<=[\W\d_])(?<!\\) (?=[\W\d_A-Za-z])|(?<=[A-Za-z]) (?=[\W\d_])")


def squeeze(latex: str) -> str:
    r"""Blanks between letters only, and after the backslash of a control space; none in `\mathrm{...}`.

    >>> squeeze(r"\alpha t + \mathrm { d e t } x")
    '\\alpha t+\\mathrm{det}x'
    """
    latex = " ".join(latex.split())
    end = latex.rfind("}") + 1  # behind it no text can end: looking for one at every word takes ages
    latex = _TEXT.sub(lambda match: match.group().replace(" ", ""), latex[:end]) + latex[end:]
    return _NEEDLESS_BLANK.sub("", latex)


def _canonical(pairs: Pairs) -> tuple[Rows, Rows]:
    return pairs.tokens(1)


def _canonical_text(pairs: Pairs) -> tuple[Rows, Rows]:
    return tuple([_NEEDLESS_BLANK.sub("", " ".join(row)) for row in side] for side in pairs.tokens(1))


def _words(pairs: Pairs) -> tuple[Rows, Rows]:
    return tuple([text.split() for text in side] for side in (pairs.predictions, pairs.references))


def _squeezed(pairs: Pairs) -> tuple[Rows, Rows]:
    return tuple([squeeze(text) for text in side] for side in (pairs.predictions, pairs.references))


# ---- means -------------------------------------------------------------------------------------------------


def ratio(sums: np.ndarray) -> np.ndarray:
    """First column over second; NaN where the second is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _mean_of(values: Sequence[float]) -> np.ndarray:
    """Rows of which `ratio` is the mean; NaN is a row that does not count."""
    values = np.asarray(values, dtype=float)
    return np.stack([np.nan_to_num(values), ~np.isnan(values)], axis=1)


def _equal(pairs: Pairs, *, level: int) -> np.ndarray:
    return _mean_of([a == b for a, b in zip(*pairs.tokens(level), strict=True)])


def _few_errors(pairs: Pairs, *, at_most: int) -> np.ndarray:
    return _mean_of(pairs.token_errors <= at_most)


def _runaway(pairs: Pairs) -> np.ndarray:
    rows = zip(*pairs.tokens(0), pairs.finished, strict=True)
    return _mean_of([ended is False or runs_away(prediction, reference) for prediction, reference, ended in rows])


# ---- edit distances ----------------------------------------------------------------------------------------


def _distance_over_longer(pairs: Pairs, *, form: Form) -> np.ndarray:
    from rapidfuzz.distance import Levenshtein

    return _mean_of([Levenshtein.normalized_distance(a, b) for a, b in zip(*form(pairs), strict=True)])


def _distance_over_reference(pairs: Pairs) -> np.ndarray:
    """An empty reference does not count."""
    from rapidfuzz.distance import Levenshtein

    rows = zip(*_squeezed(pairs), strict=True)
    return _mean_of([Levenshtein.distance(a, b) / len(b) if b else _NAN for a, b in rows])


def _pooled_distance(pairs: Pairs) -> np.ndarray:
    from rapidfuzz.distance import Levenshtein

    rows = zip(*_words(pairs), strict=True)
    return np.array([(Levenshtein.distance(a, b), max(len(a), len(b))) for a, b in rows], dtype=float)


def _or_zero(sums: np.ndarray) -> np.ndarray:
    """As `ratio`, 0 where all rows are empty: nothing is wrong with them."""
    return np.nan_to_num(ratio(sums))


# ---- BLEU --------------------------------------------------------------------------------------------------

ORDER = 4


def _ngram_counts(pairs: Pairs, form: Form, tokenize: Literal["none", "13a", "char"]) -> np.ndarray:
    """Both lengths, then matching and all n-grams of the predictions for n = 1 to 4: (rows, 10)."""
    from sacrebleu.metrics import BLEU

    # effective_order only keeps it from advising effective_order; force: rows may be tokenised already
    counter = BLEU(tokenize=tokenize, effective_order=True, force=True)
    rows = []
    for prediction, reference in zip(*form(pairs), strict=True):
        found = counter.sentence_score(_text(prediction), [_text(reference)])
        rows.append([found.sys_len, found.ref_len, *found.counts, *found.totals])
    return np.array(rows, dtype=float)


def _text(row: Sequence[str]) -> str:
    return row if isinstance(row, str) else " ".join(row)


def corpus_bleu(sums: np.ndarray, *, smooth: bool = True, effective_order: bool = False) -> np.ndarray:
    """BLEU-4 (0 to 100) of summed n-gram counts, see `_ngram_counts`: (..., 10) -> (...).

    sacrebleu's arithmetic over many rows of sums at once. `smooth`: the k-th order without a match counts as 1 / 2^k
    matches (sacrebleu's "exp"); else the score is 0 then. `effective_order`: orders that the prediction is too short
    for are left out; else the score is 0 then, so a corpus without a single 4-gram scores 0, equal or not.
    """
    lengths, matches, totals = sums[..., :2], sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
    has_ngrams = totals > 0
    missed = (matches == 0) & has_ngrams
    num_orders = np.maximum(1, has_ngrams.sum(axis=-1)) if effective_order else ORDER
    with np.errstate(divide="ignore", invalid="ignore"):
        numerators = np.where(missed & smooth, 0.5 ** np.cumsum(missed, axis=-1), matches)
        logs = np.where(has_ngrams, np.log(numerators / totals), 0 if effective_order else -np.inf)
        brevity = np.minimum(0, 1 - lengths[..., 1] / lengths[..., 0])
        scores = 100 * np.exp(logs.sum(axis=-1) / num_orders + brevity)
    return np.where(matches.any(axis=-1), scores, 0.0)


def _row_bleus(pairs: Pairs) -> np.ndarray:
    return _mean_of(corpus_bleu(pairs.ngrams(_words, "none"), smooth=False))


def _bleu(name: str, what: str, form: Form, tokenize: str = "none", *, smooth: bool = True) -> Metric:
    return Metric(
        name, what, "higher",
        per_row=lambda pairs: pairs.ngrams(form, tokenize),
        value=partial(corpus_bleu, smooth=smooth),
        row_value=partial(corpus_bleu, effective_order=True),
    )  # fmt: skip


# ---- pictures ----------------------------------------------------------------------------------------------


def _rendered(pairs: Pairs) -> np.ndarray:
    return _mean_of(pairs.renders[:, 0])


def _compared(pairs: Pairs, *, compare: Callable[[Any, Any], float]) -> np.ndarray:
    """A prediction that does not render scores 0; a reference that does not is not the model's fault: no row."""
    rows = zip(pairs.renders, *pairs.pictures, strict=True)
    return _mean_of([
        # one text has one rendering: nothing to compare
        _NAN if not reference_renders else renders and (prediction is reference or compare(prediction, reference))
        for (renders, reference_renders), prediction, reference in rows
    ])  # fmt: skip


def _picture(name: str, what: str, compare: Callable[[Any, Any], float]) -> Metric:
    return Metric(name, what, "higher", partial(_compared, compare=compare), ratio, needs_pictures=True)


# ---- the list ----------------------------------------------------------------------------------------------


def _share(name: str, what: str, per_row: Callable[[Pairs], np.ndarray], better: str = "higher") -> Metric:
    return Metric(name, what, better, per_row, ratio)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _share("exact_match", "canonical tokens are equal (level 1: prints the same)", partial(_equal, level=1)),
        _share("exact_match_level0", "tokens are equal as written; ExpRate of CROHME", partial(_equal, level=0)),
        _share("exact_match_level2", "equal but for spacing, sizes, style and limits", partial(_equal, level=2)),
        *(
            _share(f"exprate_{k}", f"at most {k} canonical token(s) wrong", partial(_few_errors, at_most=k))
            for k in (1, 2, 3)
        ),
        _share(
            "edit_distance", "canonical tokens wrong over the longer side, mean of rows",
            partial(_distance_over_longer, form=_canonical), "lower",
        ),
        _share(
            "edit_distance_chars", "the same in characters of the canonical form, blanks squeezed",
            partial(_distance_over_longer, form=_canonical_text), "lower",
        ),
        _bleu("bleu", "corpus BLEU-4 of canonical tokens, 0 to 100", _canonical),
        _share("runaway_rate", "answers that hit the token limit or repeat themselves", _runaway, "lower"),
        Metric("render_rate", "predictions that render", "higher", _rendered, ratio, needs_pictures=True),
        _picture("picture_match", "same glyphs and rules in the same places", same_picture),
        _picture(
            "picture_match_spacing", "the same up to horizontal space", partial(same_picture, horizontal_space=False)
        ),
        _picture("glyph_f1", "glyphs and rules matched one to one, mean F1 of rows", glyph_f1),
        _bleu("bleu_chars", "corpus BLEU-4 of characters as written", _words, "char"),
        _bleu("bleu_im2markup", "corpus BLEU-4 of words, not smoothed (im2markup)", _words, smooth=False),
        _share("bleu_pix2tex", "mean BLEU-4 of rows, not smoothed (pix2tex)", _row_bleus),
        _bleu(
            "bleu_unimernet", "corpus BLEU-4, 13a, blanks squeezed (UniMERNet)", _squeezed, "13a", smooth=False
        ),
        Metric(
            "edit_distance_im2markup", "words wrong over words of the longer side, pooled (im2markup)", "lower",
            _pooled_distance, _or_zero,
        ),
        _share(
            "edit_distance_pix2tex", "characters wrong per character of the reference, mean of rows (pix2tex)",
            _distance_over_reference, "lower",
        ),
        _share(
            "edit_distance_unimernet", "characters wrong over the longer side, mean of rows (UniMERNet)",
            partial(_distance_over_longer, form=_squeezed), "lower",
        ),
    )
}  # fmt: skip


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references):
        raise InputError(
            f"{len(predictions)} predictions for {len(references)} references; give one for each "
            '(an empty string "" where the model answered nothing)'
        )
    if not references:
        raise InputError("0 rows: no score exists for no formulas; give at least one prediction and reference")
    for what, texts in (("prediction", predictions), ("reference", references)):
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"row {row}: the {what} is {type(text).__name__}, not a string; give LaTeX text")
