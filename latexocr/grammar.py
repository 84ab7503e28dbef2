r"""A grammar that writes formulas: school mathematics, papers of physics and mathematics, matrices and cases.

Why: training data that belongs to nobody, in any amount, with every construction as often as wanted. The formulas
mean nothing; they look like formulas.

The rules are data. A line with a name begins a rule, each line under it is a way to write it: how often, then its
tokens. `<name>` stands for a rule, `<name:x>` for what `<name:x>` became before in the same line.
"""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections.abc import Iterator
from functools import cache
from itertools import accumulate

import numpy as np

from latexocr.metrics import normalize

_RULES = r"""
start
  30 <side> <relation> <side>
  20 <expression>
  7 <function> ( <variables> ) = <expression>
  6 <sequence>
  5 <term> <arrow> <term>
  5 <inline>
  5 <equation> , \quad <equation>
  4 <set>
  4 <law>
  8 <table>
  3 <symbol> = <cases>
  3 <rows>
  3 <equation> <end>
  2 <name> : <name> \to <name>
short
  30 <symbol>
  20 <number>
  20 <indexed>
  10 <letter> = <digit>
  8 <symbol> ( <letter> )
  8 <letter> <operator> <letter>
  4 - <symbol>
  4 <accented>
  3 \frac { <digit> } { <digit> }
more
  5 <relation> <side>
  8 <operator> <term>
  3 <operator> <factor> <brackets>
  2 , \quad <equation>
  1 , \qquad <equation>
end
  5 .
  4 ,
  1 ;
equation
  6 <side> <relation> <side>
  2 <indexed> = <expression>
  1 <symbol> = <number>
side
  4 <expression>
  3 <term>
  2 <indexed>
  1 <function> ( <variables> )
expression
  5 <term>
  4 <term> <operator> <term>
  1 <term> <operator> <term> <operator> <term>
  1 - <term>
term
  22 <factor>
  14 <factor> <factor>
  6 <number> <factor>
  4 <factor> <factor> <factor>
  10 <fraction>
  5 <fraction> <factor>
  5 <brackets>
  3 <factor> <brackets>
  4 <sum>
  4 <integral>
  2 <limit>
  3 <derivative>
  3 <elementary>
  1 <braket>
  1 <binomial>
  1 <decorated>
factor
  18 <symbol>
  14 <indexed>
  12 <power>
  7 <tensor>
  6 <accented>
  5 <number>
  4 <root>
  3 <call>
  3 <letter> ^ { \prime }
  1 <letter> ^ { \prime \prime }
  3 <styled>
  2 | <expression> |
  1 \| <factor> \|
  1 <number> !
  1 1 0 ^ { <digit> }
  1 1 0 ^ { - <digit> }
symbol
  12 <letter>
  8 <greek>
  1 <constant>
letter
  10 <lower>
  7 <upper>
lower
  4 x
  2 y
  2 z
  2 t
  2 n
  2 a
  1 b
  1 c
  1 d
  1 e
  1 f
  1 g
  1 h
  2 i
  2 j
  2 k
  1 l
  2 m
  1 o
  2 p
  2 q
  2 r
  2 s
  2 u
  2 v
  1 w
upper
  2 A
  1 B
  1 C
  1 D
  1 E
  1 F
  1 G
  1 H
  1 I
  1 J
  1 K
  2 L
  2 M
  2 N
  1 O
  1 P
  1 Q
  2 R
  2 S
  2 T
  1 U
  2 V
  1 W
  1 X
  1 Y
  1 Z
greek
  3 \alpha
  3 \beta
  2 \gamma
  2 \delta
  2 \epsilon
  2 \varepsilon
  1 \zeta
  1 \eta
  3 \theta
  1 \vartheta
  1 \iota
  2 \kappa
  3 \lambda
  3 \mu
  3 \nu
  2 \xi
  3 \pi
  2 \rho
  1 \varrho
  2 \sigma
  2 \tau
  1 \upsilon
  3 \phi
  2 \varphi
  2 \chi
  3 \psi
  2 \omega
  2 \Gamma
  2 \Delta
  1 \Theta
  2 \Lambda
  1 \Xi
  1 \Pi
  1 \Sigma
  1 \Upsilon
  2 \Phi
  2 \Psi
  2 \Omega
constant
  4 \partial
  3 \infty
  3 \hbar
  3 \ell
  2 \nabla
  1 \Re
  1 \Im
  1 \wp
  1 \aleph
  1 \emptyset
digit
  1 0
  4 1
  4 2
  2 3
  2 4
  1 5
  1 6
  1 7
  1 8
  1 9
number
  12 <digit>
  4 <digit> <digit>
  1 <digit> <digit> <digit>
  1 <digit> . <digit>
  1 <digit> . <digit> <digit>
index
  8 <lower>
  6 <digit>
  5 <greek>
  3 <lower> <lower>
  2 <greek> <greek>
  2 <lower> + 1
  2 <lower> - 1
  1 <lower> , <lower>
  1 \mathrm { <lower> <lower> <lower> }
  1 <upper>
indexed
  12 <symbol> _ { <index> }
  3 <accented> _ { <index> }
  2 <symbol> _ { <index> } ^ { <digit> }
  1 <symbol> _ { <symbol> _ { <index> } }
tensor
  4 <symbol> ^ { <index> }
  4 <symbol> _ { <index> } ^ { <index> }
  2 \partial _ { <greek> } <symbol>
  2 <symbol> ^ { <greek> <greek> }
  2 <symbol> _ { <greek> <greek> }
  1 <upper> _ { <index> } ^ { ( <digit> ) }
power
  10 <symbol> ^ { 2 }
  3 <symbol> ^ { <digit> }
  3 <symbol> ^ { - <digit> }
  3 e ^ { <expression> }
  2 <symbol> ^ { \ast }
  2 <symbol> ^ { \dagger }
  2 <symbol> ^ { <lower> }
  1 <symbol> ^ { <expression> }
  1 <number> ^ { <lower> }
  1 <symbol> ^ { \frac { <digit> } { <digit> } }
  1 <symbol> ^ { <digit> / <digit> }
  1 <symbol> ^ { + }
accented
  5 \bar { <symbol> }
  5 \hat { <symbol> }
  5 \tilde { <symbol> }
  3 \vec { <letter> }
  3 \dot { <symbol> }
  1 \ddot { <symbol> }
  1 \check { <letter> }
  1 \breve { <letter> }
  2 \overline { <symbol> }
  1 \overline { <term> }
  1 \widehat { <symbol> }
  1 \widetilde { <symbol> }
  1 \underline { <symbol> }
  1 \overrightarrow { <upper> <upper> }
styled
  6 \mathcal { <upper> }
  5 \mathbf { <letter> }
  4 \mathrm { <lower> }
  3 \mathbb { <upper> }
  2 \mathfrak { <letter> }
  1 \mathsf { <upper> }
  1 \mathit { <upper> }
  1 \mathscr { <upper> }
  2 \boldsymbol { <greek> }
  2 \mathrm { <word> }
word
  1 T r
  1 t r
  1 d e t
  1 e f f
  1 m a x
  1 c o n s t
  1 <lower> <lower> <lower>
name
  5 <upper>
  3 \mathcal { <upper> }
  3 \mathbb { <upper> }
  1 <upper> \times <upper>
  1 <upper> / <upper>
function
  4 f
  2 g
  1 h
  2 F
  2 <letter>
  2 <greek>
  1 f ^ { \prime }
  1 f ^ { - 1 }
  2 <letter> _ { <index> }
variables
  8 <symbol>
  3 <symbol> , <symbol>
  1 <symbol> , <symbol> , <symbol>
  1 <expression>
call
  3 <function> ( <variables> )
  1 <function> \left ( <fraction> \right )
elementary
  8 <elementaryname> <factor>
  4 <elementaryname> ( <expression> )
  3 <elementaryname> ^ { 2 } <symbol>
  2 <elementaryname> \left ( <fraction> \right )
  2 \log _ { <digit> } <factor>
  1 \exp \left [ <expression> \right ]
elementaryname
  5 \sin
  5 \cos
  2 \tan
  4 \ln
  3 \log
  3 \exp
  2 \sinh
  2 \cosh
  1 \tanh
  1 \cot
  1 \arctan
  1 \arcsin
  1 \arccos
  1 \sec
  1 \csc
  1 \coth
  1 \det
  1 \dim
  1 \ker
  1 \arg
fraction
  4 \frac { <symbol> } { <symbol> }
  5 \frac { <number> } { <number> }
  6 \frac { <expression> } { <expression> }
  3 \frac { 1 } { <expression> }
  3 \frac { <term> } { <factor> }
root
  8 \sqrt { <expression> }
  3 \sqrt { <factor> }
  1 \sqrt [ <digit> ] { <factor> }
  1 \sqrt [ n ] { <expression> }
brackets
  6 ( <expression> )
  2 ( <expression> ) ^ { <digit> }
  2 [ <expression> ]
  3 \left ( <expression> \right )
  3 \left ( <fraction> <operator> <term> \right )
  1 \left ( <expression> \right ) ^ { <digit> }
  2 \left [ <expression> \right ]
  1 \left \{ <expression> \right \}
  1 \left | <fraction> \right |
  1 \left . <factor> \right | _ { <letter> = <digit> }
  1 \Big ( <expression> \Big )
  1 \{ <factor> , <factor> \}
  1 [ <factor> , <factor> ]
  1 \langle <factor> , <factor> \rangle
  1 \lfloor <term> \rfloor
braket
  3 | <symbol> \rangle
  3 \langle <symbol> | <symbol> \rangle
  2 \langle <symbol> | <accented> | <symbol> \rangle
  2 \langle <factor> \rangle
sum
  5 \sum _ { <lower:i> = <digit> } ^ { <upper> } <symbol> _ { <lower:i> }
  4 \sum _ { <lower> = <digit> } ^ { \infty } <term>
  4 \sum _ { <lower> } <term>
  2 \prod _ { <lower:i> = 1 } ^ { <lower> } <symbol> _ { <lower:i> }
  1 \prod _ { <lower> < <lower> } <brackets>
  1 <bigoperator> _ { <lower> } <indexed>
bigoperator
  2 \bigoplus
  2 \bigcup
  2 \bigcap
  1 \bigotimes
  1 \coprod
  1 \bigwedge
integral
  4 \int <term> d <lower>
  4 \int _ { <digit> } ^ { <symbol> } <term> d <lower>
  4 \int d ^ { <digit> } <lower> <term>
  3 \int _ { <digit> } ^ { \infty } d <symbol> <term>
  2 \int \frac { d <symbol> } { <factor> } <factor>
  2 \int _ { <upper> } <term>
  1 \oint _ { <upper> } <term> d <lower>
  1 \iint _ { <upper> } <term> d x d y
limit
  4 \lim _ { <lower> \to <digit> } <term>
  4 \lim _ { <lower> \to \infty } <term>
  1 \max _ { <lower> } <term>
  1 \min _ { <lower> } <term>
  1 \sup _ { <lower> \in <upper> } <call>
  1 \inf _ { <lower> } <factor>
derivative
  3 \frac { d <symbol> } { d <symbol> }
  3 \frac { \partial <symbol> } { \partial <indexed> }
  2 \frac { d ^ { 2 } <symbol> } { d <lower:x> ^ { 2 } }
  2 \frac { \partial ^ { 2 } <symbol> } { \partial <symbol> \partial <symbol> }
  2 \frac { \delta <factor> } { \delta <factor> }
  1 \nabla ^ { 2 } <symbol>
  1 \partial _ { <greek> } \partial ^ { <greek> } <symbol>
binomial
  1 \binom { <lower> } { <lower> }
  1 \binom { <number> } { <lower> }
decorated
  2 \underbrace { <expression> } _ { <number> }
  2 \stackrel { <symbol> } { <symbol> }
  1 \overset { <symbol> } { <relation> }
  1 \underset { <lower> } { <symbol> }
  1 \overbrace { <expression> } ^ { <lower> }
operator
  20 +
  20 -
  3 \cdot
  3 \times
  2 \pm
  1 \mp
  2 \otimes
  1 \oplus
  1 \wedge
  1 \cup
  1 \cap
  1 \circ
  1 \ast
  1 \star
  1 \bullet
  1 \div
  1 /
relation
  40 =
  3 <
  3 >
  3 \leq
  3 \geq
  2 \neq
  3 \equiv
  2 \approx
  2 \sim
  1 \simeq
  1 \cong
  1 \propto
  2 \in
  1 \subset
  1 \subseteq
  1 \ll
  1 \gg
  1 \perp
  1 \notin
arrow
  6 \to
  2 \rightarrow
  2 \Rightarrow
  2 \mapsto
  1 \longrightarrow
  1 \leftrightarrow
  1 \Leftrightarrow
  1 \hookrightarrow
  1 \leftarrow
  1 \xrightarrow { <symbol> }
sequence
  4 <lower:x> _ { 1 } , <lower:x> _ { 2 } , \ldots , <lower:x> _ { <lower> }
  2 <symbol> , <symbol> , <symbol>
  2 <lower:x> _ { 1 } + <lower:x> _ { 2 } + \cdots + <lower:x> _ { n }
  2 <symbol> = <digit> , <digit> , \ldots , <upper>
  2 ( <number> , <number> )
  1 ( <expression> , <expression> )
set
  3 \{ <lower:x> | <lower:x> <relation> <term> \}
  2 <upper> = \{ <number> , <number> , <number> \}
  2 \forall <lower:x> \in <name> , <lower:x> <relation> <term>
  1 \exists <lower> \in <name>
  1 <upper> \cap <upper> = \emptyset
  1 <lower> \in [ <number> , <number> )
law
  1 <lower> ^ { 2 } + <lower> ^ { 2 } = <lower> ^ { 2 }
  1 \sin ^ { 2 } <symbol:x> + \cos ^ { 2 } <symbol:x> = 1
  1 <lower:a> x ^ { 2 } + <lower> x + <lower> = 0
  1 d s ^ { 2 } = <expression> d <symbol:t> ^ { 2 } + d <lower:x> ^ { 2 }
  1 [ <accented> , <accented> ] = i \hbar
  1 S = \int d ^ { <digit> } x \sqrt { - g } <brackets>
  1 <digit> <elementaryname> <greek> = <number>
  1 <upper:A> ( <number> , <number> )
  1 \angle <upper> <upper> <upper> = <number> ^ { \circ }
  1 \triangle <upper> <upper> <upper>
  1 <number> \equiv <number> \pmod { <number> }
  1 <lower> \bmod <number>
inline
  1 <symbol> / <symbol>
  1 <digit> : <digit> = <symbol> : <digit>
  1 <number> \%
  1 <symbol> \mathrm { <word> } <symbol>
  1 \mathrm { <word> } \quad <symbol> = <number>
  1 \cdots <operator> <term>
table
  4 \left ( \begin{matrix} <cells2> \\ <cells2> \end{matrix} \right )
  3 \left ( \begin{matrix} <cells3> \\ <cells3> \\ <cells3> \end{matrix} \right )
  2 <symbol> = \left ( \begin{matrix} <cells2> \\ <cells2> \end{matrix} \right )
  2 <symbol> = \left [ \begin{matrix} <cells3> \\ <cells3> \end{matrix} \right ]
  2 \left ( \begin{matrix} <cell> \\ <cell> \end{matrix} \right )
  2 \left | \begin{matrix} <cells2> \\ <cells2> \end{matrix} \right |
  1 \begin{matrix} <cells2> \\ <cells2> \end{matrix}
  1 \left ( \begin{matrix} <wide> \\ \vdots & \ddots & \vdots \\ <wide> \end{matrix} \right )
wide
  1 <symbol> & \cdots & <symbol>
cells2
  1 <cell> & <cell>
cells3
  1 <cell> & <cell> & <cell>
cell
  5 0
  3 1
  3 <number>
  2 - <digit>
  5 <symbol>
  3 <indexed>
  1 <expression>
cases
  3 \begin{cases} <expression> , & <condition> \\ <expression> , & <condition> \end{cases}
  1 \begin{cases} <term> & <condition> \\ <term> & <condition> \\ <term> & <condition> \end{cases}
  1 \left \{ \begin{matrix} <equation> \\ <equation> \end{matrix} \right .
condition
  3 <lower> <relation> <number>
  1 \mathrm { i f } ~ <lower> <relation> <term>
  1 \mathrm { o t h e r w i s e }
rows
  3 \begin{aligned} <side> & = <expression> \\ & = <expression> \end{aligned}
  1 \begin{aligned} <side> & = <expression> \\ <side> & = <expression> \end{aligned}
"""

