"""Metrics on LaTeX strings: pure Python functions, no torch, no TeX.

`tokenize` splits LaTeX into tokens, `normalize` writes a formula in its canonical form, `score` compares
lists of predictions with lists of references. `METRICS` has each metric on its own, with its definition:
`METRICS["bleu"](predictions, references)`.
"""

from latexocr.metrics.canonical import normalize
from latexocr.metrics.scores import METRICS, score
from latexocr.metrics.tokens import tokenize

__all__ = ["METRICS", "normalize", "score", "tokenize"]
