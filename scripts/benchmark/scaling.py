"""Scaling over GPUs with the same work on each: samples/s of N ranks over N times those of one.

N ranks get N times as many records, so that their epochs are as long. The more of them fit into the data, the better.

    python scripts/benchmark/scaling.py --data outputs/data/train.json --ranks 1 2 4 --batches 16 64

On a machine without a GPU the ranks are processes on the CPU, which share its cores.
"""

from __future__ import annotations

import json

import common


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64], help="samples a step and rank")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--most-ranks", type=int, help="ranks that get all records (default: the most of --ranks)")
    arguments = parser.parse_args()
    arguments.most_ranks = arguments.most_ranks or max(arguments.ranks)
    results = []
    with common.workplace(arguments) as (model, folder):
        each = len(json.loads(arguments.data.read_text(encoding="utf-8"))) // arguments.most_ranks
        data = {
            ranks: common.first_rows(arguments.data, folder / f"{ranks}.json", ranks * each)
            for ranks in arguments.ranks
        }
        for batch in arguments.batches:
            for ranks in arguments.ranks:
                found = common.train(f"ours {batch}x1", model, data[ranks], folder / f"{batch}-{ranks}",
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
