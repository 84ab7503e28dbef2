"""Recipes at full size: samples/s, peak memory, the first and the last loss, and whether what was saved loads again.

    latexocr build --output 2b --model-type qwen2_vl --size 2b --dtype bfloat16
    python scripts/benchmark/full_size.py --model 2b --data outputs/data/train.json --recipes lora qlora --batches 1 16
    python scripts/benchmark/full_size.py --model 7b --data train.json --recipes lora --ranks 2 --sharded fsdp2

Each run is `latexocr train` in a process of its own, with gradient checkpointing unless told otherwise; its line of
JSON goes to stderr when it has ended, all of them are printed at the end. For the last of the
batches, the last validation loss stands beside that of the saved adapter or model, loaded in another process as
inference loads it. Random weights are right for speed and memory; their loss falls all the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import common

# what is trained -> options of `latexocr train`
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora8bit": {"optim": "adamw_8bit"},
    "qlora": {"load_in_4bit": True, "optim": "adamw_8bit"},
    "qlora_vision": {"load_in_4bit": True, "optim": "adamw_8bit", "quantized_parts": "language,vision,merger"},
    "qlora_head": {"load_in_4bit": True, "optim": "adamw_8bit", "quantized_parts": "language,vision,merger,head"},
    "qlora_experts": {"load_in_4bit": True, "optim": "adamw_8bit", "quantized_parts": "language,experts"},
    "qlora_cached": {"load_in_4bit": True, "optim": "adamw_8bit", "cache_vision_features": True},
    "full": {"finetuning": "full", "learning_rate": 1e-5},
    "full8bit": {"finetuning": "full", "learning_rate": 1e-5, "optim": "adamw_8bit"},
}
VALIDATION_ROWS = 32


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["lora", "qlora"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="samples a step and rank")
    parser.add_argument("--steps", type=int, help="of every run (default: 2,400 samples, 16 to 150 steps)")
    parser.add_argument("--lora-r", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=1, help="processes, one a GPU")
    parser.add_argument("--sharded", choices=common.SHARDED, help="by what, see scripts/accelerate")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE", help="more of `latexocr train`")
    parser.add_argument("--loss-of", type=Path, help="only print the loss of what was saved there on --data")
    arguments = parser.parse_args()
    if arguments.loss_of:
        print(loss_of(arguments.loss_of, arguments.data))
        return
    common.OURS |= RECIPES
    more = {"lora_r": arguments.lora_r, **dict(word.split("=", 1) for word in arguments.options)}
    with common.workplace(arguments) as (model, folder):
        validation = common.first_rows(arguments.data, folder / "val.json", VALIDATION_ROWS)
        results = []
        for recipe in arguments.recipes:
            for batch in arguments.batches:
                results.append(one_run(arguments, recipe, batch, model, validation, folder, more))
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)  # nothing is lost if a later one fails
        common.report(arguments, results, model=str(arguments.model), options=more)


def one_run(
    arguments: Any, recipe: str, batch: int, model: Path, validation: Path, folder: Path, more: dict[str, Any]
) -> dict[str, Any]:
    """Train, save and load again; a failure is a result too (out of memory at a large batch)."""
    variant = f"{recipe} {batch}x1" + (" checkpointing" if arguments.checkpointing else "")
    steps, output = arguments.steps or common.steps_for(variant), folder / f"{recipe}-{batch}"
    options = {"val_json": validation, "eval_strategy": "steps", "eval_steps": steps, "eval_generate_samples": 0,
               "metric_for_best_model": "eval_loss", **more}  # fmt: skip
    try:
        found = common.train(variant, model, arguments.data, output, steps=steps, ranks=arguments.ranks,
                             sharded=arguments.sharded, options=options)  # fmt: skip
        saved = output / ("model" if recipe.startswith("full") else "adapter")
        again = {}
        if batch == arguments.batches[-1]:
            loss = common.run([sys.executable, Path(__file__), "--loss-of", saved, "--data", validation])
            again = {"loaded_again": round(float(loss.split()[-1]), 5)}
    except common.Failed as error:
        return {"variant": variant, "ranks": arguments.ranks, "failed": str(error)[-600:]}
    losses = found.pop("losses")
    return {
        **found, "ranks": arguments.ranks, "sharded": arguments.sharded, "steps": steps,
        "first_loss": losses[0], "last_loss": losses[-1],
        "validation_loss": found["eval_loss"], **again,
        "saved_gib": round(sum(path.stat().st_size for path in saved.rglob("*") if path.is_file()) / 2**30, 3),
    }  # fmt: skip


def loss_of(folder: Path, data: Path) -> float:
    """Mean loss over the supervised tokens of all records, one by one, of a saved adapter or model."""
    import torch

    from latexocr.loss import supervised_loss, supervised_targets
    from latexocr.predict import LatexOCR
    from latexocr.records import read_records

    ocr = LatexOCR.from_pretrained(folder)
    total, tokens = 0.0, 0
    for record in read_records(data):
        batch = {key: value.to(ocr.model.device) for key, value in ocr.collate([ocr.preprocessor(record)]).items()}
        targets = supervised_targets(batch.pop("labels"), batch["logits_to_keep"])
        batch["pixel_values"] = batch["pixel_values"].to(ocr.model.dtype)
        with torch.no_grad():
            total += float(supervised_loss(ocr.model(**batch).logits, targets, 1))
        tokens += int((targets >= 0).sum())
    return total / tokens


if __name__ == "__main__":
    main()