# What mathtext does not know.
_NEEDS_TEX = re.compile(
    r"\\(?:begin|stackrel|overset|underset|underbrace|overbrace|underline|xrightarrow|bmod|pmod|Big|mathscr)(?![a-z])"
)
_SLOT = re.compile(r"<([a-z0-9]+)(?::([a-zA-Z]))?>$")
# (fewest tokens, most) of a label, and how many formulas of a hundred have that length.
LENGTHS = {(1, 3): 8, (4, 10): 22, (11, 25): 27, (26, 50): 23, (51, 100): 15, (101, 150): 5}
_SLACK = 3  # without it the flattest way (\binom for a term) would come too often
_TRIES = 20


def formulas(rng: np.random.Generator, *, max_tokens: int = 150, tex: bool = True) -> Iterator[str]:
    """Canonical formulas without end, tokens separated by blanks; they may repeat.

    Args:
        rng: all choices.
        max_tokens: most tokens of a formula.
        tex: False leaves out what only TeX can set.
    """
    bounds = [(low, min(high, max_tokens)) for low, high in LENGTHS if low <= max_tokens]
    weights = np.array(list(LENGTHS.values())[: len(bounds)], float)
    while True:
        low, high = bounds[rng.choice(len(bounds), p=weights / weights.sum())]
        for _ in range(_TRIES):
            tokens = _formula(rng, int(rng.integers(low, high, endpoint=True)), tex)
            text = normalize(" ".join(tokens)) if low <= len(tokens) <= high else ""
            if low <= len(text.split()) <= high:
                yield text
                break


