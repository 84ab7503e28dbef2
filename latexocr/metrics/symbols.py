r"""What the normaliser knows of LaTeX's commands, as data.

A command that is in no table here is unknown: the normaliser then leaves the braces after it alone, because
it cannot know whether they hold an argument (`\foo{ab}`) or a plain group (`\alpha{ab}`).

What a table says about printing was checked with `latex` and amsmath, amssymb: tests/test_normalize.py sets
every synonym beside what it stands for and compares the glyphs.
"""

from __future__ import annotations


def _commands(names: str) -> list[str]:
    """The control words (or symbols) of these names: `alpha beta` -> `\\alpha`, `\\beta`."""
    return ["\\" + name for name in names.split()]


def _pairs(words: str) -> dict[str, str]:
    """`a b c d` -> `{a: b, c: d}`."""
    return dict(zip(words.split()[::2], words.split()[1::2], strict=True))


_GREEK = _commands(
    """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa varkappa lambda mu nu
    xi pi varpi rho varrho sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda
    Xi Pi Sigma Upsilon Phi Psi Omega digamma
    """
)
_LETTERS = _commands("aleph beth ell hbar hslash imath jmath wp Re Im partial infty nabla prime emptyset")
# Operators that take limits above and below in display style, unlike \sin or \int.
_LIMIT_NAMES = _commands("injlim lim liminf limsup projlim det gcd inf max min Pr sup")
_NAMES = _commands(
    """
    arccos arcsin arctan arg cos cosh cot coth csc deg dim exp hom ker lg ln log sec sin sinh tan tanh
    """
)
_BIG_OPERATORS = _commands(
    """
    sum prod coprod bigcup bigcap bigvee bigwedge bigoplus bigotimes bigodot biguplus bigsqcup
    """
)
INTEGRALS = frozenset(_commands("int iint iiint oint oiint"))
LIMIT_OPERATORS = frozenset([*_LIMIT_NAMES, *_BIG_OPERATORS, r"\operatorname*"])
# Word -> the command that prints it, without limits and with them.
NAMES = {name[1:]: name for name in _NAMES}
LIMIT_NAMES = {name[1:]: name for name in _LIMIT_NAMES}
ALL_NAMES = NAMES | LIMIT_NAMES

_BINARY = _commands(
    """
    pm mp times div cdot ast star circ bullet cap cup uplus sqcap sqcup vee wedge land lor setminus wr
    diamond bigtriangleup bigtriangledown triangleleft triangleright lhd rhd oplus ominus otimes oslash
    odot bigcirc dagger ddagger amalg ltimes rtimes
    """
)
_RELATIONS = _commands(
    """
    leq le geq ge leqslant geqslant leqq geqq equiv prec succ preceq succeq sim simeq ll gg asymp approx
    doteq propto perp mid nmid parallel nparallel subset supset subseteq supseteq subsetneq supsetneq
    sqsubseteq sqsupseteq in ni owns vdash dashv smile frown lesssim gtrsim lessgtr triangleq
    trianglelefteq trianglerighteq therefore because approxeq backsim
    to gets leftarrow rightarrow Leftarrow Rightarrow leftrightarrow Leftrightarrow mapsto longmapsto
    longrightarrow longleftarrow Longrightarrow Longleftarrow longleftrightarrow Longleftrightarrow
    hookrightarrow hookleftarrow twoheadrightarrow rightharpoonup rightharpoondown leftharpoonup
    leftharpoondown rightleftharpoons nearrow searrow swarrow nwarrow rightsquigarrow leadsto iff implies
    impliedby rightrightarrows leftrightarrows rightleftarrows dashrightarrow dasharrow circlearrowleft
    """
)
# amsmath's \dots prints \cdots before these and \ldots before anything else.
RAISES_DOTS = frozenset([*"+-=<>*:", r"\not", *_BINARY, *_RELATIONS, *_BIG_OPERATORS, *INTEGRALS])

FONTS = frozenset(
    _commands("mathrm mathbf mathcal mathbb mathfrak mathit mathsf mathtt mathscr mathnormal boldsymbol bm")
)
FONT_SWITCHES = {
    switch: rf"\math{font}"
    for switch, font in _pairs(r"\rm rm  \bf bf  \it it  \cal cal  \sf sf  \tt tt  \mit normal").items()
}
# Groups by another name: the class they give an atom shows in the space around it only.
CLASSES = frozenset(_commands("mathrel mathbin mathord mathopen mathclose mathpunct mathinner"))
ACCENTS = frozenset(_commands("hat tilde bar vec dot ddot dddot check breve acute grave mathring widehat widetilde"))
_LONG_ACCENTS = _commands(
    """
    overline overbrace underbrace overrightarrow overleftarrow overleftrightarrow underrightarrow underleftarrow
    """
)
PHANTOMS = frozenset(_commands("phantom hphantom vphantom"))
_BOXES = _commands("mathop boxed pmb operatorname operatorname* pmod pod not underline")
_FRACTIONS = _commands("frac dfrac tfrac cfrac binom dbinom tbinom")
_STACKS = _commands("stackrel overset")
# Text in a formula -> the font command that prints letters and digits with the same glyphs.
TEXTS = _pairs(
    r"""
    \text \mathrm  \textrm \mathrm  \textnormal \mathrm  \textup \mathrm  \mbox \mathrm  \hbox \mathrm
    \textbf \mathbf  \textit \mathit  \emph \mathit  \textsf \mathsf  \texttt \mathtt
    """
)
_RAWS = _commands("textsc tag tag* ref eqref hspace hspace* vspace vspace* mspace")
BIG = frozenset(rf"\{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m"))

