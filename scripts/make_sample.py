r"""Make the bundled sample: pictures of formulas that a small grammar writes and matplotlib renders.

Why: quickstart and tests need real pictures with labels that may be shipped. Nothing is taken from a data set: the
formulas come from the grammar below, the pictures from matplotlib's mathtext with its Computer Modern fonts.

    python scripts/make_sample.py --output data/sample

The texts depend on the seed alone. The pictures also depend on matplotlib (layout, fonts, FreeType), the bytes of
the files on Pillow (compression); the bundled ones were made with matplotlib 3.11.2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

# the checkout, not scripts/ (its names would shadow packages)
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from latexocr.errors import InputError
from latexocr.metrics import normalize, tokenize

if TYPE_CHECKING:
    from PIL import Image

RENDERED_WITH = "3.11.2"  # matplotlib's version
MARGIN = 6  # pixels of white around the ink
DPI = 144  # 12 pt are 24 pixels
NUM_GREYS = 16  # one step in 16 cannot be seen and halves the files
# (fewest tokens, most tokens) and how many formulas of a hundred have that length
LENGTHS = {(1, 3): 12, (4, 8): 38, (9, 14): 30, (15, 25): 20}

# Letters that are hard to tell apart in print are left out: l and 1, o and 0, v and \nu, w and \omega, ...
LETTERS = "abcdefghkmnpqrstuxyzABCDEFGHKLMNPRSTVXY"
VARIABLES = "xyztuabnk"
INDICES = "ijknm"
GREEK_NAMES = """
    alpha beta gamma delta epsilon zeta eta theta kappa lambda mu xi pi rho sigma tau phi psi omega
    Gamma Delta Theta Lambda Phi Psi Omega
