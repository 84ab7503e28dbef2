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
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from training import _machine, _run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="train.json of real formulas")
    parser.add_argument("--size", choices=["tiny", "2b"], default="tiny")
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--steps", type=int, default=100, help="steps of 16 samples before memory is read")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # the options of one training, in JSON
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(_training(json.loads(arguments.run))))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        dtype = "bfloat16" if arguments.size == "2b" else "float32"
        _run([sys.executable, str(ROOT / "scripts/build.py"), "--output", str(model), "--size", arguments.size,
              "--dtype", dtype])  # fmt: skip
        results = [_measure(number, model, arguments, Path(folder)) for number in arguments.records]
    first, last = results[0], results[-1]
    more = {f"more_{unit}": round(last[unit] - first[unit], 1) for unit in ("rss_mib", "pss_mib")}
    print(json.dumps({"machine": {**_machine(), "cores": os.cpu_count()}, "results": results, **more}, indent=2))


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
    command = [sys.executable, __file__, "--run", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return {"records": num_records, **json.loads(done.stdout.splitlines()[-1])}


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
