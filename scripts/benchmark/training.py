"""Training speed, peak memory and waiting for data: this library, the tutorial's script and peers in one run.

    python scripts/benchmark/training.py --data outputs/data/train.json
    python scripts/benchmark/training.py --data outputs/data/train.json --batches 1 2 4 8 16 32 64 128   (for chart.py)

The work: Qwen2-VL-2B's shape with random bfloat16 weights (or `--size tiny` on a CPU), LoRA r 64 / alpha 16 /
dropout 0.05 on the language model's linear layers, AdamW, clipping, every picture at 504 x 112, through
`latexocr.train` itself: data loading, optimiser and logging included. Each variant runs in a process of its own; peers
that are not installed are left out and named.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import common

VARIANTS = (
    "tutorial 4x4", "trl 4x4 checkpointing", "trl 4x4", "trl 16x1 checkpointing", "trl 16x1", "padded 16x1",
    "llamafactory 16x1", "llamafactory 16x1 packing", "flattened 16x1", "ours 4x4", "ours 16x1", "ours 64x1",
    "ours 16x1 checkpointing",
)  # fmt: skip
PEERS = ("tutorial", "trl", "llamafactory")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="system, samples x micro-batches, options")
    parser.add_argument("--batches", type=int, nargs="+", help="instead: these numbers of samples a step")
    parser.add_argument("--systems", nargs="+", default=["tutorial", "trl", "ours"], help="with --batches")
    parser.add_argument("--steps", type=int, help="of every variant (default: 2,400 samples, 16 steps of a peer)")
    parser.add_argument("--llamafactory", type=Path, help="folder of an installation apart: it needs an older trl")
    arguments = parser.parse_args()
    variants = arguments.variants
    if arguments.batches:
        variants = [f"{system} {batch}x1" for batch in arguments.batches for system in arguments.systems]
    if arguments.llamafactory:
        common.SITES["llamafactory"] = arguments.llamafactory
    missing = [name for name in PEERS[1:] if importlib.util.find_spec(name) is None and name not in common.SITES]
    variants = [variant for variant in variants if variant.split()[0] not in missing]
    with common.workplace(arguments) as (model, folder):
        matmul, flop = common.matmul_tflops(), common.flop_per_sample(model, arguments.data)
        results = []
        for number, variant in enumerate(variants):
            steps = arguments.steps or common.steps_for(variant)
            try:
                results.append(common.train(variant, model, arguments.data, folder / str(number), steps=steps))
            except common.Failed as error:  # out of memory at a large batch is a result as well
                results.append({"variant": variant, "failed": str(error)[-300:]})
        for row in results:
            if "samples_per_second" in row:
                row["matmul_share"] = round(row["samples_per_second"] * flop / 1e12 / matmul, 4)
                row |= {f"over_{system}": _ratio(row, results, system) for system in PEERS}
        measured = {"matmul_tflops": round(matmul, 2), "gflop_per_sample": round(flop / 1e9, 3)}
        common.report(arguments, results, not_installed=missing, **measured)


def _ratio(row: dict, results: list[dict], system: str) -> float | None:
    """Against the peer's best variant with at most 16 samples a step; None without one."""
    rates = [
        other["samples_per_second"] for other in results
        if other["variant"].startswith(f"{system} ") and "samples_per_second" in other and _samples(other) <= 16
    ]  # fmt: skip
    return round(row["samples_per_second"] / max(rates), 2) if rates else None


def _samples(row: dict) -> int:
    batch, accumulation = map(int, row["variant"].split()[1].split("x"))
    return batch * accumulation


if __name__ == "__main__":
    main()
