r"""How much of real LaTeX `normalize` understands, how fast, and whether what it equates prints the same.

    python scripts/benchmark/normalization.py --formulas formulas.tsv.gz --pairs normalisation_pairs.json

The proof sets a sample of the formulas with `latex`, as written and in canonical form, and compares glyphs and
rules: for level 1 up to horizontal space; for level 2 (which changes sizes and places) the characters other than
delimiters, and the number of rules. A formula that does not render as written proves nothing and is not counted.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import common  # noqa: F401  (finds the checkout)

from latexocr.metrics import normalize
from latexocr.metrics.canonical import is_formula
from latexocr.metrics.glyphs import same_picture
from latexocr.render import Rendering, render

# Why a canonical form may print differently, by what the text holds.
CAUSES = {
    r"\\(?:hat|tilde|bar|vec|dot|check)\s*\{\s*\\\w+\s*\{\s*\\(?:cal|bf|rm|it)\b": "amsmath: a font switch in an "
    "accent in an accent also acts on what follows; in canonical form it does not",
    r"\\[dbc]\s*\{\s*\\(?:cal|bf)\b": "a text accent (\\d, \\b, \\c): TeX complains, and its recovery differs",
    r"\\\\\s+\[\s*\d": "amsmath prints the brackets of `\\\\ [1em]` if a blank stands before them; level 2 drops them",
    r"\\not\s*\\in\b": "level 2 takes \\not \\in for \\notin, which has another slash",
    r"\\(?:under|over)brace|\\x(?:left|right)arrow": "horizontal space only: how many pieces draw a brace or an arrow",
    r"\\hfill": "horizontal space only: a row moves sideways over the fraction of the row below",
    r"\\!": "horizontal space only: glyphs overlap, so that their order is undefined",
    r"\\wide(?:tilde|hat)": "level 2: another size of the accent",
}
DELIMITERS = {("cmr", code) for code in b"()[]/"} | {("cmsy", code) for code in b"fghijkbcdelmn"} | {("cmmi", 61)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--formulas", type=Path, required=True, help="gzipped lines: key, raw LaTeX or nothing, label")
    parser.add_argument("--pairs", type=Path, help='JSON: {"EQ": [[a, b, reason], ...], "NE": [...]}')
    parser.add_argument("--num-proof", type=int, default=6000, help="formulas to set with latex")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with gzip.open(arguments.formulas, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    labels = [label for _, _, label in rows]
    report = {"num_formulas": len(labels), **parsing(labels)}
    if arguments.pairs:
        report["wrong_pairs"] = wrong_pairs(json.loads(arguments.pairs.read_text(encoding="utf-8")))
    chosen = sample(rows, arguments.num_proof, random.Random(arguments.seed))
    report["proof_level1"] = proof(chosen, level=1)
    report["proof_level2"] = proof(chosen, level=2)
    print(json.dumps(report, indent=2, ensure_ascii=False))


def parsing(labels: list[str]) -> dict:
    malformed = [label for label in labels if not is_formula(label)]
    errors = [rendering.error for rendering in render(malformed)]
    report = {"parse_rate": 1 - len(malformed) / len(labels), "malformed": dict(zip(malformed, errors, strict=True))}
    for level in (1, 2):
        seconds, canonical = min((timed(labels, level) for _ in range(3)), key=lambda run: run[0])
        report[f"level{level}_formulas_per_second"] = round(len(labels) / seconds)
        report[f"level{level}_changed_when_normalised_again"] = sum(
            normalize(text, level) != text for text in canonical
        )
    return report


def timed(labels: list[str], level: int) -> tuple[float, list[str]]:
    started = time.process_time()
    canonical = [normalize(label, level) for label in labels]
    return time.process_time() - started, canonical


def wrong_pairs(pairs: dict[str, list[list[str]]]) -> list[dict]:
    return [
        {"level": level, "kind": kind, "pair": [a, b], "reason": reason}
        for level in (1, 2)
        for kind, rows in pairs.items()
        for a, b, reason in rows
        if (normalize(a, level) == normalize(b, level)) != (kind == "EQ")
    ]


def sample(rows: list[list[str]], num_formulas: int, generator: random.Random) -> list[str]:
    """Distinct texts, the same number from each source, or all of a smaller one."""
    by_source: dict[str, set[str]] = {}
    for key, raw, label in rows:
        by_source.setdefault(key.split("/")[0], set()).update(filter(None, (raw, label)))
    chosen: list[str] = []
    sources = sorted(by_source.values(), key=len)
    for number, texts in enumerate(sources):
        share = (num_formulas - len(chosen)) // (len(sources) - number)
        chosen += generator.sample(sorted(texts), min(share, len(texts)))
    return chosen


def proof(formulas: list[str], *, level: int) -> dict:
    canonical = [normalize(text, level) for text in formulas]
    num_rendered, exceptions = 0, []
    for text, after, a, b in zip(formulas, canonical, render(formulas), render(canonical), strict=True):
        if a.error:
            continue
        num_rendered += 1
        same = same_picture(a, b, horizontal_space=False) if level == 1 else characters(a) == characters(b)
        if b.error or not same:
            exceptions.append({"formula": text, "canonical": after, "error": b.error, "cause": cause(text)})
    return {
        "num_formulas": len(formulas),
        "num_rendered": num_rendered,
        "num_changed_text": sum(normalize(text, 0) != after for text, after in zip(formulas, canonical, strict=True)),
        "same": 1 - len(exceptions) / max(num_rendered, 1),
        "exceptions": exceptions,
    }


def characters(rendering: Rendering) -> tuple[Counter, int]:
    """Characters by font family without delimiters and what grows in display style (cmex), and how many rules."""
    found = Counter((re.sub(r"\d+$", "", glyph.font), glyph.code) for glyph in rendering.glyphs)
    return Counter({g: n for g, n in found.items() if g[0] != "cmex" and g not in DELIMITERS}), len(rendering.rules)


def cause(text: str) -> str:
    return next((why for pattern, why in CAUSES.items() if re.search(pattern, text)), "unknown")


if __name__ == "__main__":
    main()
