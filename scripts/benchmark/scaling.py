"""Scaling over GPUs with the same work on each: samples/s of N ranks over N times those of one.

    python scripts/benchmark/scaling.py --data outputs/data/train.json --ranks 1 2 4 --batches 16 64

On a machine without a GPU the ranks are processes on the CPU, which share its cores.
"""

from __future__ import annotations

import common


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64], help="samples a step and rank")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    results = []
    with common.workplace(arguments) as (model, folder):
        for batch in arguments.batches:
            for ranks in arguments.ranks:
                found = common.train(f"ours {batch}x1", model, arguments.data, folder / f"{batch}-{ranks}",
                                     steps=arguments.steps, ranks=ranks)  # fmt: skip
                results.append({"ranks": ranks, "batch": batch, **found})
    for row in results:
        alone = [other for other in results if other["ranks"] == 1 and other["batch"] == row["batch"]]
        if alone:
            row["efficiency"] = round(
                row["samples_per_second"] / (row["ranks"] * alone[0]["samples_per_second"]), 4)  # fmt: skip
    common.report(arguments, results)


if __name__ == "__main__":
    main()
