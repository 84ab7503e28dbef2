r"""A formula's canonical form: one spelling for everything that prints the same.

Why: `x^2_i`, `x _ { i } ^ 2` and `{x}_{i}^{2}` are one formula. A metric that counts them as different
measures a model's typing habits. Levels build on each other: 0 strips what is not formula, 1 changes only
what does not show (up to horizontal space). One pass of a recursive descent parser writes the canonical
tokens as it reads; what it knows of commands is data in `latexocr.metrics.symbols`.
"""

from __future__ import annotations

from typing import NamedTuple

from latexocr.errors import InputError
from latexocr.metrics.symbols import ARGUMENTS, ENVIRONMENTS, FONTS, ORDINARY, SCOPED, SPACES, SYMBOLS
from latexocr.metrics.tokens import level0

LEVELS = (0, 1)
# Real formulas nest up to about 15 deep. The bound keeps the parser within Python's recursion limit.
MAX_DEPTH = 100

_SCRIPTS = {"^": "^", "_": "_", "'": "'", r"\sp": "^", r"\sb": "_"}
# The empty string marks the end of the text.
_CLOSING = frozenset(["", "}", r"\right", r"\begin", r"\end"])


def normalize(latex: str, level: int = 1) -> str:
    r"""Write a formula in canonical form, tokens separated by single spaces.

    Why: to compare formulas as a reader of the page would. Level 0 strips blanks, a Markdown code fence,
    the math delimiters (`$`, `$$`, `\[`, `\(`, `equation`), `%` comments and `\label`. Level 1 also braces
    every argument and script, drops groups that have no effect, puts the subscript before the superscript
    and merges primes into it. Braces stay where they print something or may: around a script's base of
    several atoms, around switches such as `\bf` and `\over`, and after a command that
    `latexocr.metrics.symbols` does not know.

    Idempotent at every level. Malformed LaTeX (unbalanced, cut off, two superscripts on one base, nested
    more than 100 deep) does not raise: level 1 then gives the text of level 0. Time is linear in the text's
    length.

    Args:
        latex: Any text.
        level: 0 or 1.

    Raises:
        InputError: `level` is neither.

    >>> normalize(r"$\frac12 {x}^2_i$")
    '\\frac { 1 } { 2 } x _ { i } ^ { 2 }'
    >>> normalize(r"f''") == normalize(r"f^{\prime\prime}")
    True
    """
    return " ".join(normalized_tokens(latex, level=level))


def normalized_tokens(latex: str, *, level: int = 1) -> list[str]:
    """The canonical form as a list of tokens; see `normalize`."""
    if level not in LEVELS:
        raise InputError(f"normalisation level {level!r} is unknown; use one of {', '.join(map(str, LEVELS))}")
    tokens = level0(latex)
    if level == 0:
        return tokens
    canonical = level1(tokens)
    return tokens if canonical is None else canonical


def level1(tokens: list[str]) -> list[str] | None:
    """Tokens of level 0 in the canonical form of level 1, or None where they are no well-formed formula."""
    try:
        return _Parser(tokens).parse_list("").tokens
    except _MalformedError:
        return None


class _MalformedError(Exception):
    """TeX would stop here, so there is no canonical form."""


class _List(NamedTuple):
    """A canonical list of atoms: what stands between braces, or the whole formula."""

    tokens: list[str]
    num_atoms: int  # a script counts as one more, so 1 means: nothing but one nucleus
    is_scoped: bool  # holds a switch, so braces around it have an effect

    def is_ordinary(self) -> bool:
        """Whether braces around it have no effect even under a script."""
        if self.num_atoms != 1 or self.is_scoped:
            return False
        first = self.tokens[0]
        return first in FONTS or (len(self.tokens) == 1 and (first.isalnum() or first in ORDINARY))