def _formula(rng: np.random.Generator, length: int, tex: bool) -> list[str]:
    """A formula of about so many tokens: a start, and more of it until it is long enough."""
    if length <= 3:
        return _written("short", rng, 0, tex)
    depth = int(rng.integers(1 if length <= 10 else 3, 4 if length <= 10 else 9))
    tokens = _written("start", rng, depth, tex)
    while len(tokens) < 0.8 * length and tokens[-1] not in ".,;":
        tokens += _written("more", rng, depth, tex)
    return tokens


def _written(name: str, rng: np.random.Generator, depth: int, tex: bool) -> list[str]:
    """A rule written out, not much deeper than `depth` where there is a choice."""
    ways, shares = _choices(name, depth, tex)
    written: dict[str, list[str]] = {}
    tokens: list[str] = []
    for token, rule in ways[bisect(shares, rng.random() * shares[-1])]:
        if rule is None:
            tokens.append(token)
        elif ":" in token and token in written:
            tokens += written[token]
        else:
            written[token] = _written(rule, rng, depth - 1, tex)
            tokens += written[token]
    return tokens


_Way = list[tuple[str, str | None]]  # the tokens of a line; with each the rule that it stands for


@cache
def _choices(name: str, depth: int, tex: bool) -> tuple[list[_Way], list[float]]:
    """The ways to write a rule that are flat enough, and the running sum of their weights."""
    ways = _rules(tex)[name]
    deepest = max(depth, min(way_depth for _, _, way_depth in ways) + _SLACK)
    kept = [(weight, way) for weight, way, way_depth in ways if way_depth <= deepest]
    return [way for _, way in kept], list(accumulate(weight for weight, _ in kept))


@cache
def _rules(tex: bool) -> dict[str, list[tuple[float, _Way, float]]]:
    """For each rule its ways: weight, tokens, and how deep they go at the least.

    A way is one deeper than the deepest rule in it, a rule as deep as its flattest way.
    """
    rules: dict[str, list[tuple[float, _Way]]] = {}
    for line in _RULES.strip().split("\n"):
        if not line.startswith(" "):
            rules[line] = ways = []
        elif tex or not _NEEDS_TEX.search(line):
            weight, *tokens = line.split()
            slots = [_SLOT.match(token) for token in tokens]
            ways.append((float(weight), [(t, slot and slot[1]) for t, slot in zip(tokens, slots, strict=True)]))
    depths: dict[str, float] = dict.fromkeys(rules, math.inf)

    def depth_of(way: _Way) -> float:
        return 1 + max((depths[rule] for _, rule in way if rule), default=-1)

    for _ in rules:
        depths = {name: min((depth_of(way) for _, way in ways), default=math.inf) for name, ways in rules.items()}
    measured = {name: [(weight, way, depth_of(way)) for weight, way in ways] for name, ways in rules.items()}
    return {name: [way for way in ways if way[2] < math.inf] for name, ways in measured.items()}
