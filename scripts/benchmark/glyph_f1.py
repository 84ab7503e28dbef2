r"""`glyph_f1` beside the official CDM: rank correlation, where the two part, and whether spoiling ever helps.

    python scripts/benchmark/glyph_f1.py --reference cdm_reference.json --formulas formulas.tsv.gz

`--reference` holds pairs with `prediction`, `reference` and `cdm_f1`, the value of the official program. Printed as
JSON: Spearman's rank correlation, over all pairs and over those that neither calls perfect; the pairs that one of the
two calls perfect and the other does not; the largest differences in rank. CDM is blind to structure and to
\phi against \varphi, so the correlation is given a second time for pairs without these two.

`--formulas` adds two tests on real formulas. Each of six steps spoils one more place of a formula: how often did the
score rise? And horizontal space put between symbols: how often did the score leave 1?
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import common

LETTER = re.compile(r"[A-Za-z0-9]|\\(?:alpha|beta|gamma|pi|theta|lambda|mu)")
FOREIGN = (r"\star", r"\natural", r"\flat", r"\sharp")
SPACES = (r"\,", r"\;", r"\:", r"\quad", r"\!", "~")
CORRUPTIONS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reference", type=Path, required=True, help="JSON of pairs with CDM's values")
    parser.add_argument("--formulas", type=Path, help="text file, .gz or not, the formula last in a line")
    parser.add_argument("--samples", type=int, default=400, help="formulas for the tests of corruption and space")
    parser.add_argument("--show", type=int, default=15, help="pairs listed of each kind")
    parser.add_argument("--output", type=Path, help="file for the JSON, which is printed in any case")
    arguments = parser.parse_args()
    pairs = json.loads(arguments.reference.read_text(encoding="utf-8"))["pairs"]
    results: dict[str, Any] = {"cdm": _beside_cdm(pairs, arguments.show)}
    if arguments.formulas:
        formulas = [text for text in common.read_formulas(arguments.formulas) if 8 < len(text.split()) < 80]
        formulas = random.Random(0).sample(formulas, min(arguments.samples, len(formulas)))
        results["corruption"] = _corruption(formulas)
        results["horizontal_space"] = _space(formulas)
    common.report(arguments, results)


def _beside_cdm(pairs: list[dict[str, Any]], num_shown: int) -> dict[str, Any]:
    from latexocr.metrics.glyphs import glyph_f1
    from latexocr.render import render

    rendered = render([text for pair in pairs for text in (pair["prediction"], pair["reference"])])
    glyph_f1(*rendered[:2])  # imports scipy
    started = time.perf_counter()
    for pair, one, other in zip(pairs, rendered[::2], rendered[1::2], strict=True):
        pair["ours"] = glyph_f1(one, other)
    milliseconds = (time.perf_counter() - started) / len(pairs) * 1000
    both_below = [pair for pair in pairs if max(pair["ours"], pair["cdm_f1"]) < 1]
    sensible = [pair for pair in both_below if _comparable(pair)]
    return {
        "pairs": len(pairs),
        "ms_a_pair": round(milliseconds, 2),
        "spearman_all": _spearman(pairs),
        "spearman_neither_perfect": {"pairs": len(both_below), "value": _spearman(both_below)},
        "spearman_same_structure_and_phi": {"pairs": len(sensible), "value": _spearman(sensible)},
        "perfect_for_cdm_only": [_line(p) for p in pairs if p["cdm_f1"] == 1 > p["ours"]],
        "perfect_for_us_only": [_line(p) for p in pairs if p["ours"] == 1 > p["cdm_f1"]],
        "largest_rank_differences": [_line(p) for p in _by_rank_difference(both_below)[:num_shown]],
    }


def _comparable(pair: dict[str, Any]) -> bool:
    r"""Whether CDM can see the difference: the same scripts and fractions in both, and no \phi for \varphi."""
    structure = [re.findall(r"[_^]|\\frac|\\sqrt", pair[side]) for side in ("prediction", "reference")]
    phis = [sorted(re.findall(r"\\(?:var)?phi\b", pair[side])) for side in ("prediction", "reference")]
    return structure[0] == structure[1] and phis[0] == phis[1]


def _spearman(pairs: list[dict[str, Any]]) -> float:
    from scipy.stats import spearmanr

    return round(float(spearmanr([p["ours"] for p in pairs], [p["cdm_f1"] for p in pairs]).statistic), 3)


def _by_rank_difference(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from scipy.stats import rankdata

    gaps = abs(rankdata([p["ours"] for p in pairs]) - rankdata([p["cdm_f1"] for p in pairs]))
    return [pairs[k] for k in sorted(range(len(pairs)), key=lambda k: -gaps[k])]


def _line(pair: dict[str, Any]) -> str:
    return f"ours {pair['ours']:.2f} CDM {pair['cdm_f1']:.2f}: {pair['prediction']} <- {pair['reference']}"


def _corruption(formulas: list[str]) -> dict[str, Any]:
    from latexocr.metrics.glyphs import glyph_f1
    from latexocr.render import render

    noise = random.Random(1)
    ladders = [_spoiled(text.split(), noise) for text in formulas]
    boxes = dict(zip(texts := [text for ladder in ladders for text in ladder], render(texts), strict=True))
    steps, rises = 0, []
    for ladder in ladders:
        ladder = [text for text in ladder if boxes[text].error is None]
        scores = [glyph_f1(boxes[text], boxes[ladder[0]]) for text in ladder]
        steps += max(0, len(scores) - 1)
        rises += [b - a for a, b in itertools.pairwise(scores) if b > a + 1e-9]
    return {"steps": steps, "rises": len(rises), "largest_rise": round(max(rises, default=0.0), 3)}


def _spoiled(tokens: list[str], noise: random.Random) -> list[str]:
    """The formula, and the formula with one place more spoiled each time; no place twice."""
    letters = [n for n, token in enumerate(tokens) if LETTER.fullmatch(token)]
    scripts = [n for n, token in enumerate(tokens) if token in "^_"]
    noise.shuffle(letters)
    noise.shuffle(scripts)
    ladder = [" ".join(tokens)]
    for _ in range(min(CORRUPTIONS, len(letters))):
        kind = noise.random()
        if kind < 0.25 and scripts:
            place = scripts.pop()
            tokens[place] = "_" if tokens[place] == "^" else "^"
        else:
            tokens[letters.pop()] = "{}" if kind > 0.7 else noise.choice(FOREIGN)
        ladder.append(" ".join(tokens))
    return ladder


def _space(formulas: list[str]) -> dict[str, Any]:
    from latexocr.metrics.glyphs import glyph_f1
    from latexocr.render import render

    noise = random.Random(2)
    spaced = [_spaced(text.split(), noise) for text in formulas]
    rendered = list(zip(spaced, render(spaced), render(formulas), strict=True))
    judged = [(text, glyph_f1(one, other)) for text, one, other in rendered if not (one.error or other.error)]
    return {"formulas": len(judged), "below_1": [text for text, value in judged if value < 1]}


def _spaced(tokens: list[str], noise: random.Random) -> str:
    """Space behind letters that another symbol follows: never within an argument of one token, or before a script."""
    out = []
    for before, token, after in zip(["{", *tokens], tokens, [*tokens[1:], "}"], strict=False):
        out.append(token)
        is_free = not before.startswith("\\") and before not in "^_" and after not in ("^", "_", "'", "}")
        if LETTER.fullmatch(token) and is_free and noise.random() < 0.3:
            out.append(noise.choice(SPACES))
    return " ".join(out)


if __name__ == "__main__":
    main()