"""
GREEK = [rf"\{name}" for name in GREEK_NAMES.split()]
FUNCTIONS = [r"\sin", r"\cos", r"\tan", r"\log", r"\ln", r"\exp", r"\sinh", r"\cosh"]
RELATIONS = ["=", "=", "=", "<", ">", r"\leq", r"\geq", r"\neq", r"\approx", r"\equiv", r"\sim"]
ARROWS = [r"\to", r"\Rightarrow", r"\in", r"\subset"]
OPERATORS = ["+", "+", "+", "-", "-", "-", r"\cdot", r"\times", r"\pm"]


def make_sample(*, output: Path, num_rows: int = 400, seed: int = 0) -> str:
    """Write `images/000000.png` ... and `metadata.jsonl`: an `imagefolder` with the columns image and text.

    Args:
        output: Folder to write; its README.md is left alone.
        num_rows: Number of formulas, all distinct.
        seed: Another seed gives other formulas.

    Raises:
        InputError: `output` holds pictures that are not of this sample.
    """
    from tqdm import tqdm

    images_dir = output / "images"
    images_dir.mkdir(parents=True, exist_ok=True)
    names = [f"{row:06d}.png" for row in range(num_rows)]
    strangers = sorted({path.name for path in images_dir.iterdir()} - set(names))
    if strangers:
        raise InputError(
            f"{images_dir}: {len(strangers)} files are not of this sample ({strangers[0]}); "
            "remove them or choose another --output"
        )
    rows = []
    for name, text in zip(names, tqdm(formulas(num_rows=num_rows, seed=seed), total=num_rows), strict=True):
        partial = output / "image.partial"
        render(text).save(partial, format="PNG", optimize=True)
        partial.replace(images_dir / name)
        rows.append(json.dumps({"file_name": f"images/{name}", "text": text}))
    partial = output / "metadata.jsonl.partial"
    partial.write_text("\n".join(rows) + "\n", encoding="utf-8")
    partial.replace(output / "metadata.jsonl")
    return f"{output}: {num_rows} formulas"


def render(text: str) -> Image.Image:
    """A formula as a grey picture (mode L, black on white), cropped to its ink and a margin."""
    import matplotlib
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser
    from PIL import Image, ImageOps

    with matplotlib.rc_context({"mathtext.fontset": "cm", "text.hinting": "none", "text.antialiased": True}):
        ink = Image.fromarray(
            MathTextParser("agg").parse(f"${_mathtext(text)}$", dpi=DPI, prop=FontProperties(size=12)).image
        )
    step = 255 / (NUM_GREYS - 1)
    grey = ink.point([round(255 - round(level / step) * step) for level in range(256)])
    return ImageOps.expand(grey.crop(ImageOps.invert(grey).getbbox()), border=MARGIN, fill=255)


def _mathtext(text: str) -> str:
    r"""The formula as mathtext wants it: no blank before a script (it would be set on the line), `\dfrac` for the
    outermost fractions, because mathtext has no display style."""
    depth, parts = 0, []
    for token in tokenize(text):
        depth += (token == "{") - (token == "}")
        if parts and parts[-1][-1].isalpha() and parts[-1][0] == "\\" and token.isalpha():
            parts.append(" ")
        parts.append(r"\dfrac" if token == r"\frac" and not depth else token)
    return "".join(parts)


def formulas(*, num_rows: int, seed: int) -> Iterator[str]:
    """Distinct formulas in the spelling of the LaTeX_OCR texts: canonical, tokens separated by spaces."""
    random = Random(seed)
    seen: set[str] = set()
    while len(seen) < num_rows:
        shortest, longest = random.choices(list(LENGTHS), weights=list(LENGTHS.values()))[0]
        while True:
            text = normalize(_formula(random))
            if shortest <= len(tokenize(text)) <= longest and text not in seen:
                break
        seen.add(text)
        yield text.replace(r"\left ", r"\left").replace(r"\right ", r"\right")


def _formula(random: Random) -> str:
    kind = random.random()
    if kind < 0.1:
        return random.choice([*LETTERS, *GREEK, *map(str, range(2, 100))])
    if kind < 0.5:
        return _expression(random, 2)
    if kind < 0.8:
        return f"{_expression(random, 1)} {random.choice(RELATIONS)} {_expression(random, 2)}"
    makers = [_definition, _definition, _sequence, _arrow, _limit, _limit, _sum, _sum, _integral, _derivative]
    return random.choice(makers)(random, 2)


def _expression(random: Random, depth: int) -> str:
    num_terms = random.choices([1, 2, 3], weights=[5, 4, 1])[0]
    terms = [_term(random, depth) for _ in range(num_terms)]
    sign = "- " if random.random() < 0.08 else ""
    return sign + " ".join(
        term if not position else f"{random.choice(OPERATORS)} {term}" for position, term in enumerate(terms)
    )


def _term(random: Random, depth: int) -> str:
    if depth <= 0:
        return _atom(random, depth)
    makers, weights = zip(*TERMS.items(), strict=True)
    return random.choices(makers, weights=weights)[0](random, depth - 1)


def _atom(random: Random, depth: int) -> str:
    kind = random.random()
    if kind < 0.7:
        return random.choice(LETTERS if kind < 0.5 else GREEK)
    return str(random.randint(1, 9) if kind < 0.96 else random.randint(10, 99))


def _product(random: Random, depth: int) -> str:
    return f"{random.randint(2, 9)} {random.choice(VARIABLES)}" + random.choice(["", f" {random.choice(GREEK)}"])


def _power(random: Random, depth: int) -> str:
    exponent = random.choice(["2", "2", "3", "n", "- 1", r"\ast", _expression(random, depth - 1)])
    return f"{random.choice([*LETTERS, *GREEK])} ^ {{ {exponent} }}"


def _indexed(random: Random, depth: int) -> str:
    index = random.choice([*INDICES, "0", "1", "2", "i j", "n + 1", "k - 1"])
    base = random.choice([*VARIABLES, *GREEK, "A", "T", "X"])
    power = random.choice(["", "", " ^ { 2 }", r" ^ { \prime }"])
    return f"{base} _ {{ {index} }}{power}"


def _fraction(random: Random, depth: int) -> str:
    return rf"\frac {{ {_expression(random, depth - 1)} }} {{ {_expression(random, depth - 1)} }}"


def _root(random: Random, depth: int) -> str:
    degree = random.choice(["", "", "", "[ 3 ] ", "[ n ] "])
    return rf"\sqrt {degree}{{ {_expression(random, depth)} }}"


def _function(random: Random, depth: int) -> str:
    power = random.choice(["", "", "", "^ { 2 } "])
    argument = random.choice(["( {} )", "{}"]).format(random.choice([*VARIABLES, r"\theta", r"2 x", r"\omega t"]))
    return f"{random.choice(FUNCTIONS)} {power}{argument}"


def _call(random: Random, depth: int) -> str:
    name = random.choice(["f", "g", "h", "F", "P", r"\phi", r"f ^ { \prime }", r"f ^ { - 1 }"])
    argument = random.choice([*VARIABLES, "x , y", _expression(random, depth - 1)])
    return f"{name} ( {argument} )"


def _brackets(random: Random, depth: int) -> str:
    inner = _expression(random, depth)
    if r"\frac" in inner:
        left, right = random.choice([(r"\left(", r"\right)"), (r"\left[", r"\right]")])
    else:
        left, right = random.choice(
            [("(", ")"), ("(", ")"), ("[", "]"), ("|", "|"), (r"\{", r"\}"), (r"\langle", r"\rangle")]
        )
    return f"{left} {inner} {right}" + random.choice(["", "", " ^ { 2 }"])


def _accent(random: Random, depth: int) -> str:
    accent = random.choice([r"\hat", r"\bar", r"\vec", r"\tilde", r"\dot", r"\mathbf", r"\mathrm", r"\mathcal"])
    letter = random.choice("ABCFLMRS" if accent == r"\mathcal" else VARIABLES)
    return f"{accent} {{ {letter} }}"


def _sum(random: Random, depth: int) -> str:
    index = random.choice(INDICES[:3])
    lower, upper = f"{index} = {random.choice('01')}", random.choice(["n", "N", r"\infty", "m"])
    body = random.choice([f"x _ {{ {index} }}", f"a _ {{ {index} }} b _ {{ {index} }}", _term(random, depth - 1)])
    operator = random.choice([r"\sum", r"\sum", r"\prod"])
    return rf"{operator} _ {{ {lower} }} ^ {{ {upper} }} {body}"


def _integral(random: Random, depth: int) -> str:
    limits = random.choice(["_ { 0 } ^ { 1 } ", r"_ { 0 } ^ { \infty } ", "_ { a } ^ { b } ", r"_ { \Omega } "])
    variable = random.choice("xty")
    body = random.choice([f"f ( {variable} )", f"{variable} ^ {{ 2 }}", f"e ^ {{ - {variable} }}"])
    return rf"\int {limits}{body} d {variable}"


def _limit(random: Random, depth: int) -> str:
    variable, target = random.choice([("x", "0"), ("n", r"\infty"), ("t", "1"), ("h", "0"), ("x", "a")])
    return rf"\lim _ {{ {variable} \to {target} }} {_term(random, depth)}"


def _derivative(random: Random, depth: int) -> str:
    d, order = random.choice(["d", r"\partial"]), random.choice(["", "", " ^ { 2 }"])
    variable = random.choice("xyt")
    return rf"\frac {{ {d}{order} {random.choice('fuz')} }} {{ {d} {variable}{order} }}"


def _definition(random: Random, depth: int) -> str:
    return f"{random.choice('fgh')} ( x ) = {_expression(random, depth)}"


def _sequence(random: Random, depth: int) -> str:
    letter, last = random.choice(VARIABLES), random.choice(["n", "k", "N"])
    left, right = random.choice([("", ""), ("( ", " )"), (r"\{ ", r" \}")])
    return rf"{left}{letter} _ {{ 1 }} , {letter} _ {{ 2 }} , \ldots , {letter} _ {{ {last} }}{right}"


def _arrow(random: Random, depth: int) -> str:
    return f"{_term(random, 1)} {random.choice(ARROWS)} {_term(random, 1)}"


TERMS: dict[Callable[[Random, int], str], int] = {
    _atom: 28,
    _product: 9,
    _power: 14,
    _indexed: 14,
    _fraction: 12,
    _root: 6,
    _function: 7,
    _call: 5,
    _brackets: 5,
    _accent: 5,
    _sum: 4,
    _integral: 4,
    _derivative: 2,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=make_sample.__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--num-rows", type=int, default=400, help="number of formulas (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other formulas (default: 0)")
    try:
        print(make_sample(**vars(parser.parse_args())))
    except (InputError, ImportError, OSError) as error:
        print(f"make_sample: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
