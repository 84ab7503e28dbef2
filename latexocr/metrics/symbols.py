r"""What the normaliser knows of LaTeX's commands, as data.

A command that is in no table here is unknown: the normaliser then leaves the braces after it alone, because
it cannot know whether they hold an argument (`\foo{ab}`) or a plain group (`\alpha{ab}`).
"""

from __future__ import annotations


def _commands(names: str) -> list[str]:
    """The control words (or symbols) of these names: `alpha beta` -> `\\alpha`, `\\beta`."""
    return ["\\" + name for name in names.split()]


_GREEK = _commands(
    """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa varkappa lambda mu nu
    xi pi varpi rho varrho sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda
    Xi Pi Sigma Upsilon Phi Psi Omega digamma
    """
)
_LETTERS = _commands("aleph beth ell hbar hslash imath jmath wp Re Im partial infty nabla prime emptyset")
# A group around one of these, or around one letter or digit, prints as if the braces were not there, even
# when a script is attached to it: TeX unpacks a group that holds a single ordinary character.
ORDINARY = frozenset([*_GREEK, *_LETTERS])

FONTS = frozenset(
    _commands("mathrm mathbf mathcal mathbb mathfrak mathit mathsf mathtt mathscr mathnormal boldsymbol bm")
)
_ACCENTS = _commands(
    """
    hat tilde bar vec dot ddot dddot check breve acute grave mathring widehat widetilde overline
    underline overbrace underbrace overrightarrow overleftarrow overleftrightarrow underrightarrow
    underleftarrow
    """
)
_CLASSES = _commands("mathop mathrel mathbin mathord mathopen mathclose mathpunct mathinner")
_BOXES = _commands("phantom hphantom vphantom boxed pmb operatorname operatorname* substack pmod pod")
_PAIRS = _commands("frac dfrac tfrac cfrac binom dbinom tbinom stackrel overset underset")
_TEXTS = _commands(
    """
    text textrm textbf textit texttt textsf textup textsc textnormal mbox hbox emph tag tag* ref eqref
    hspace hspace* vspace vspace* mspace
    """
)
_BIG = [rf"\{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m")]

# Arguments of a command, one letter each: m math, r raw (text, lengths, names: copied as it is),
# o optional math in brackets, d one delimiter.
ARGUMENTS: dict[str, str] = {
    **dict.fromkeys([*FONTS, *_ACCENTS, *_CLASSES, *_BOXES], "m"),
    **dict.fromkeys(_PAIRS, "mm"),
    **dict.fromkeys(_TEXTS, "r"),
    **dict.fromkeys([*_BIG, r"\middle"], "d"),
    **dict.fromkeys([r"\sqrt", r"\xrightarrow", r"\xleftarrow", r"\smash"], "om"),
    r"\color": "or",
    r"\textcolor": "orm",
    r"\colorbox": "orr",
}

_PLAIN_ENVIRONMENTS = """
    matrix pmatrix bmatrix Bmatrix vmatrix Vmatrix smallmatrix cases dcases rcases align align* aligned
    split gather gather* gathered multline multline* multlined eqnarray eqnarray* equation equation*
    displaymath math
"""
# Arguments of \begin{...}; an environment that is not here may have any.
ENVIRONMENTS: dict[str, str] = {
    **dict.fromkeys(["array", "tabular"], "or"),
    **dict.fromkeys(["alignat", "alignat*", "alignedat"], "r"),
    **dict.fromkeys(_PLAIN_ENVIRONMENTS.split(), ""),
}

# Switches that hold until the group ends, infix fractions and cell borders: a group around these has an
# effect.
SCOPED = frozenset(
    [
        "&",
        r"\\",
        *_commands(
            """
            rm bf it cal sf tt mit sl sc boldmath unboldmath displaystyle textstyle scriptstyle
            scriptscriptstyle tiny scriptsize footnotesize small normalsize large Large LARGE huge Huge
            color over choose atop above brace brack overwithdelims atopwithdelims cr newline
            """
        ),
    ]
)
# What scripts do not attach to.
SPACES = frozenset(
    [
        "~",
        "\\ ",
        *_commands(
            """
            , ; : ! > quad qquad enspace enskip thinspace medspace thickspace negthinspace negmedspace
            negthickspace hspace hspace* mspace hfill hfil hskip kern mkern mskip allowbreak nobreak
            hline nonumber notag middle relax
            """
        ),
    ]
)

# Commands without arguments, so that braces after them are a plain group. Not \not: it acts on the next
# glyph.
SYMBOLS = ORDINARY.union(
    _commands(
        r"""
        { } | # % & _ $
        limits nolimits displaylimits sum prod coprod int iint iiint oint oiint bigcup bigcap bigvee
        bigwedge bigoplus bigotimes bigodot biguplus bigsqcup arccos arcsin arctan arg cos cosh cot coth
        csc deg det dim exp gcd hom inf injlim ker lg lim liminf limsup ln log max min mod bmod Pr
        projlim sec sin sinh sup tan tanh
        pm mp times div cdot ast star circ bullet cap cup uplus sqcap sqcup vee wedge land lor setminus
        wr diamond Diamond lozenge triangle bigtriangleup bigtriangledown triangleleft triangleright lhd
        rhd oplus ominus otimes oslash odot bigcirc dagger ddagger dag ddag amalg ltimes rtimes square
        Box blacksquare bigstar
        leq le geq ge leqslant geqslant leqq geqq equiv prec succ preceq succeq sim simeq ll gg asymp
        approx cong neq ne doteq propto models perp mid nmid parallel nparallel subset supset subseteq
        supseteq subsetneq supsetneq sqsubseteq sqsupseteq in ni owns notin vdash dashv smile frown
        lesssim gtrsim lessgtr triangleq trianglelefteq therefore because lt gt colon approxeq backsim
        to gets leftarrow rightarrow Leftarrow Rightarrow leftrightarrow Leftrightarrow uparrow
        downarrow Uparrow Downarrow updownarrow Updownarrow mapsto longmapsto longrightarrow
        longleftarrow Longrightarrow Longleftarrow longleftrightarrow Longleftrightarrow hookrightarrow
        hookleftarrow twoheadrightarrow rightharpoonup rightharpoondown leftharpoonup leftharpoondown
        rightleftharpoons nearrow searrow swarrow nwarrow rightsquigarrow leadsto iff implies impliedby
        rightrightarrows leftrightarrows rightleftarrows dashrightarrow circlearrowleft
        langle rangle lfloor rfloor lceil rceil lbrace rbrace lbrack rbrack vert Vert lvert rvert lVert
        rVert backslash slash ulcorner urcorner llcorner lrcorner lgroup rgroup
        dots ldots cdots vdots ddots dotsc dotsb dotsi dotsm hdots forall exists nexists neg lnot top
        bot angle measuredangle varnothing complement flat natural sharp clubsuit diamondsuit heartsuit
        spadesuit surd degree checkmark S P pounds copyright eth mho AA o O ss ae i j l L
        """
    )
)
