"""latexocr: fine-tune vision-language models to read images of formulas as LaTeX.

Stages are modules: `latexocr.data2csv`, `csv2json`, `train`, `evaluate`, `predict`, `merge`. Nothing heavy is
imported here, so that `import latexocr` and `latexocr --help` answer at once.
"""

__version__ = "0.1.0"
