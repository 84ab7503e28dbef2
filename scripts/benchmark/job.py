"""The tutorial's whole job: 996 samples, 2 epochs, 16 a step; seconds of the training loop and of the whole process.

    python scripts/benchmark/job.py --data outputs/data/train.json
    python scripts/benchmark/job.py --data outputs/data/train.json --variants "tutorial 4x4" "ours 16x1"

The tutorial reports 531 s on four A100s. A process's time has everything in it: Python, loading the model, reading and
preparing the data, compilation, training, the adapter at the end.
"""

from __future__ import annotations

import json

import common


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--variants", nargs="+", default=["ours 4x4", "ours 16x1"])
    parser.add_argument("--samples", type=int, default=996)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    with common.workplace(arguments) as (model, folder):
        rows = json.loads(arguments.data.read_text(encoding="utf-8"))[: arguments.samples]
        for row in rows:  # the shortened file lies elsewhere
            turn = row["conversations"][0]
            turn["value"] = str((arguments.data.parent / turn["value"]).resolve())
        data = folder / "train.json"
        data.write_text(json.dumps(rows), encoding="utf-8")
        results = [
            common.train(variant, model, data, folder / str(number), epochs=arguments.epochs)
            for number, variant in enumerate(arguments.variants)
        ]
        common.report(arguments, results, samples=len(rows), epochs=arguments.epochs)


if __name__ == "__main__":
    main()
