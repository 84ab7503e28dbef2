"""Metrics on LaTeX strings: pure Python functions, no torch, no TeX.

`tokenize` splits LaTeX into tokens, `normalize` writes a formula in its canonical form, `score` compares
lists of predictions with lists of references. Each metric is also a function of its own in
`latexocr.metrics.scores`.
"""

from latexocr.metrics.canonical import normalize
from latexocr.metrics.scores import score
from latexocr.metrics.tokens import tokenize

__all__ = ["normalize", "score", "tokenize"]
