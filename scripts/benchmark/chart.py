"""Draw samples/s against samples a step, from the JSON of one or more runs of training.py with `--batches`.

    python scripts/benchmark/chart.py sweep.json --output speed.svg

Nothing accumulates but the tutorial's script, as it is written.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

NAMES = {"tutorial": "the tutorial's script", "trl": "TRL SFTTrainer, tuned", "ours": "latexocr"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="JSON of training.py")
    parser.add_argument("--output", type=Path, required=True, help=".svg, .png or .pdf")
    arguments = parser.parse_args()
    found = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.files]
    points = curves([row for one in found for row in one["results"]])
    draw(points, found[0]["machine"], arguments.output)
    print(json.dumps(points, indent=2))


def curves(rows: list[dict]) -> dict[str, dict[int, float]]:
    """System -> samples a step -> samples/s, of the plain variants "system Bx1" that ran; the tutorial accumulates.

    >>> curves([{"variant": "ours 16x1", "samples_per_second": 150.0}, {"variant": "trl 64x1", "failed": "memory"}])
    {'ours': {16: 150.0}}
    """
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        match = re.fullmatch(r"(tutorial|\w+(?= \d+x1$)) (\d+)x(\d+)", row["variant"])
        if match and "samples_per_second" in row:
            points.setdefault(match[1], {})[int(match[2]) * int(match[3])] = row["samples_per_second"]
    return {system: dict(sorted(rates.items())) for system, rates in points.items()}


def draw(points: dict[str, dict[int, float]], machine: dict, output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for system, rates in points.items():
        axes.plot(list(rates), list(rates.values()), marker="o", label=NAMES.get(system, system))
        last = max(rates)
        axes.annotate(f"{rates[last]:,.0f}", (last, rates[last]), textcoords="offset points", xytext=(6, -3))
    axes.set(xscale="log", yscale="log", xlabel="samples a step", ylabel="samples/s",
             title=f"Training speed, {machine['device']}, torch {machine['torch']}")  # fmt: skip
    axes.set_xticks(sorted({batch for rates in points.values() for batch in rates}))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output)


if __name__ == "__main__":
    main()
