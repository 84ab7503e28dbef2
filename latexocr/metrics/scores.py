"""Text metrics: a list of predictions and a list of references -> one number.

Why: papers use five BLEUs and four edit distances under the same names. Here each variant is one function
whose docstring says what it computes and where it comes from. Shares and distances are fractions from 0 to
1, BLEU runs from 0 to 100, as sacrebleu prints it.

The same decisions hold everywhere: the i-th prediction belongs to the i-th reference; lists of different
length, empty lists and rows that are no strings raise `InputError`; an empty string is an ordinary row (a
model that answered nothing), equal to another empty one and at distance 1 from anything else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from latexocr.errors import InputError
from latexocr.metrics.canonical import normalized_tokens

_Rows = Sequence[Sequence[str]]  # one row: tokens, or the characters of a string
# UniMERNet keeps a blank only between two letters; we also keep the control space.
_NEEDLESS_BLANK = re.compile(r"(?<!\\) (?![A-Za-z])|(?<![A-Za-z\\]) ")


def score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    r"""All text metrics of this module under their names, with `num_rows`.

    Why: normalises every row once instead of once a metric.

    Args:
        predictions: LaTeX, one string a row.
        references: LaTeX, as many strings.

    Raises:
        InputError: Empty lists, lists of different length, or a row that is no string.

    >>> score([r"\frac12", "x"], [r"\frac{1}{2}", "y"])["exact_match"]
    0.5
    """
    _check(predictions, references)
    rows = [_canonical(texts, level=1) for texts in (predictions, references)]
    level0_rows = [_canonical(texts, level=0) for texts in (predictions, references)]
    return {
        "exact_match": _share_equal(*rows),
        "exact_match_level0": _share_equal(*level0_rows),
        "edit_distance": _mean_distance(*rows),
        "edit_distance_chars": _mean_distance(*map(_squeezed, rows)),
        "bleu": _corpus_bleu(*rows),
        "num_rows": float(len(references)),
    }


def exact_match(predictions: Sequence[str], references: Sequence[str], *, level: int = 1) -> float:
    """Share of rows (0 to 1, 1 best) whose canonical tokens are equal; ExpRate of the CROHME competitions.

    At level 0 it is the exact match on tokens that most papers print.

    Args:
        predictions: LaTeX, one string a row.
        references: LaTeX, as many strings.
        level: Normalisation level, see `latexocr.metrics.normalize`.

    >>> exact_match(["x^2_i", "y"], ["x_i^2", "z"])
    0.5
    """
    return _share_equal(*_both(predictions, references, level=level))


def edit_distance(predictions: Sequence[str], references: Sequence[str], *, level: int = 1) -> float:
    """Mean over the rows of Levenshtein's distance in tokens, divided by the longer side (0 to 1, 0 best).

    The mean of the rows' values, not the pooled variant of im2markup (sum of distances over sum of
    lengths), which lets long formulas outweigh short ones.

    Args:
        predictions: LaTeX, one string a row.
        references: LaTeX, as many strings.
        level: Normalisation level, see `latexocr.metrics.normalize`.

    >>> edit_distance(["a + b", ""], ["a + c", "x"])  # one token of three, and everything
    0.6666666666666666
    """
    return _mean_distance(*_both(predictions, references, level=level))


def edit_distance_chars(predictions: Sequence[str], references: Sequence[str], *, level: int = 1) -> float:
    r"""As `edit_distance`, in characters of the text whose blanks are kept between letters only (`\alpha t+1`).

    The variant of UniMERNet's evaluation, which squeezes the raw text (level 0 here) in the same way.

    Args:
        predictions: LaTeX, one string a row.
        references: LaTeX, as many strings.
        level: Normalisation level, see `latexocr.metrics.normalize`.

    >>> edit_distance_chars([r"\beta"], [r"\zeta"])
    0.2
    """
    return _mean_distance(*map(_squeezed, _both(predictions, references, level=level)))


def bleu(predictions: Sequence[str], references: Sequence[str], *, level: int = 1) -> float:
    """Corpus BLEU-4 on canonical tokens (0 to 100, 100 best), computed by sacrebleu with `tokenize="none"`.

    sacrebleu's defaults for a corpus hold: exponential smoothing of zero precisions, no effective order,
    which means that a corpus without a single 4-gram in the predictions scores 0, equal or not. One runaway
    prediction can cost points, because the n-grams of all rows are pooled. The mean of sentence scores,
    BLEU on characters and BLEU with the 13a tokeniser are other metrics with other values.

    Source: Post 2018, "A Call for Clarity in Reporting BLEU Scores"; sacrebleu's signature is
    `nrefs:1|case:mixed|eff:no|tok:none|smooth:exp`.

    Args:
        predictions: LaTeX, one string a row.
        references: LaTeX, as many strings.
        level: Normalisation level, see `latexocr.metrics.normalize`.

    >>> round(bleu(["a + b = c"], ["a+b=c"]), 6)
    100.0
    """
    return _corpus_bleu(*_both(predictions, references, level=level))


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


def _both(predictions: Sequence[str], references: Sequence[str], *, level: int) -> tuple[_Rows, _Rows]:
    _check(predictions, references)
    return _canonical(predictions, level=level), _canonical(references, level=level)


def _canonical(texts: Sequence[str], *, level: int) -> list[list[str]]:
    return [normalized_tokens(text, level=level) for text in texts]


def _squeezed(rows: _Rows) -> list[str]:
    return [_NEEDLESS_BLANK.sub("", " ".join(row)) for row in rows]


def _share_equal(predictions: _Rows, references: _Rows) -> float:
    return sum(a == b for a, b in zip(predictions, references, strict=True)) / len(references)


def _mean_distance(predictions: _Rows, references: _Rows) -> float:
    from rapidfuzz.distance import Levenshtein

    distances = map(Levenshtein.normalized_distance, predictions, references)
    return sum(distances) / len(references)


def _corpus_bleu(predictions: _Rows, references: _Rows) -> float:
    import sacrebleu

    hypotheses = [" ".join(row) for row in predictions]
    # force: the rows are meant to be tokenised already, so no warning about it
    result = sacrebleu.corpus_bleu(hypotheses, [[" ".join(row) for row in references]], tokenize="none", force=True)
    return float(result.score)
