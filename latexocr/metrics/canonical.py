r"""A formula's canonical form: one spelling for everything that prints the same.

Why: `x^2_i`, `x _ { i } ^ 2` and `{x}_{i}^{2}` are one formula. A metric that counts them as different
measures a model's typing habits. Levels build on each other: 0 strips what is not formula, 1 changes only
what does not show (up to horizontal space), 2 ignores sizes, styles and space as well. One pass of a
recursive descent parser writes the canonical tokens as it reads; what it knows of commands is data in
`latexocr.metrics.symbols`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from latexocr.errors import InputError
from latexocr.metrics import symbols as tex
from latexocr.metrics.tokens import level0

LEVELS = (0, 1, 2)
# Real formulas nest up to about 15 deep. The bound keeps the parser within Python's recursion limit.
MAX_DEPTH = 80
# `*{99}{...}` repeats: a longer specification stays as it is.
MAX_COLUMN_TOKENS = 200

_SCRIPTS = {"^": "^", "_": "_", "'": "'", r"\sp": "^", r"\sb": "_"}
# The empty string marks the end of the text. A math delimiter ends the formula.
_CLOSING = frozenset(["", "}", r"\right", r"\begin", r"\end", "$", r"\[", r"\]", r"\(", r"\)"])
_ENDS_RUN = frozenset([*tex.SEPARATORS, *tex.INFIX, *tex.FONT_SWITCHES])
_NO_ARGUMENT = frozenset([*_CLOSING, *_SCRIPTS, *_ENDS_RUN, *tex.SCOPED, r"\not"])
# Style of a script or an argument from the style around it (The TeXbook, chapter 17 and appendix G). Odd
# numbers are the cramped styles, in which exponents stand lower. The style of an option is never asked for.
_STYLE_OF = {
    "^": lambda style: style // 4 * 2 + 4 + style % 2,
    "_": lambda style: style // 4 * 2 + 5,
    "'": lambda style: style,
    "n": lambda style: style + 2 - style // 6 * 2,
    "d": lambda style: style // 2 * 2 + 3 - style // 6 * 2,
    "c": lambda style: style | 1,
    "m": lambda style: style,
    "r": lambda style: style,
    "f": lambda style: style,
    "o": lambda style: 7,
}
# A space ends these, so a script attaches to nothing.
_HOLLOW = (r"\begin{matrix}", r"\begin{smallmatrix}")
_KNOWN = tex.SYMBOLS.union(tex.ARGUMENTS, [r"\left", r"\root"])
_LENGTH = re.compile(r"\s*[-+]?[\d.,]+(?:pt|mm|cm|in|ex|em|bp|pc|dd|cc|sp|mu)")
_COLUMN_SPACE = re.compile(r"[@!]\{(?:\\[ ,;:!]|~|\\q?quad|\\hspace\{[^{}]*\})*\}")
_REPEATED_COLUMN = re.compile(r"\*\{?(\d\d?)\}?\{([^{}]*)\}")
_COLUMN = re.compile(r"[lr]|[pmb]\{[^{}]*\}")


def normalize(latex: str, level: int = 1) -> str:
    r"""Write a formula in canonical form, tokens separated by single spaces.

    Why: to compare formulas as a reader of the page would. Each level includes the ones before:

    - 0 strips blanks, a Markdown code fence, the math delimiters (`$`, `$$`, `\[`, `\(`, `equation`), `%`
      comments and `\label`.
    - 1 changes nothing that is printed in display style but horizontal space: it braces every argument and
      script, drops groups that have no effect, puts the subscript before the superscript and merges primes
      into it; writes fractions and font switches as commands (`a \over b`, `{\bf x}`), one synonym for all
      (`\le`, `\to`, `\operatorname{sin}`), a matrix with its fences for `pmatrix` and `array`; drops
      `\limits` and `\displaystyle` where they are the default, and a last `\\`.
    - 2 also ignores space, the size of delimiters (`\left`, `\big`), style, where limits stand, how columns
      are aligned, and whether upright letters are a text, a name or a font.

    Braces stay where they print something or may: around a script's base of several atoms, around switches
    such as `\color`, and after a command that `latexocr.metrics.symbols` does not know.

    Idempotent at every level. Malformed LaTeX (see `is_formula`) does not raise: levels 1 and 2 then give the
    text of level 0. Time is linear in the text's length.

    Args:
        latex: Any text.
        level: 0, 1 or 2.

    Raises:
        InputError: `level` is none of these.

    >>> normalize(r"$\frac12 {x}^2_i$")
    '\\frac { 1 } { 2 } x _ { i } ^ { 2 }'
    >>> normalize(r"{\rm sin}\, x \over f''") == normalize(r"\frac{\sin\, x}{f^{\prime\prime}}")
    True
    >>> normalize(r"\left(\dfrac12\right)\;", level=2)
    '( \\frac { 1 } { 2 } )'
    """
    return " ".join(normalized_tokens(latex, level=level))


def normalized_tokens(latex: str, *, level: int = 1) -> list[str]:
    """The canonical form as a list of tokens; see `normalize`."""
    if level not in LEVELS:
        raise InputError(f"normalisation level {level!r} is unknown; use one of {', '.join(map(str, LEVELS))}")
    tokens = level0(latex)
    if level == 0:
        return tokens
    canonical = _canonical(tokens, lenient=level == 2)
    return tokens if canonical is None else canonical


def is_formula(latex: str) -> bool:
    r"""Whether the text is well-formed, so that `normalize` needs not fall back to level 0.

    Why: to count the predictions that are no formula. Malformed is what TeX would refuse (braces,
    environments or `\left` without their end, a lost argument, two superscripts on one base) and what nests
    more than 80 deep.

    >>> is_formula(r"\frac{1}{2}"), is_formula(r"\frac{1}{2")
    (True, False)
    """
    return _canonical(level0(latex), lenient=False) is not None


def _canonical(tokens: list[str], *, lenient: bool) -> list[str] | None:
    """Tokens of level 0 in the canonical form of level 1 or 2, or None where they are no formula."""
    try:
        return _Parser(tokens, lenient=lenient).formula()
    except _MalformedError:
        return None


class _MalformedError(Exception):
    """TeX would stop here, so there is no canonical form."""


class _List(NamedTuple):
    """A canonical list of atoms: what stands between braces, a command with its arguments, the whole formula."""

    tokens: list[str]
    num_atoms: int = 1  # a script counts as one more, so 1 means: nothing but one nucleus
    is_scoped: bool = False  # holds a switch, so braces around it have an effect
    is_grouped: bool = False  # braces stand around it, if only for TeX

    def is_solid(self) -> bool:
        """Whether braces around it have no effect even under a script."""
        if self.num_atoms != 1 or self.is_scoped or not self.tokens:
            return False
        first = self.tokens[0]
        if first in tex.ACCENTS and self.tokens[2] in tex.ACCENTS:
            return False
        return first in tex.SOLID or (len(self.tokens) == 1 and first.isalnum())

    def braced(self) -> list[str]:
        return ["{", *self.tokens, "}"] if self.is_grouped else self.tokens


class _Parser:
    """Reads tokens from `position` on; every method leaves it behind what it has read."""

    def __init__(self, tokens: list[str], *, lenient: bool) -> None:
        self.tokens = [*tokens, ""]
        self.lenient = lenient
        self.synonyms = tex.LENIENT_SYNONYMS if lenient else tex.SYNONYMS
        self.position = 0
        self.depth = 0
        self.style = tex.DISPLAY_STYLE
        self.font = ""  # the font switch in force where the last cell ended
        self.infix_openers = _infix_openers(tokens)

    def formula(self) -> list[str]:
        return self._list("", opener=-1).tokens

    def _list(self, stop: str, *, opener: int = -2) -> _List:
        """Read atoms up to the token `stop`, which is not consumed; `opener` is the position of what opened."""
        cells = self._cells(stop, opener=opener)
        if len(cells) == 1:
            return cells[0][1]
        is_scoped = any(cell.is_scoped or separator[:1] in (["&"], [r"\\"]) for separator, cell in cells)
        return _List(_joined(cells), 2, is_scoped)

    def _cells(self, stop: str, *, opener: int, after_unknown: int = 0) -> list[tuple[list[str], _List]]:
        """The cells of a table, each with the separator before it; what is no table has one cell."""
        style = self.style
        cells = [([], self._cell(stop, opener, after_unknown))]
        while self.tokens[self.position] != stop:
            opener = self.position
            separator = self._separator(stop)
            start = self.position
            self.style = style
            cell = self._cell(stop, opener)
            if separator[0] == r"\\":
                cell = _guarded(cell, self.tokens[start] if self.tokens[start - 1] == r"\\" else "")
            cells.append((separator, cell))
        self.style = style
        return cells

    def _separator(self, stop: str) -> list[str]:
        token = self.tokens[self.position]
        if token not in tex.SEPARATORS or (token == r"\middle" and stop != r"\right"):
            raise _MalformedError
        self.position += 1
        if token == r"\middle":
            return self._delimiter() if self.lenient else [token, *self._delimiter()]
        if token != r"\\":
            return [tex.SYNONYMS.get(token, token)]
        length = self._length(self.position + 1) if self.tokens[self.position] == "[" else 0
        if not length or self.tokens[self.position + length + 1] != "]":
            return [token]
        start, self.position = self.position, self.position + length + 2
        return [token] if self.lenient else [token, *self.tokens[start : self.position]]

    def _length(self, start: int) -> int:
        """Number of tokens, one a character, of the length (such as `2pt`) that stands at `start`."""
        match = _LENGTH.match("".join(self.tokens[start : start + 16]))
        return match.end() if match else 0

    def _cell(self, stop: str, opener: int, after_unknown: int = 0) -> _List:
        r"""A cell, where `a \over b` and its like divide the whole of it."""
        if opener not in self.infix_openers:
            return self._runs(stop, after_unknown=after_unknown)
        style = self.style
        self.style = _STYLE_OF["n"](style)
        above = self._runs(stop)
        infix = self.tokens[self.position]
        if infix not in tex.INFIX:
            raise _MalformedError
        self.position += 1
        self.style = _STYLE_OF["d"](style)
        below = self._runs(stop, font=self.font)
        self.style = style
        command = tex.INFIX[infix]
        if command:
            return _List([command, "{", *above.tokens, "}", "{", *below.tokens, "}"])
        return _List([*above.braced(), infix, *below.braced()], 2, is_scoped=True)

    def _runs(self, stop: str, *, font: str = "", after_unknown: int = 0) -> _List:
        r"""Atoms up to `stop` or the end of the cell; `font` is the switch in force, `\bf a \rm b` has two runs."""
        run = self._run(stop, after_unknown)
        if self.tokens[self.position] not in tex.FONT_SWITCHES and not font:
            self.font = font
            return run
        out, num_atoms, is_scoped = [], 0, False
        while True:
            if font and run.tokens:
                run = self._letters(font, run.tokens)
            out += run.braced()
            num_atoms += run.num_atoms
            is_scoped = is_scoped or run.is_scoped
            if self.tokens[self.position] not in tex.FONT_SWITCHES:
                break
            font = tex.FONT_SWITCHES[self.tokens[self.position]]
            self.position += 1
            run = self._run(stop)
        self.font = font
        return _List(out, num_atoms, is_scoped)

    def _run(self, stop: str, after_unknown: int = 0) -> _List:
        """Atoms in one font.

        `after_unknown`: whether an unknown command stands before, which may take any groups as arguments (1),
        or whether we are in its bracketed option (2).
        """
        out: list[str] = []
        num_atoms, is_scoped, lone_group, base = 0, False, False, ""
        while (token := self.tokens[self.position]) != stop and token not in _ENDS_RUN:
            if token in _SCRIPTS:
                if not base:
                    out += ["{", "}"]
                    num_atoms += 1
                num_atoms += self._scripts(out)
                base, after_unknown = token, 0
                continue
            if self._has_no_effect(token, base):
                self.position += 1
                base = base if token in tex.LIMITS or token in tex.DROPPED else ""
                continue
            part = self._element(token)
            if after_unknown and part.tokens in (["["], ["*"]) and part.tokens != [token]:
                part = _List(["{", *part.tokens, "}"])  # a synonym for a bracket opens no option
            after_unknown = _after_unknown(after_unknown, token)
            keeps_braces = part.is_grouped and (
                part.is_scoped
                or (after_unknown and token == "{")
                or (self.tokens[self.position] in _SCRIPTS and token not in _HOLLOW and not part.is_solid())
            )
            if keeps_braces:
                lone_group = not out and part.is_scoped and not after_unknown
                part = _List(["{", *part.tokens, "}"])
            out += part.tokens
            num_atoms += part.num_atoms
            is_scoped = is_scoped or token in tex.SCOPED
            base = "" if token in tex.NO_BASE or token in _HOLLOW or not part.tokens else part.tokens[0]
        if lone_group and num_atoms == 1:  # {{\color{red}x}} is {\color{red}x}
            return _List(out[1:-1], 2, is_scoped=True, is_grouped=True)
        return _List(out, num_atoms, is_scoped)

    def _has_no_effect(self, token: str, base: str) -> bool:
        if token in tex.LIMITS:
            if not base and not self.lenient:
                raise _MalformedError
            return self.lenient or token == self._default_limits(base)
        if token in tex.STYLES:
            return self.lenient or tex.STYLES[token] == self.style
        return token in tex.DROPPED or (self.lenient and token in tex.LENIENT_DROPPED)

    def _default_limits(self, base: str) -> str:
        if base in tex.LIMIT_OPERATORS:
            return r"\limits" if self.style < tex.TEXT_STYLE else r"\nolimits"
        return r"\nolimits" if base in tex.INTEGRALS else ""

    def _scripts(self, out: list[str]) -> int:
        """Read all scripts of a base and write them in order; `x''^2` has one superscript of three atoms."""
        sub: list[str] | None = None
        sup: list[str] | None = None
        has_caret = False
        style = self.style
        while (script := _SCRIPTS.get(self.tokens[self.position])) is not None:
            self.position += 1
            if (script == "_" and sub is not None) or (script != "_" and has_caret):
                raise _MalformedError
            self.style = _STYLE_OF[script](style)
            if script == "_":
                sub = self._argument().tokens
            elif script == "^":
                sup = [*(sup or []), *self._argument().tokens]
                has_caret = True
            else:
                sup = [*(sup or []), r"\prime"]
        self.style = style
        if sub is not None:
            out += ["_", "{", *sub, "}"]
        if sup is not None:
            out += ["^", "{", *sup, "}"]
        return 1

    def _element(self, token: str) -> _List:
        """One atom, or a group or command with all that belongs to it."""
        self.depth += 1
        if self.depth > MAX_DEPTH or token in _CLOSING or token.startswith(r"\end{"):
            raise _MalformedError
        self.position += 1
        if token in tex.ARGUMENTS:
            element = self._command(token)
        elif token == "{":
            element = self._list("}", opener=self.position - 1)._replace(is_grouped=True)
            self.position += 1
        elif token == r"\left":
            element = self._left_right()
        elif token == r"\root":
            element = self._root()
        elif token.startswith(r"\begin{"):
            element = self._environment(token)
        else:
            element = self._symbol(token)
        self.depth -= 1
        return element

    def _symbol(self, token: str) -> _List:
        follower = self.tokens[self.position]
        if token in tex.SPACES and self.lenient:
            self.position += self._length(self.position) if token in tex.LENGTHS else 0
            return _List([], 0)
        if token in tex.STYLES:
            self.style = tex.STYLES[token]
        if token == r"\dots":
            return _List([r"\cdots" if follower in tex.RAISES_DOTS else r"\ldots"])
        if token in tex.BARE_SYNONYMS and follower not in _SCRIPTS:
            return _List([tex.BARE_SYNONYMS[token]])
        return _List([self.synonyms.get(token, token)])

    def _argument(self) -> _List:
        token = self.tokens[self.position]
        if token in _NO_ARGUMENT or token.startswith(r"\end{"):
            raise _MalformedError
        if self._has_no_effect(token, ""):
            self.position += 1
            return _List([], 0)
        argument = self._element(token)
        if _is_unknown(token) and self.tokens[self.position] in ("{", "[", "*"):
            raise _MalformedError  # x^\foo{ab}: nobody knows where the exponent ends
        return _List([tex.BARE_SYNONYMS[token]]) if token in tex.BARE_SYNONYMS else argument

    def _command(self, token: str) -> _List:
        """A command with its arguments, written as the command that prints the same."""
        style = self.style
        name, base_style = tex.STYLED.get(token, (self.synonyms.get(token, token), style))
        if not self.lenient and base_style != style:
            name = token
        arguments = []
        for kind in tex.ARGUMENTS[token]:
            self.style = _STYLE_OF[kind](base_style)
            arguments.append(self._typed_argument(kind))
        self.style = style
        if self.lenient:
            return self._lenient(name, arguments)
        return self._written(name, arguments)

    def _typed_argument(self, kind: str) -> _List:
        if kind == "r":
            return _List(self._raw(), is_grouped=True)
        if kind == "o":
            return _List(self._option(), 0)
        if kind == "f":
            return _List(self._delimiter())
        return self._argument()._replace(is_grouped=True)

    def _lenient(self, name: str, arguments: list[_List]) -> _List:
        """As level 2 writes a command: without what gives room, size or limits only."""
        if name in tex.SPACES or name in tex.PHANTOMS:
            return _List([], 0, is_grouped=name in tex.PHANTOMS)
        if name in tex.BIG:
            return arguments[0]
        if name in (r"\mathop", r"\smash"):
            return arguments[-1]
        if name in tex.TEXTS:
            text = [token for token in arguments[0].tokens if token not in tex.SPACES]
            return self._written(name, [_List(text, is_grouped=True)])
        if name == r"\not" and arguments[0].tokens == [r"\in"]:
            return _List([r"\notin"])
        return self._written(name, arguments)

    def _written(self, name: str, arguments: list[_List]) -> _List:
        tokens = arguments[-1].tokens
        if name in tex.CLASSES:
            return arguments[0]
        if name in tex.TEXTS:
            return self._text(name, tokens)
        if name in tex.FONTS or name in (r"\operatorname", r"\operatorname*"):
            return self._letters(name, tokens)
        if name == r"\mathop" and tokens[:1] == [r"\mathrm"] and len(tokens) > 4 and _word(tokens[2:-1]):
            return self._letters(r"\operatorname*", tokens[2:-1])
        if name == r"\not" and len(tokens) == 1:
            return _List([r"\neq"] if tokens == ["="] else [name, *tokens])
        return _List([name, *(token for argument in arguments for token in argument.braced())])

    def _text(self, name: str, tokens: list[str]) -> _List:
        """Text in a formula; a `\\mbox` does not shrink in scripts."""
        if name in (r"\mbox", r"\hbox") and self.style >= tex.SCRIPT_STYLE and not self.lenient:
            return _List([r"\mbox", "{", *tokens, "}"])
        font = tex.TEXTS[name]
        if _word(tokens):
            return self._letters(font, tokens)
        return _List([r"\text" if font == r"\mathrm" else name, "{", *tokens, "}"])

    def _letters(self, command: str, tokens: list[str]) -> _List:
        r"""Letters in a font: `\mathrm{sin}` and `\operatorname{sin}` are `\sin`."""
        if not tokens:
            return _List([], 0, is_grouped=True)
        word = _word(tokens)
        if word and command in (r"\mathrm", r"\operatorname", r"\operatorname*"):
            has_limits = command == r"\operatorname*"
            names = tex.ALL_NAMES if self.lenient else tex.LIMIT_NAMES if has_limits else tex.NAMES
            if word in names:
                return _List([names[word]])
            command = command if has_limits and not self.lenient else r"\mathrm"
        return _List([command, "{", *tokens, "}"])

    def _option(self) -> list[str]:
        if self.tokens[self.position] != "[":
            return []
        self.position += 1
        tokens = self._list("]").tokens
        self.position += 1
        return _bracketed(tokens)

    def _raw(self) -> list[str]:
        """A braced argument as it is written, without its own braces."""
        start = self.position
        if self.tokens[start] != "{":
            if self.tokens[start] in _NO_ARGUMENT:
                raise _MalformedError
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
        r"""What stands after `\left`, `\big`, ...; `\big{(}` is `\big(`."""
        delimiter = self._argument().tokens
        if len(delimiter) != 1 or delimiter[0] in tex.NO_BASE:
            raise _MalformedError
        return [tex.DELIMITERS.get(delimiter[0], delimiter[0])]

    def _root(self) -> _List:
        style, self.style = self.style, _STYLE_OF["o"](self.style)
        degree = self._list(r"\of").tokens
        self.position += 1
        self.style = _STYLE_OF["c"](style)
        radicand = self._argument().tokens
        self.style = style
        return _List([r"\sqrt", *_bracketed(degree), "{", *radicand, "}"])

    def _left_right(self) -> _List:
        opener = self.position - 1
        left = self._delimiter()
        inner = self._list(r"\right", opener=opener)
        self.position += 1
        right = self._delimiter()
        if left == right == ["."]:
            return inner._replace(is_grouped=True)
        if not self.lenient:
            return _List([r"\left", *left, *inner.tokens, r"\right", *right])
        return _fenced(left[0].replace(".", ""), inner, right[0].replace(".", ""))

    def _environment(self, begin: str) -> _List:
        opener = self.position - 1
        name = begin[len(r"\begin{") : -1]
        end = rf"\end{{{name}}}"
        arguments = [self._typed_argument(kind) for kind in tex.ENVIRONMENTS.get(name, "")]
        style, self.style = self.style, tex.ENVIRONMENT_STYLES.get(name, tex.TEXT_STYLE)
        start = self.position
        cells = self._cells(end, opener=opener, after_unknown=int(name not in tex.ENVIRONMENTS))
        self.position += 1
        self.style = style
        if name in tex.ENVIRONMENTS:
            _drop_last_rows(cells, lenient=self.lenient)
        if name == "array":
            return self._array(arguments, cells)
        if name in tex.FENCED:
            left, right = tex.FENCED[name]
            if self.lenient:
                return _fenced(left, _lenient_table(cells), right)
            return _List([r"\left", left, *_environment("matrix", [], cells).tokens, r"\right", right])
        if self.lenient and name in tex.LENIENT_TABLES:
            left, right = tex.LENIENT_TABLES[name]
            return _fenced(left, _lenient_table(cells, is_aligned=name in tex.ALIGNED), right)
        cells[0] = ([], _guarded(cells[0][1], self.tokens[start]))
        return _environment(name, arguments, cells)

    def _array(self, arguments: list[_List], cells: list[tuple[list[str], _List]]) -> _List:
        r"""An array whose columns are all `c` is a matrix, up to the space beside it."""
        option, columns = arguments
        if len(columns.tokens) > MAX_COLUMN_TOKENS:
            return _environment("array", arguments, cells)
        spec = _COLUMN_SPACE.sub("", "".join(columns.tokens))
        spec = _REPEATED_COLUMN.sub(lambda match: match[2] * int(match[1]), spec)
        if self.lenient:
            option, spec = _List([], 0), _COLUMN.sub("c", spec)
        # In a matrix `\\ [2pt]` would print the brackets, because a blank stands before them.
        needs_array = _num_columns(cells) > tex.MATRIX_COLUMNS or any(len(separator) > 1 for separator, _ in cells)
        if spec.strip("c") or not spec or option.tokens or (needs_array and not self.lenient):
            columns = columns if spec.strip("clr|") else _List(list(spec), is_grouped=True)
            return _environment("array", [option, columns], cells)
        if self.lenient:
            return _lenient_table(cells)
        return _environment("matrix", [], cells)._replace(is_grouped=True)


def _infix_openers(tokens: list[str]) -> set[int]:
    r"""Positions of what opens a cell (a brace, `\left`, `\begin`, `&`, ...) that an infix fraction divides."""
    found: set[int] = set()
    if tex.INFIX.keys().isdisjoint(tokens):
        return found
    openers = [-1]
    for position, token in enumerate(tokens):
        if token in ("{", r"\left") or token.startswith(r"\begin{"):
            openers.append(position)
        elif len(openers) > 1 and (token in ("}", r"\right") or token.startswith(r"\end{")):
            openers.pop()
        elif token in tex.SEPARATORS:
            openers[-1] = position
        elif token in tex.INFIX:
            found.add(openers[-1])
    return found


def _bracketed(tokens: list[str]) -> list[str]:
    return ["[", "{", *tokens, "}", "]"] if "]" in tokens else ["[", *tokens, "]"]


def _joined(cells: list[tuple[list[str], _List]]) -> list[str]:
    return [token for separator, cell in cells for token in (*separator, *cell.tokens)]


def _guarded(cell: _List, source: str) -> _List:
    r"""Keep a bracket or star from being taken for the option of the `\\` or \begin before the cell."""
    if cell.tokens[:1] in (["["], ["*"]) and source != cell.tokens[0]:
        return cell._replace(tokens=["{", "}", *cell.tokens])
    return cell


def _drop_last_rows(cells: list[tuple[list[str], _List]], *, lenient: bool) -> None:
    r"""Drop the empty row after a last `\\`, which does not print; other empty rows at level 2 only."""
    while len(cells) > 1 and cells[-1][0] == [r"\\"] and not cells[-1][1].tokens:
        before, cell = cells[-2]
        is_empty = before[:1] != ["&"] and not cell.tokens
        if cell.tokens == [r"\hline"] or (is_empty and not lenient):
            break
        cells.pop()


def _num_columns(cells: list[tuple[list[str], _List]]) -> int:
    rows = "".join("&" if separator == ["&"] else " " for separator, _ in cells).split()
    return 1 + max(map(len, rows), default=0)


def _environment(name: str, arguments: list[_List], cells: list[tuple[list[str], _List]]) -> _List:
    head = [token for argument in arguments for token in argument.braced()]
    return _List([rf"\begin{{{name}}}", *head, *_joined(cells), rf"\end{{{name}}}"])


def _fenced(left: str, inner: _List, right: str) -> _List:
    """Delimiters of normal size; without a right one the whole is a group, where scripts are concerned."""
    if not left and not right:
        return inner
    tokens = ["{", *inner.tokens, "}"] if inner.is_scoped else inner.tokens
    num_atoms = 1 if inner.is_scoped else inner.num_atoms
    tokens = [*filter(None, [left]), *tokens, *filter(None, [right])]
    return _List(tokens, num_atoms + bool(left) + bool(right), is_grouped=not right)


def _lenient_table(cells: list[tuple[list[str], _List]], *, is_aligned: bool = False) -> _List:
    """Level 2: a matrix, or the contents alone of one cell and of one line of a derivation."""
    if len(cells) == 1:
        return cells[0][1]._replace(is_grouped=True)
    if is_aligned and all(separator in ([], ["&"]) for separator, _ in cells):
        tokens = [token for _, cell in cells for token in cell.tokens]
        return _List(tokens, 2, any(cell.is_scoped for _, cell in cells), is_grouped=True)
    return _environment("matrix", [], cells)._replace(is_grouped=True)


def _word(tokens: list[str]) -> str:
    """The letters and digits, or nothing where something else stands among them."""
    word = "".join(tokens)
    return word if word.isascii() and word.isalnum() else ""


def _is_unknown(token: str) -> bool:
    return token[0] == "\\" and token not in _KNOWN


def _after_unknown(state: int, token: str) -> int:
    """Whether groups may now be arguments of an unknown command: 0 no, 1 yes, 2 we are in its option."""
    if state == 2:
        return 1 if token == "]" else 2
    if token[0] == "\\":
        return int(_is_unknown(token) and not token.startswith(r"\begin{"))
    if not state:
        return 0
    return {"{": 1, "*": 1, "[": 2}.get(token, 0)
