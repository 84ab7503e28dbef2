r"""LaTeX -> glyph and rule boxes, and pictures; whatever the text, it costs only itself.

Why: the honest comparison of two formulas is what they print. Many formulas go through one `latex` run, a page
each, and the boxes are read from the DVI file; a picture is drawn from the boxes, so that nothing but glyphs and
rules of a formula ever reaches the drawing program. Without TeX, matplotlib's mathtext stands in: it knows less
LaTeX, and `Rendering.engine` says so.

The texts come from a model or a data set: they are programs of strangers. A text runs without shell, in a private
folder, within limits of time, memory and file size. One that could change what TeX does for its neighbours (it
defines, assigns, reads or writes) runs in a process of its own; the others share one, and known formulas between
them must come out as they should, or the part is run again.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from latexocr import dvi, mathtext, sandbox
from latexocr.dvi import Glyph, Rule
from latexocr.errors import InputError
from latexocr.metrics.tokens import without_comments

logger = logging.getLogger(__name__)

Engine = Literal["latex", "mathtext"]

BATCH_SIZE = 500
# Real formulas: at most 3,000 characters, 15 deep. TeX itself stops at 255 open groups.
MAX_CHARACTERS = 20_000
MAX_DEPTH = 100
MAX_SIDE_PX = 20_000
MAX_PIXELS = 60_000_000  # Pillow warns at 89 million, and refuses to open twice as many
DRAWING_SECONDS = 20.0
_PROBE_EVERY = 50


@dataclass(frozen=True)
class Rendering:
    """What a formula prints, in the order in which TeX prints it; `error` is None if it renders."""

    glyphs: tuple[Glyph, ...]
    rules: tuple[Rule, ...]
    error: str | None
    engine: Engine

    def png(self, *, dpi: int = 150) -> bytes:
        """The print, black on white, cropped to the ink; many at once are quicker through `render_pngs`.

        Raises:
            InputError: nothing to draw, because the formula does not render or is too large for a picture.
        """
        (picture,) = draw([self], dpi=dpi)
        if picture is None:
            raise InputError(f"there is no picture to draw: {self.error or 'blank, or too large'}")
        return picture


def engine_available() -> Engine:
    """`latex` where the programs `latex` and `dvipng` are installed (and a shell to limit them), else `mathtext`."""
    return "latex" if all(map(shutil.which, ("sh", "latex", "dvipng"))) else "mathtext"


def can_typeset() -> bool:
    """Whether `latex` is here for `render`, which needs no `dvipng`."""
    return all(map(shutil.which, ("sh", "latex")))


def render(
    formulas: Sequence[str], *, engine: Engine | None = None, seconds: float = 5.0, preamble: str = ""
) -> list[Rendering]:
    r"""Typeset formulas in display style; a text that fails has `error` set and no boxes.

    Around and in the formula, what only a document needs is accepted: a Markdown fence, `$ $`, `\[ \]`, comments,
    `\label`, `\nonumber`; `align` and its kin are set as `aligned`, a `\tag` behind the formula. Equal texts are
    typeset once.

    Args:
        formulas: LaTeX texts, trusted or not.
        engine: which program; None takes `engine_available()`.
        seconds: wall time that one formula may take before it is stopped; typical is 0.001.
        preamble: LaTeX lines before the document, for other fonts; trusted. mathtext has none.

    Raises:
        InputError: `engine` is unknown, not installed, or does not run.
    """
    engine = engine or engine_available()
    if engine not in ("latex", "mathtext"):
        raise InputError(f"engine {engine!r} is unknown; use latex or mathtext")
    if engine == "latex" and not can_typeset():
        raise InputError("engine latex needs the program latex; install TeX Live, or use mathtext")
    done: dict[str, Rendering] = {}
    batch: list[str] = []
    alone: list[str] = []
    for text in dict.fromkeys(formulas):
        reason = _refusal(text)
        if reason:
            done[text] = _failed(reason, engine)
        elif engine == "mathtext":
            done[text] = _mathtext(text)
        else:
            (alone if _PROGRAM.search(_bare(text)) else batch).append(text)
    for start in range(0, len(batch), BATCH_SIZE):
        _typeset(batch[start : start + BATCH_SIZE], seconds, preamble, done)
    for text in alone:
        _typeset([text], seconds, preamble, done)
    return [done[text] for text in formulas]


def render_pngs(
    formulas: Sequence[str], *, dpi: int = 150, engine: Engine | None = None, seconds: float = 5.0
) -> list[bytes | None]:
    """Pictures of formulas as PNG files, black on white, cropped to the ink; None where there is nothing to draw.

    Args:
        formulas: as for `render`.
        dpi: pixels an inch; the formula is set in 10 point type.
        engine: as for `render`.
        seconds: as for `render`.
    """
    return draw(render(formulas, engine=engine, seconds=seconds), dpi=dpi)


def draw(renderings: Sequence[Rendering], *, dpi: int = 150) -> list[bytes | None]:
    """`render_pngs` for what is typeset already; equal renderings are drawn once."""
    pictures: dict[Rendering, bytes | None] = dict.fromkeys(renderings)
    drawable = [one for one in pictures if (one.glyphs or one.rules) and _fits(one, dpi)]
    for one in drawable:
        if one.engine == "mathtext":
            pictures[one] = mathtext.draw(one.glyphs, one.rules, dpi=dpi)
    by_latex = [one for one in drawable if one.engine == "latex"]
    if by_latex and not shutil.which("dvipng"):
        raise InputError("pictures of what latex has set need the program dvipng; install it, or use mathtext")
    for start in range(0, len(by_latex), BATCH_SIZE):
        part = by_latex[start : start + BATCH_SIZE]
        pictures.update(zip(part, _dvipng(part, dpi), strict=True))
    return [pictures[one] for one in renderings]


def _fits(rendering: Rendering, dpi: int) -> bool:
    items = (*rendering.glyphs, *rendering.rules)
    sides = (
        max(item.x + item.width for item in items) - min(item.x for item in items),
        max(item.y for item in items)
        - min(item.y for item in items)
        + max((r.height for r in rendering.rules), default=0),
    )
    scale = dpi / dvi.POINTS_PER_INCH
    return max(sides) * scale < MAX_SIDE_PX and math.prod(sides) * scale**2 < MAX_PIXELS


def _dvipng(renderings: Sequence[Rendering], dpi: int) -> list[bytes | None]:
    """Drawn from boxes: a DVI file of a formula may hold commands for the drawing program, this one cannot."""
    with tempfile.TemporaryDirectory(prefix="latexocr-") as folder:
        dvi.write(Path(folder, "boxes.dvi"), [(one.glyphs, one.rules) for one in renderings])
        command = ["dvipng", "-T", "tight", "-D", str(dpi), "-bg", "White", "-o", "%d.png", "boxes.dvi"]
        sandbox.run(command, folder=folder, seconds=DRAWING_SECONDS, progress=b"]", num_steps=len(renderings))
        files = [Path(folder, f"{number}.png") for number in range(1, len(renderings) + 1)]
        return [file.read_bytes() if file.exists() else None for file in files]


def _failed(reason: str, engine: Engine) -> Rendering:
    return Rendering((), (), reason, engine)


def _mathtext(text: str) -> Rendering:
    try:
        return Rendering(*mathtext.boxes(_bare(text)), None, "mathtext")
    except ValueError as error:
        return _failed(str(error), "mathtext")


# --- what the text may be -----------------------------------------------------------------------------------------

# Words that reach beyond the formula they stand in: they define, assign globally, read, write, expand, branch or
# end. `^^` writes any character in disguise, and \begin{gdef} is \gdef. A formula with one of them runs alone.
_PROGRAM = re.compile(
    r"\^\^|\\(?:begin|end)\s*(?!\{[A-Za-z]+\*?\})"  # a strange name, or none
    r"|\\(?:begin|end)\s*\{(?:document|filecontents|verbatim|lrbox|thebibliography)"
    r"|\\(?:(?:begin|end)\s*\{)?(?:[gex]?def|(?:bm)?define\w*|let|futurelet|global\w*|long|outer|protected|immediate"
    r"|afterassignment|aftergroup|expandafter"
    r"|noexpand|csname|endcsname|the|string|meaning|jobname|scantokens|(?:lower|upper)case|mag|language"
    r"|(?:cat|lc|uc|math|del|sf)code|(?:math)?chardef|(?:count|dimen|skip|muskip|toks|box|insert)(?:def)?"
    r"|advance|multiply|divide|fontdimen|(?:hyphen|skew)char|font|(?:text|script|scriptscript)font|setbox|wd|ht|dp"
    r"|input\w*|endinput|include\w*|(?:open|close)(?:in|out)|read\w*|write\w*|special|type(?:out|in)|message|err\w+"
    r"|show\w*|shipout|output\w*|deadcycles|(?:begin|end)group|[be]group|if(?!f(?![a-z]))\w*|else|fi|or|loop|repeat"
    r"|end(?!\s*\{)|bye|stop|dump|(?:batch|nonstop|scroll|errorstop)mode|every\w+|tracing\w+|pdf\w+|new\w+|renew\w+"
    r"|(?:New|Renew|Provide|Add|Use|Expand|Input|Load|Activate|Set|Clear|Remove|Push|Pop|Pass|Make)[A-Z]\w+"
    r"|provide\w+|Declare\w+|At(?:Begin|End)\w+|usepackage|Require\w+|documentclass|makeat\w+|ExplSyntax\w+"
    r"|(?:set|addto|step|refstep)counter|verb|lstinline|bibliography\w*|hyphenation|patterns|parshape)(?![A-Za-z])"
)
# Data sets write tokens apart; these TeX wants together: x''^2, \hspace{2mm}, \begin{matrix}.
_SPACED_PRIMES = re.compile(r"'\s+(?=['^])")
_SPACED_WORD = re.compile(r"(\\(?:[hv]space\s*\*?|raisebox|begin|end)\s*\{)([^{}\\]*)\}")
_FENCE = re.compile(r"```(?:latex|tex|math)?(.*?)```", re.DOTALL | re.IGNORECASE)
_ENDS_IN_BACKSLASH = re.compile(r"(?<!\\)(?:\\\\)*\\$")
_BARE_SCRIPT = re.compile(r"(?<!\\)[\^_]\s*(?:$|[}&^_]|\\\\|\\(?:end|right)(?![A-Za-z]))")
_NESTING = re.compile(r"\\(?:begin|end)\s*\{([^{}]*)\}|\\.|[{}$]", re.DOTALL)


def _bare(text: str) -> str:
    """One line without fence, comments and enclosing dollars."""
    fenced = _FENCE.fullmatch(text.strip())
    text = without_comments(fenced[1] if fenced else text)
    text = " ".join(text.split())
    while len(text) > 1 and text[0] == text[-1] == "$" and text[-2] != "\\":
        text = text[1:-1].strip()
    text = _SPACED_WORD.sub(lambda match: f"{match[1]}{match[2].replace(' ', '')}}}", text)
    text = _SPACED_PRIMES.sub("'", text)
    return f"{text} " if _ENDS_IN_BACKSLASH.search(text) else text  # the blank of "\\ " was stripped


def _refusal(text: str) -> str | None:
    """Why TeX need not be asked: it could not set this, and might take the formulas behind it along."""
    if len(text) > MAX_CHARACTERS:
        return f"longer than {MAX_CHARACTERS} characters"
    text = _bare(text)
    if not text:
        return "empty"
    if any(character < " " or character == "\x7f" for character in text):
        return "control character"
    open_groups, dollars = [], 0
    for match in _NESTING.finditer(text):
        token = match[0]
        if token == "{" or token.startswith("\\begin"):
            open_groups.append(match[1])
            if len(open_groups) > MAX_DEPTH:
                return f"nested more than {MAX_DEPTH} deep"
        elif token == "}" or token.startswith("\\end"):
            if not open_groups or open_groups.pop() != match[1]:
                return "unbalanced groups"
        elif token == "$":
            dollars += 1
    if _BARE_SCRIPT.search(text):
        return "script without argument"
    return "unbalanced groups" if open_groups or dollars % 2 else None


# --- one run of latex ---------------------------------------------------------------------------------------------

_PACKAGES = ("mathtools", "mathrsfs", "bm", "stmaryrd", "xcolor", "cancel", "dsfont", "bbm", "braket", "upgreek")
_PREAMBLE = (
    r"\documentclass{article}\usepackage{amsmath,amssymb}"
    + "".join(rf"\IfFileExists{{{name}.sty}}{{\usepackage{{{name}}}}}{{}}" for name in _PACKAGES)
    + r"""%s