class _Parser:
    """Reads tokens from `position` on; every method leaves it behind what it has read."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = [*tokens, ""]
        self.position = 0
        self.depth = 0

    def parse_list(self, stop: str, *, opens: bool = False, after_unknown: int = 0) -> _List:
        r"""Read atoms up to the token `stop`, which is not consumed.

        Two things that have just been written decide about the braces that follow. `opens`: a row separator
        or \begin, which would take a bracket or star for its option. `after_unknown`: an unknown command,
        which may take any groups as arguments (1), or sits in its bracketed option (2).
        """
        self._enter()
        out: list[str] = []
        num_atoms, is_scoped, lone_group, has_base, starts_open = 0, False, False, False, opens
        while (token := self.tokens[self.position]) != stop:
            if token == "{":
                group = self._group()
                follower = self.tokens[self.position]
                has_base = True
                after_unknown = after_unknown and _after_unknown(after_unknown, token)
                if after_unknown or self._has_effect(group, follower, opens):
                    lone_group = num_atoms == 0 and group.is_scoped and not (starts_open or after_unknown)
                    out += ["{", *group.tokens, "}"]
                    num_atoms += 1
                    opens = False
                else:
                    out += group.tokens
                    num_atoms += group.num_atoms
                    opens = opens and not group.num_atoms
                continue
            num_atoms += 1
            if token in _SCRIPTS:
                if not has_base:
                    out += ["{", "}"]
                    num_atoms += 1
                self._scripts(out)
                has_base = opens = False
            elif token in ARGUMENTS or token == r"\left" or token.startswith(r"\begin{"):
                out += self._command(token)
                has_base = token not in SPACES and token not in SCOPED
            elif token in _CLOSING or token.startswith(r"\end{"):
                raise _MalformedError
            else:
                self.position += 1
                out.append(token)
                has_base = token not in SPACES and token not in SCOPED
            is_scoped = is_scoped or token in SCOPED
            opens = token == r"\\"
            after_unknown = _after_unknown(after_unknown, token)
        self.depth -= 1
        if lone_group and num_atoms == 1:  # {{\bf x}} is {\bf x}
            return _List(out[1:-1], 2, True)
        return _List(out, num_atoms, is_scoped)

    def _enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _MalformedError

    def _group(self) -> _List:
        self.position += 1
        group = self.parse_list("}")
        self.position += 1
        return group

    def _has_effect(self, group: _List, follower: str, opens: bool) -> bool:
        if follower in _SCRIPTS:
            return not group.is_ordinary()
        first = group.tokens[0] if group.tokens else follower
        return group.is_scoped or (opens and first in ("[", "*"))

    def _scripts(self, out: list[str]) -> None:
        """Read all scripts of a base and write them in order; `x''^2` has one superscript of three atoms."""
        sub: list[str] | None = None
        sup: list[str] | None = None
        has_caret = False
        while (script := _SCRIPTS.get(self.tokens[self.position])) is not None:
            self.position += 1
            if (script == "_" and sub is not None) or (script != "_" and has_caret):
                raise _MalformedError
            if script == "_":
                sub = self._argument()
            elif script == "^":
                sup = [*(sup or []), *self._argument()]
                has_caret = True
            else:
                sup = [*(sup or []), r"\prime"]
        if sub is not None:
            out += ["_", "{", *sub, "}"]
        if sup is not None:
            out += ["^", "{", *sup, "}"]

    def _argument(self) -> list[str]:
        token = self.tokens[self.position]
        if token == "{":
            return self._group().tokens
        if token in ARGUMENTS or token == r"\left" or token.startswith(r"\begin{"):
            return self._command(token)
        self._refuse_structure(token)
        self.position += 1
        if _is_unknown(token) and self.tokens[self.position] in ("{", "[", "*"):
            raise _MalformedError  # x^\foo{ab}: nobody knows where the exponent ends
        return [token]

    def _refuse_structure(self, token: str) -> None:
        if token in _CLOSING or token in _SCRIPTS or token in SCOPED or token.startswith(r"\end{"):
            raise _MalformedError

    def _command(self, token: str) -> list[str]:
        r"""A command with its arguments, a `\left` ... `\right` or an environment."""
        self._enter()
        self.position += 1
        if token == r"\left":
            out = self._left_right()
        elif token in ARGUMENTS:
            out = [token]
            for kind in ARGUMENTS[token]:
                out += self._typed_argument(kind)
        else:
            out = self._environment(token)
        self.depth -= 1
        return out

    def _typed_argument(self, kind: str) -> list[str]:
        if kind == "m":
            return ["{", *self._argument(), "}"]
        if kind == "r":
            return ["{", *self._raw(), "}"]
        if kind == "o":
            return self._option()
        return self._delimiter()

    def _option(self) -> list[str]:
        if self.tokens[self.position] != "[":
            return []
        self.position += 1
        tokens = self.parse_list("]").tokens
        self.position += 1
        return ["[", "{", *tokens, "}", "]"] if "]" in tokens else ["[", *tokens, "]"]

    def _raw(self) -> list[str]:
        """A braced argument as it is written, without its own braces."""
        start = self.position
        if self.tokens[start] != "{":
            self._refuse_structure(self.tokens[start])
            self.position += 1
            return self.tokens[start : start + 1]
        depth = 0
        while True:
            token = self.tokens[self.position]
            if not token:
                raise _MalformedError
            depth += (token == "{") - (token == "}")
            self.position += 1
            if not depth:
                return self.tokens[start + 1 : self.position - 1]

    def _delimiter(self) -> list[str]:
        token = self.tokens[self.position]
        if token == "{":  # \big{(} is \big(
            group = self._group()
            is_bare = len(group.tokens) == 1 and not group.is_scoped
            return group.tokens if is_bare else ["{", *group.tokens, "}"]
        self._refuse_structure(token)
        self.position += 1
        return [token]

    def _left_right(self) -> list[str]:
        left = self._fence()
        inner = self.parse_list(r"\right").tokens
        self.position += 1
        return [r"\left", left, *inner, r"\right", self._fence()]

    def _fence(self) -> str:
        token = self.tokens[self.position]
        if token == "{":
            raise _MalformedError
        self._refuse_structure(token)
        self.position += 1
        return token

    def _environment(self, begin: str) -> list[str]:
        name = begin[len(r"\begin{") : -1]
        out = [begin]
        for kind in ENVIRONMENTS.get(name, ""):
            out += self._typed_argument(kind)
        end = rf"\end{{{name}}}"
        out += self.parse_list(end, opens=True, after_unknown=int(name not in ENVIRONMENTS)).tokens
        self.position += 1
        return [*out, end]


def _is_unknown(token: str) -> bool:
    return token[0] == "\\" and not (
        token in SYMBOLS or token in SPACES or token in SCOPED or token in ARGUMENTS or token in _SCRIPTS
    )


def _after_unknown(state: int, token: str) -> int:
    """Whether groups may now be arguments of an unknown command: 0 no, 1 yes, 2 we are in its option."""
    if state == 2:
        return 1 if token == "]" else 2
    if token[0] == "\\":
        return int(_is_unknown(token) and token != r"\left" and not token.startswith(r"\begin{"))
    if not state:
        return 0
    return {"{": 1, "*": 1, "[": 2}.get(token, 0)
