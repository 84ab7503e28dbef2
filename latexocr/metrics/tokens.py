r"""LaTeX text -> tokens, and what stands around a formula without belonging to it (level 0).

Why: every comparison of formulas is a comparison of tokens, and `\frac{a}{b}` must be the same tokens as
the data set's `\frac { a } { b }`. Nothing here raises, whatever the string: predictions of a model come
through here.
"""

from __future__ import annotations

import re

# Linear time: each alternative fails within the blanks or letters it looked at, and those are then consumed.
_TOKEN = re.compile(
    r"\\(?:begin|end)\s*\{\s*[A-Za-z](?:\s*[A-Za-z])*\s*(?:\*\s*)?\}"
    r"|\\(?:operatorname|hspace|vspace|tag)\s*\*"
    r"|\\[A-Za-z]+"
    r"|\\\S"
    r"|\S"  # includes a backslash before a blank or at the end of the text
)
_COMMENT = re.compile(r"(\\.)|%[^\r\n]*", re.DOTALL)
_FENCE = re.compile(
    r"\s*```(?:[A-Za-z]*[^\S\r\n]*[\r\n]|(?:latex|tex|math|markdown)\b)?(.*?)```\s*",
    re.DOTALL | re.IGNORECASE,
)
_DELIMITERS = {
    "$": "$",
    r"\[": r"\]",
    r"\(": r"\)",
    **{rf"\begin{{{name}}}": rf"\end{{{name}}}" for name in ("equation", "equation*", "displaymath", "math")},
}


def tokenize(latex: str) -> list[str]:
    r"""Split LaTeX into tokens; blanks only separate, so spaced and unspaced spellings give the same list.

    A token is a control word (`\alpha`), a control symbol (`\,`), or one other character, with three
    decisions: `\begin{matrix}` and `\end{matrix}` are one token each, as in the LaTeX_OCR texts; a star
    belongs to the control word only where LaTeX has a starred form in formulas (`\operatorname*`,
    `\hspace*`, `\vspace*`, `\tag*`); a backslash before a blank or at the end is the control space `\ `.
    Blanks inside `\text{...}` are lost: the data sets write every token apart, so they cannot be told from
    separators.

    Never raises; linear time.

    >>> tokenize(r"\frac{x^2}\alpha")
    ['\\frac', '{', 'x', '^', '2', '}', '\\alpha']
    """
    tokens = _TOKEN.findall(latex)
    if "*" in latex or r"\begin" in latex or r"\end" in latex:
        tokens = ["".join(token.split()) if len(token) > 2 else token for token in tokens]
    if "\\" in tokens:
        tokens = ["\\ " if token == "\\" else token for token in tokens]
    return tokens


def token_spans(latex: str) -> list[tuple[int, int]]:
    """Start and end of each token of `tokenize` in the text."""
    return [match.span() for match in _TOKEN.finditer(latex)]


def level0(latex: str) -> list[str]:
    """The tokens of the formula itself: without Markdown fence, comments, labels and math delimiters."""
    fenced = _FENCE.fullmatch(latex) if "```" in latex else None
    if fenced:
        latex = fenced.group(1)
    tokens = tokenize(without_comments(latex))
    if r"\label" in tokens:
        # What stood left and right of a label may now be one token: \operatorname \label{a} *
        tokens = tokenize(" ".join(_without_labels(tokens)))
    return _without_delimiters(tokens)


def without_comments(latex: str) -> str:
    r"""The text without what stands behind a `%` that is not `\%`."""
    return _COMMENT.sub(lambda match: match.group(1) or "", latex) if "%" in latex else latex


def _without_labels(tokens: list[str]) -> list[str]:
    closing = _closing_braces(tokens)
    kept, position = [], 0
    while position < len(tokens):
        if tokens[position] != r"\label":
            kept.append(tokens[position])
        elif tokens[position + 1 : position + 2] not in ([], ["{"], ["}"]):
            position += 1  # TeX takes one token for the argument
        elif position + 1 in closing:
            position = closing[position + 1]
        position += 1
    return kept


def _closing_braces(tokens: list[str]) -> dict[int, int]:
    """Position of each `{` that is closed -> position of its `}`."""
    closing, open_braces = {}, []
    for position, token in enumerate(tokens):
        if token == "{":
            open_braces.append(position)
        elif token == "}" and open_braces:
            closing[open_braces.pop()] = position
    return closing


def _without_delimiters(tokens: list[str]) -> list[str]:
    r"""Strip `$ $`, `$$ $$`, `\[ \]`, ... around the whole; `$a$ and $b$` is two formulas and stays."""
    while len(tokens) > 1 and _DELIMITERS.get(tokens[0]) == tokens[-1]:
        width = 2 if len(tokens) > 3 and tokens[1] == tokens[-2] == "$" == tokens[0] else 1
        if sum(map(tokens.count, {tokens[0], tokens[-1]})) != 2 * width:
            break
        tokens = tokens[width:-width]
    return tokens