\makeatletter
\tracinglostchars=3
\begin{document}
\def\[{}\def\]{}\def\({}\def\){}
\def\lx@as#1#2{\expandafter\let\csname#1\expandafter\endcsname\csname#2\endcsname
  \expandafter\let\csname end#1\expandafter\endcsname\csname end#2\endcsname}
\def\lx@plain{}\let\endlx@plain\lx@plain
\@for\lx@name:=equation,equation*,displaymath,math\do{\lx@as\lx@name{lx@plain}}
\@for\lx@name:=align,align*,flalign,flalign*,eqnarray,eqnarray*,split\do{\lx@as\lx@name{aligned}}
\@for\lx@name:=gather,gather*,multline,multline*\do{\lx@as\lx@name{gathered}}
\@for\lx@name:=alignat,alignat*,xalignat,xalignat*\do{\lx@as\lx@name{alignedat}}
\let\label\@gobble\let\nonumber\relax\let\notag\relax
\def\tag{\@ifstar{\qquad\text}{\lx@tag}}\def\lx@tag#1{\qquad\text{(#1)}}\let\dft@tag\tag
\let\eqno\qquad\let\leqno\qquad
\providecommand\lt{<}\providecommand\gt{>}
\let\lx@shipout\shipout
\newcount\lx@page\newcount\lx@tries
"""
)
# \lx@clean closes what the formula before has left open, group by group as e-TeX tells their kinds; if that fails,
# TeX stops. \par ends a search for arguments, and TeX's count of errors, which stops it at 100.
# \lx@end ships the box as a page whose first box, one scaled point high, is as many scaled points wide as the
# formula's place and one; its baseline is at y = 0.
_COMMANDS = r"""
\def\lx@begin#1{\lx@clean\global\lx@page=#1 \global\advance\lx@page1 \noindent\par
  \message{^^JNONCE#1 }\setbox0\hbox\bgroup}
\def\lx@finish{\lx@clean\message{^^JNONCEend }\batchmode\@@end}
\def\lx@clean{\ifnum\currentgrouplevel=0 \else\errmessage{unbalanced groups}\lx@tries=0 \lx@close\fi
  \ifvmode\else\lx@stop\fi}
\def\lx@close{\ifnum\currentgrouplevel=0 \else
    \ifnum\lx@tries<300 \global\advance\lx@tries1 \lx@closer\else\lx@stop\fi
    \expandafter\lx@close\fi}
\def\lx@closer{\ifcase\currentgrouptype\or\egroup\or\egroup\or\egroup\or\egroup\or\egroup\or\crcr\egroup\or\egroup
  \or\lx@stop\or\egroup\or\egroup\or\egroup\or\egroup\or\egroup\or\endgroup\or$\or\right.\fi}
\def\lx@stop{\batchmode\read16 to\lx@name}
\def\lx@end{\egroup\ht0=0pt\dp0=0pt
  \lx@shipout\hbox{\hbox to0pt{\vrule height1sp depth0pt width\lx@page sp\hss}\box0}}
\makeatother
"""
_PROBE = (
    r"\frac{a}{\sqrt{b}}\left(\begin{matrix}x&y\\z&w\end{matrix}\right)\sum_{i=1}^{n}\hat{\alpha}_i'"
    r"\mathcal{L}\,\mathrm{d}\mathbf{x}\mathbb{R}\text{ if }\overline{\beta}\to\infty"
)


class _Run(NamedTuple):
    """What came of one process: pages and first error by place in the list, and where it stopped short."""

    pages: dict[int, Rendering]
    errors: dict[int, str]
    last: int  # the place whose formula was begun last
    finished: bool


def _typeset(formulas: list[str], seconds: float, preamble: str, done: dict[str, Rendering]) -> None:
    """Fill `done`. A formula that stops TeX is taken out; what may have suffered from another one runs again."""
    while formulas:
        places = _with_probes(formulas)
        run = _run_latex([_PROBE if text is None else text for text in places], seconds, preamble)
        if run.last < 0:
            reason = run.errors.get(-1, "it says nothing")
            raise InputError(f"latex does not start: {reason}; repair TeX Live, or use engine mathtext")
        num_good = _accept(places, run, done)
        formulas = [text for text in places[num_good:] if text is not None]
        if not formulas:
            return
        suspect = None if run.finished else places[run.last]
        if len(places) == 1:
            done[formulas[0]] = _failed(run.errors[0], "latex")
            return
        # Known suspect: it alone, then the others. Else one of them spoils the others: halves.
        part = [suspect] if suspect is not None else formulas[: (len(formulas) + 1) // 2]
        _typeset(part, seconds, preamble, done)
        formulas = [text for text in formulas if text not in done]


def _with_probes(formulas: list[str]) -> list[str | None]:
    """Formulas with a probe (None) first, last and every so often; one that runs alone has nobody to spoil."""
    if len(formulas) == 1:
        return list(formulas)
    places: list[str | None] = []
    for start in range(0, len(formulas), _PROBE_EVERY):
        places += [None, *formulas[start : start + _PROBE_EVERY]]
    return [*places, None]


def _accept(places: list[str | None], run: _Run, done: dict[str, Rendering]) -> int:
    """Take results up to the last probe that came out like the first; returns how many places these are."""
    num_good = int(run.finished) if len(places) == 1 else 0
    for place in (number for number, text in enumerate(places) if text is None):
        if place in run.errors or place not in run.pages or run.pages[place] != run.pages[0]:
            break
        num_good = place + 1
    for place, text in enumerate(places[:num_good]):
        if text is not None:
            reason = run.errors.get(place) or ("" if place in run.pages else "no output")
            done[text] = _failed(reason, "latex") if reason else run.pages[place]
    return num_good


def _run_latex(formulas: list[str], seconds: float, preamble: str) -> _Run:
    # Neither the file's name nor the marker can be guessed by a formula.
    name, nonce = secrets.token_hex(8), secrets.token_hex(8)
    lines = [
        rf"\csname lx@begin\endcsname{{{place}}}$\displaystyle{{{_bare(formula)}}}$\csname lx@end\endcsname"
        for place, formula in enumerate(formulas)
    ]
    body = (
        _PREAMBLE % preamble
        + _COMMANDS.replace("NONCE", nonce)
        + "\n\n".join([*lines, "\\csname lx@finish\\endcsname\n"])
    )
    with tempfile.TemporaryDirectory(prefix="latexocr-") as folder:
        Path(folder, f"{name}.tex").write_text(body, encoding="utf-8", errors="replace")
        command = ["latex", "-no-shell-escape", "-interaction=nonstopmode", "-jobname=out", f"{name}.tex"]
        output = sandbox.run(
            command, folder=folder, seconds=seconds, progress=nonce.encode(), num_steps=len(formulas) + 1
        )
        last, errors, finished = _read_messages(output.text, nonce)
        if -1 in errors and last >= 0:
            logger.warning("latex finds fault with a package, pictures may differ: %s", errors[-1])
        pages = _read_pages(Path(folder, "out.dvi"))
    if not output.finished:
        errors.setdefault(last, f"stopped: no end within {seconds:g} s and the limits of memory and files")
    elif not finished:
        errors.setdefault(last, "ends or silences TeX")
    return _Run(pages, errors, last, finished and output.finished)


def _read_messages(text: str, nonce: str) -> tuple[int, dict[int, str], bool]:
    """The last formula begun, the first error of each, and whether the end was reached."""
    place, errors = -1, {}
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if line.startswith(nonce):
            word = line[len(nonce) :].split()[0]
            if word == "end":
                return place, errors, True
            place = int(word)
        elif line.startswith(("! ", "Missing character:")):
            errors.setdefault(place, _message(line, lines[number + 1 : number + 12]))
    return place, errors, False


def _message(line: str, following: list[str]) -> str:
    """TeX's first line; for an unknown command also which."""
    message = line.removeprefix("! ").rstrip(".")
    if message == "Undefined control sequence":
        context = next((other for other in following if other.startswith("l.")), "")
        word = re.search(r"(\\(?:[A-Za-z]+|.))\s*$", context)
        return f"{message} {word[1]}" if word else message
    return message


def _read_pages(path: Path) -> dict[int, Rendering]:
    """Boxes of every page that is there, by the place that the width of its first rule tells."""
    pages: dict[int, Rendering] = {}
    for glyphs, rules in dvi.read(path) if path.exists() else ():
        if rules and round(rules[0].height * dvi.POINT) == 1:
            place = round(rules[0].width * dvi.POINT) - 1
            baseline = rules[0].y
            pages[place] = Rendering(
                tuple(glyph._replace(y=glyph.y - baseline) for glyph in glyphs),
                tuple(rule._replace(y=rule.y - baseline) for rule in rules[1:]),
                None,
                "latex",
            )
    return pages
