r"""Exchange letters, digits and symbols of a formula for others of their kind, so that no text is met twice.

Why: a decoder learns a few ten thousand texts by heart and then reads no picture. A formula in which `x` may be `q`
and `=` may be `\leq` keeps the shape of real formulas, but what it says has to be read. The exchange is made in the
text, before it is typeset: picture and label come from the same new text.

What is not printed is never touched: environments, column specifications, lengths, colours, arguments of commands
that are unknown here; a formula with low-level commands for boxes and lengths stays as it is.
"""

from __future__ import annotations

import numpy as np

from latexocr.metrics.symbols import (
    ARGUMENTS,
    BIG,
    ENVIRONMENTS,
    FONT_SWITCHES,
    FONTS,
    LENGTHS,
    SYMBOLS,
    TEXTS,
)
from latexocr.metrics.tokens import token_spans


def _words(names: str) -> list[str]:
    return [name if len(name) == 1 else f"\\{name}" for name in names.split()]


_LOWER = list("abcdefghijklmnopqrstuvwxyz")
_UPPER = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_DIGITS = list("0123456789")
_GREEK = _words(
    """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho varrho
    sigma tau upsilon phi varphi chi psi omega
    """
)
_GREEK_UPPER = _words("Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega")
# A token is exchanged for one of its line; one that is named n times comes n times as often.
_LINES = [
    _LOWER,
    _UPPER,
    _DIGITS,
    _GREEK,
    _GREEK_UPPER,
    *map(
        _words,
        (
            "+ + + + + - - - - - pm mp times cdot ast star circ bullet otimes oplus wedge vee cap cup setminus",
            "= = = = = = < > leq geq neq equiv sim simeq approx propto cong ll gg in subset subseteq supset ni",
            "to to to leftarrow Rightarrow Leftrightarrow leftrightarrow longrightarrow mapsto hookrightarrow",
            "sum sum sum prod prod coprod bigcup bigcap bigoplus bigotimes bigwedge bigvee",
            "int int int oint iint",
            "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan exp log ln arg dim ker deg",
            "lim max min sup inf det gcd",
            "hat bar tilde vec dot ddot check breve acute grave",
            "widehat widetilde overline",
            "partial nabla infty hbar ell Re Im wp aleph forall exists emptyset",
            "ldots cdots",
        ),
    ),
]
_LINE_OF = {token: line for line in _LINES for token in line}
# In a letter's place, sometimes, a letter of another alphabet; not in the argument of a font command.
_ALPHABETS = (_LOWER, _UPPER, _GREEK, _GREEK_UPPER)
_LETTERS = frozenset(letter for alphabet in _ALPHABETS for letter in alphabet)
_OTHER_ALPHABET = 0.15
_CONSISTENT = 0.5

_DELIMITED = BIG | {r"\left", r"\right", r"\middle", r"\not"}  # the next token is not a relation or letter
# Dimensions, positions and codes follow these in ways of their own.
_LOW_LEVEL = LENGTHS | frozenset(
    _words(
        """
        raise lower raisebox vskip rule put setlength unitlength char symbol mathchar mathaccent special fontsize
        def newcommand let circle line vector makebox framebox parbox buildrel multicolumn cline hbox
        vbox vtop llap rlap hss halign cases matrix pmatrix
        """
    )
)


def vary(text: str, probability: float, rng: np.random.Generator) -> str:
    r"""The formula with some of its letters, digits and symbols exchanged; blanks stay where they are.

    Half of the formulas are changed consistently (every `x` becomes the same other letter), half place by place.

    Args:
        text: LaTeX of one formula.
        probability: of a token (or of a kind of token, when consistent) to be exchanged.
        rng: the choices.

    >>> vary(r"\hspace{2mm} x + \alpha", 1.0, np.random.default_rng(0)).startswith(r"\hspace{2mm}")
    True
    """
    spans = token_spans(text)
    tokens = [text[start:end] for start, end in spans]
    if not _LOW_LEVEL.isdisjoint(tokens):
        return text
    freedom = _freedom(tokens)
    made: dict[tuple[str, int], str] | None = {} if rng.random() < _CONSISTENT else None
    parts, done = [], 0
    for (start, end), token, free in zip(spans, tokens, freedom, strict=True):
        parts.append(text[done:start])
        new = _exchanged(token, free, probability, made, rng)
        parts.append(new)
        if new != token and new[0] == "\\" and text[end : end + 1].isalpha():
            parts.append(" ")
        done = end
    return "".join([*parts, text[done:]])


def _exchanged(
    token: str, free: int, probability: float, made: dict[tuple[str, int], str] | None, rng: np.random.Generator
) -> str:
    """The token or another one in its place; `made` keeps what became of each kind, if that is to be kept."""
    line = _LINE_OF.get(token)
    if line is None or free == _FIXED:
        return token
    if made is not None and (token, free) in made:
        return made[token, free]
    new = token
    if rng.random() < probability:
        if free == _FREE and token in _LETTERS and rng.random() < _OTHER_ALPHABET:
            line = _ALPHABETS[rng.integers(len(_ALPHABETS))]
        new = line[rng.integers(len(line))]
    if made is not None:
        made[token, free] = new
    return new


# What may become of a token: nothing, another one of its line, or also a letter of another alphabet.
_FIXED, _LINE, _FREE = range(3)


def _freedom(tokens: list[str]) -> list[int]:
    """For each token what may become of it, from the groups and arguments in which it stands."""
    freedom = []
    stack = [_FREE]
    arguments: list[int] = []  # freedom of the arguments that follow
    in_brackets = False
    for position, token in enumerate(tokens):
        after_delimited = position > 0 and tokens[position - 1] in _DELIMITED
        if token == "{":
            stack.append(min(stack[-1], arguments.pop(0) if arguments else _FREE))
            freedom.append(_FIXED)
            continue
        if token == "}":
            if len(stack) > 1:
                stack.pop()
            freedom.append(_FIXED)
            continue
        if token == "[" and position and (arguments or tokens[position - 1] == r"\\"):
            in_brackets = True
        freedom.append(_FIXED if in_brackets or after_delimited else stack[-1])
        if in_brackets:
            in_brackets = token != "]"
            continue
        if arguments and not token.startswith("\\"):
            freedom[-1] = min(freedom[-1], arguments.pop(0))  # an argument without braces
            continue
        if token in FONT_SWITCHES:
            stack[-1] = min(stack[-1], _LINE)
        elif token.startswith("\\") and len(token) > 1:
            arguments = _arguments(token)
    return freedom


def _arguments(command: str) -> list[int]:
    """The freedom of each argument behind a command; what an unknown one does with its argument, nobody knows."""
    if command in FONTS or command in TEXTS:
        return [_LINE]
    if command.startswith(r"\begin{"):
        kinds = ENVIRONMENTS.get(command[7:-1], "r")
    elif command.startswith(r"\operatorname"):
        kinds = "r"
    elif command in ARGUMENTS:
        kinds = ARGUMENTS[command]
    else:
        known = command in SYMBOLS or command in _DELIMITED or command.startswith(r"\end{")
        kinds = "" if known or not command[1].isalpha() else "r"
    return [_FIXED if kind == "r" else _FREE for kind in kinds if kind != "o"]