# Arguments of a command, one letter each: m math in the style around it, c the same but cramped, ^ and _ math
# in the style of a script, n and d in that of a numerator or denominator, r raw (text, lengths, names: copied
# as it is), o optional math in brackets, f one fence (delimiter).
ARGUMENTS: dict[str, str] = {
    **dict.fromkeys([*FONTS, *CLASSES, *PHANTOMS, *_BOXES], "m"),
    **dict.fromkeys([*ACCENTS, *_LONG_ACCENTS], "c"),
    **dict.fromkeys(_FRACTIONS, "nd"),
    **dict.fromkeys(_STACKS, "^m"),
    **dict.fromkeys([*TEXTS, *_RAWS], "r"),
    **dict.fromkeys(BIG, "f"),
    **dict.fromkeys(_commands("xrightarrow xleftarrow"), "o^"),
    r"\underset": "_m",
    r"\substack": "_",
    r"\sqrt": "oc",
    r"\smash": "om",
    r"\color": "or",
    r"\textcolor": "orm",
    r"\colorbox": "orr",
    r"\multicolumn": "rrm",
}

# A group around one of these, or around one letter or digit, prints as if the braces were not there, even
# when a script is attached to it: TeX unpacks a group of one ordinary character, and the others are boxes.
SOLID = frozenset(
    [
        *_GREEK, *_LETTERS, *_NAMES, *ACCENTS, *_FRACTIONS, *_STACKS, *TEXTS, *BIG,
        *(FONTS - {r"\boldsymbol", r"\bm"}),
        *_commands("sqrt overline underline underset boxed smash operatorname xrightarrow xleftarrow left"),
    ]
)  # fmt: skip

# amsmath stops at more (its MaxMatrixCols); an array does not.
MATRIX_COLUMNS = 10
# Fences around a matrix that have an environment of their own.
FENCED = {
    "pmatrix": ("(", ")"),
    "bmatrix": ("[", "]"),
    "Bmatrix": (r"\{", r"\}"),
    "vmatrix": ("|", "|"),
    "Vmatrix": (r"\|", r"\|"),
}
# Rows of a derivation: the columns are places to align at.
ALIGNED = frozenset(
    [
        "align", "align*", "aligned", "alignat", "alignat*", "alignedat", "flalign", "flalign*", "split", "gather",
        "gather*", "gathered", "multline", "multline*", "multlined", "eqnarray", "eqnarray*",
    ]
)  # fmt: skip
DISPLAYS = frozenset(["equation", "equation*", "displaymath", "math"])
# Level 2: tables that are a matrix but for sizes and space, with the delimiters they print.
LENIENT_TABLES = {
    "smallmatrix": ("", ""),
    "cases": (r"\{", ""),
    "dcases": (r"\{", ""),
    "rcases": ("", r"\}"),
    **dict.fromkeys(["matrix", *ALIGNED], ("", "")),
}
# Arguments of \begin{...}; an environment that is not here may have any.
ENVIRONMENTS: dict[str, str] = {
    **dict.fromkeys([*FENCED, *LENIENT_TABLES, *DISPLAYS], ""),
    **dict.fromkeys(["aligned", "gathered", "multlined"], "o"),
    **dict.fromkeys(["alignat", "alignat*"], "r"),
    **dict.fromkeys(["array", "tabular", "alignedat"], "or"),
}

