"""Time of a formula through `render` and `render_pngs`, and the share of real formulas that render; prints JSON.

    python scripts/benchmark/rendering.py --formulas formulas.tsv.gz

The first figures are the whole call on 500 formulas (process, TeX, reading the boxes), the best and the median of
several calls, each on other formulas; the last ones are all formulas of the file, with every reason why one fails.
The file has one formula a line in its last tab-separated column. One process; TeX runs while Python waits.
"""

from __future__ import annotations

import argparse
import collections
import random
import statistics
import time
from pathlib import Path

import common

BATCH = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--formulas", type=Path, required=True, help="text file, .gz or not, the formula last in a line"
    )
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--samples", type=int, help="how many formulas of the file to render; default: all")
    parser.add_argument("--output", type=Path, help="file for the JSON, which is printed in any case")
    arguments = parser.parse_args()
    formulas = common.read_formulas(arguments.formulas)
    random.Random(0).shuffle(formulas)
    common.report(arguments, {**_batches(formulas, arguments.calls), "all": _all(formulas[: arguments.samples])})


def _batches(formulas: list[str], num_calls: int) -> dict[str, dict[str, float]]:
    from latexocr.render import draw, render

    render(formulas[:20])  # imports matplotlib, finds the fonts
    boxes_ms, pictures_ms, sizes = [], [], []
    for start in range(0, num_calls * BATCH, BATCH):
        batch = formulas[start : start + BATCH]
        started = time.perf_counter()
        rendered = render(batch)
        between = time.perf_counter()
        pictures = draw(rendered)
        ended = time.perf_counter()
        boxes_ms.append((between - started) / len(batch) * 1000)
        pictures_ms.append((ended - between) / len(batch) * 1000)
        sizes += [len(picture) for picture in pictures if picture]
    return {
        "render_ms_a_formula": _spread(boxes_ms),
        "draw_ms_a_formula": _spread(pictures_ms),
        "png_bytes": {"mean": round(statistics.mean(sizes))},
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"best": round(min(values), 2), "median": round(statistics.median(values), 2)}


def _all(formulas: list[str]) -> dict[str, object]:
    from latexocr.render import render

    started = time.perf_counter()
    rendered = render(formulas)
    seconds = time.perf_counter() - started
    reasons = collections.Counter(one.error for one in rendered if one.error)
    return {
        "formulas": len(formulas),
        "ms_a_formula": round(seconds / len(formulas) * 1000, 2),
        "render_rate": round(1 - reasons.total() / len(formulas), 5),
        "engine": rendered[0].engine,
        "reasons": dict(reasons.most_common()),
    }


if __name__ == "__main__":
    main()
