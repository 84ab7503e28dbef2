"""Start-up and memory of a training against the number of records; prints JSON.

    python scripts/benchmark/startup.py --data outputs/data/train.json

The records of `--data` are repeated to 1,000 and to 100,000. Each training runs in a process of its own through
`latexocr.train.train`. Seconds: from its call to the first step, without those in `load_base`. Memory:
the training process and each data-loader worker during the last step, resident (`rss_mib`, shared pages counted in
every process) and proportional (`pss_mib`, shared pages counted once).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import common


def main() -> None:
    if sys.argv[1:2] == ["--run"]:  # the options of one training, in JSON
        print(json.dumps(_training(json.loads(sys.argv[2]))))
        return
    parser = common.parser(__doc__)
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--steps", type=int, default=100, help="steps of 16 samples before memory is read")
    arguments = parser.parse_args()
    with common.workplace(arguments) as (model, folder):
        results = [_measure(number, model, arguments, folder) for number in arguments.records]
    first, last = results[0], results[-1]
    more = {f"more_{unit}": round(last[unit] - first[unit], 1) for unit in ("rss_mib", "pss_mib")}
    common.report(arguments, results, **more)


def _measure(num_records: int, model: Path, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = json.loads(arguments.data.read_text(encoding="utf-8"))
    for row in rows:
        row["conversations"][0]["value"] = str(arguments.data.parent.resolve() / row["conversations"][0]["value"])
    data = folder / f"{num_records}.json"
    data.write_text(json.dumps(list(itertools.islice(itertools.cycle(rows), num_records))), encoding="utf-8")
    options = {
        "model_name_or_path": str(model), "train_json": str(data), "output_dir": str(folder / f"run{num_records}"),
        "image_mode": "fixed", "max_steps": arguments.steps, "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1, "save_strategy": "no", "swanlab_mode": "disabled", "disable_tqdm": True,
        "use_cpu": arguments.size == "tiny",
    }  # fmt: skip
    printed = common.run([sys.executable, __file__, "--run", json.dumps(options)])
    return {"records": num_records, **json.loads(printed.splitlines()[-1])}


def _training(options: dict[str, Any]) -> dict[str, Any]:
    """Runs in a process of its own: two marks around what is there, and nothing else changed."""
    import latexocr.train as stage

    found: dict[str, Any] = {}
    config, load_base, num_steps = stage.TrainConfig(**options), stage.load_base, 0

    def timed_load(*arguments: Any, **keywords: Any) -> Any:
        since = time.perf_counter()
        model = load_base(*arguments, **keywords)
        found["load_seconds"] = round(time.perf_counter() - since, 2)
        return model

    class Watched(stage.FormulaTrainer):
        def training_step(self, *arguments: Any, **keywords: Any) -> Any:
            nonlocal num_steps
            num_steps += 1
            if num_steps == 1:
                found["seconds_to_first_step"] = round(time.perf_counter() - started - found["load_seconds"], 2)
            if num_steps == config.max_steps:
                found.update(_memory(config.dataloader_num_workers))
            return super().training_step(*arguments, **keywords)

    stage.load_base, stage.FormulaTrainer = timed_load, Watched
    started = time.perf_counter()
    stage.train(config)
    return found


def _memory(num_workers: int) -> dict[str, Any]:
    import psutil

    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [process.memory_full_info() for process in processes]
    sums = {f"{unit}_mib": round(sum(getattr(info, unit) for info in found) / 2**20, 1) for unit in ("rss", "pss")}
    return {"workers": num_workers, "processes": len(processes), **sums}


if __name__ == "__main__":
    main()