# Styles as TeX numbers them.
DISPLAY_STYLE, TEXT_STYLE, SCRIPT_STYLE = 0, 2, 4
STYLES = {
    r"\displaystyle": DISPLAY_STYLE,
    r"\textstyle": TEXT_STYLE,
    r"\scriptstyle": SCRIPT_STYLE,
    r"\scriptscriptstyle": 6,
}
# Style of a cell; text style where an environment is not here.
ENVIRONMENT_STYLES = {
    "smallmatrix": SCRIPT_STYLE,
    **dict.fromkeys(["dcases", "rcases", *ALIGNED, *DISPLAYS], DISPLAY_STYLE),
}
SIZES = frozenset(_commands("tiny scriptsize footnotesize small normalsize large Large LARGE huge Huge"))
LIMITS = frozenset(_commands("limits nolimits displaylimits"))
# Infix fraction -> command; without one it stays in place.
INFIX = {r"\over": r"\frac", r"\choose": r"\binom", **dict.fromkeys(_commands("atop brace brack"), "")}
# A switch of font or style ends here, and so does one side of an infix fraction.
SEPARATORS = frozenset(["&", r"\\", r"\cr", r"\middle"])
# What holds until the group ends: a group around these has an effect.
SCOPED = frozenset(
    [
        *STYLES,
        *SIZES,
        *_commands("boldmath unboldmath color above overwithdelims atopwithdelims newline"),
    ]
)
# Prints nothing and takes no room.
DROPPED = frozenset(_commands("relax protect nonumber notag noindent sl sc"))
# Room without a glyph; scripts do not attach to it.
SPACES = frozenset(
    [
        "~",
        "\\ ",
        *_commands(
            """
            , ; : ! > / quad qquad enspace enskip thinspace medspace thickspace negthinspace negmedspace
            negthickspace hspace hspace* vspace vspace* mspace hfill hfil hskip kern mkern mskip
            allowbreak nobreak smallskip medskip bigskip
            """
        ),
    ]
)
LENGTHS = frozenset(_commands("hskip kern mkern mskip"))  # spaces whose length follows without braces
NO_BASE = SPACES | {r"\hline", *SCOPED, *SEPARATORS}


# Print the same glyphs, up to horizontal space, in every style and with every script.
SYNONYMS = _pairs(
    r"""
    \le \leq  \ge \geq  \ne \neq  \to \rightarrow  \gets \leftarrow  \land \wedge  \lor \vee  \lnot \neg
    \owns \ni  \lbrack [  \rbrack ]  \lbrace \{  \rbrace \}  \vert |  \lvert |  \rvert |  \mid |
    \Vert \|  \lVert \|  \rVert \|  \parallel \|  \ast *  \colon :  \setminus \backslash  \perp \bot
    \Box \square  \Diamond \lozenge  \leadsto \rightsquigarrow
    \dasharrow \dashrightarrow  \cdotp \cdot  \ldotp .  \slash /  \iff \Longleftrightarrow
    \implies \Longrightarrow  \impliedby \Longleftarrow  \bm \boldsymbol  \hdots \ldots  \dotsc \ldots
    \dotso \ldots  \dotsb \cdots  \dotsm \cdots  \dotsi \cdots  \cr \\  \> \:  \thinspace \,
    \medspace \:  \thickspace \;  \negthinspace \!
    """
) | {"\\ ": "~"}  # which no `strip` can damage
# MathJax's names: LaTeX has none, so there is no print to compare.
SYNONYMS |= _pairs(r"\lt <  \gt >")
SYNONYMS |= {rf"{size}{side}": size for size in _commands("big Big bigg Bigg") for side in "lrm"}
# As above, but a script stands elsewhere.
BARE_SYNONYMS = _pairs(r"\dag \dagger  \ddag \ddagger")
# A delimiter after \left, \right, \big, ...
DELIMITERS = SYNONYMS | _pairs(r"< \langle  > \rangle")
# Command that prints as another one in one style: the command, the style.
STYLED = {
    r"\dfrac": (r"\frac", DISPLAY_STYLE),
    r"\tfrac": (r"\frac", TEXT_STYLE),
    r"\dbinom": (r"\binom", DISPLAY_STYLE),
    r"\tbinom": (r"\binom", TEXT_STYLE),
}
# Level 2 adds what differs in size, style, space, or the way a symbol is put together.
LENIENT_SYNONYMS = SYNONYMS | _pairs(r"\cfrac \frac  \stackrel \overset  \bigtriangleup \triangle")
LENIENT_DROPPED = frozenset([*SIZES, *_commands("strut mathstrut")])

# Commands without arguments, so that braces after them are a plain group.
SYMBOLS = frozenset(
    [
        *_GREEK, *_LETTERS, *_NAMES, *_LIMIT_NAMES, *_BIG_OPERATORS, *INTEGRALS, *_BINARY, *_RELATIONS, *LIMITS,
        *SYNONYMS, *SYNONYMS.values(), *BARE_SYNONYMS, *DELIMITERS.values(), *STYLES, *SIZES, *DROPPED, *INFIX,
        *FONT_SWITCHES, *SPACES, *SCOPED, *SEPARATORS, r"\hline", r"\sp", r"\sb",
        *_commands(
            r"""
            { } | # % & _ $
            mod bmod triangle Diamond Box square blacksquare bigstar lozenge cong neq models notin lt gt nexists
            uparrow downarrow Uparrow Downarrow updownarrow Updownarrow
            langle rangle lfloor rfloor lceil rceil backslash ulcorner urcorner llcorner lrcorner lgroup rgroup
            dots ldots cdots vdots ddots forall exists neg top bot angle measuredangle varnothing complement
            flat natural sharp clubsuit diamondsuit heartsuit spadesuit surd degree checkmark S P pounds
            copyright eth mho AA o O ss ae i j l L strut mathstrut null
            """
        ),
    ]
)  # fmt: skip
