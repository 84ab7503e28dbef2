"""Loss curves side by side: what makes training fast must not change what is learnt.

    python scripts/benchmark/curves.py --data outputs/data/train.json

The same steps without dropout (whose random numbers differ with the layout of a batch): padded and eager in float32
and in bfloat16, flattened, flattened and compiled, and the same 16 samples split into 4 x 4.
"""

from __future__ import annotations

import common

VARIANTS = ("float32 16x1", "padded 16x1", "flattened 16x1", "ours 16x1", "ours 4x4", "ours 16x1 checkpointing")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    options = {"lora_dropout": 0, "logging_steps": 1}
    with common.workplace(arguments) as (model, folder):
        curves = {
            variant: common.train(variant, model, arguments.data, folder / str(number), steps=arguments.steps,
                                  options=options)["losses"]
            for number, variant in enumerate(arguments.variants)
        }  # fmt: skip
    first, reference = next(iter(curves.items()))
    differences = {
        variant: {"mean": _mean(found, reference), "largest": max(_absolute(found, reference))}
        for variant, found in curves.items()
    }
    common.report(arguments, curves, reference=first, absolute_difference=differences)


def _absolute(losses: list[float], reference: list[float]) -> list[float]:
    return [round(abs(one - other), 5) for one, other in zip(losses, reference, strict=True)]


def _mean(losses: list[float], reference: list[float]) -> float:
    return round(sum(_absolute(losses, reference)) / len(losses), 5)


if __name__ == "__main__":
    main()
