"""A run's folder: what is there already, where to resume, and what may not be mixed."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from latexocr.checkpoint import ADAPTER_WEIGHTS, MODEL_WEIGHTS, TRAINER_STATE
from latexocr.contract import Contract
from latexocr.errors import InputError
from latexocr.metrics_file import METRICS_FILE
from latexocr.train_config import TrainConfig

logger = logging.getLogger(__name__)
LEFT_BEHIND = (METRICS_FILE, "adapter", "model", "validation", "evaluation")  # by a run, besides checkpoints


def checkpoint_to_resume(config: TrainConfig) -> Path | None:
    """The checkpoint folder to go on from, None for a new run.

    Raises:
        InputError: asked to resume where there is nothing to resume from.
    """
    wanted = config.resume_from_checkpoint
    if wanted in (None, False) or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        return _newest_complete_checkpoint(config)
    folder = Path(str(wanted))
    if not (folder / TRAINER_STATE).is_file():
        raise InputError(f"{folder}: no {TRAINER_STATE}, so not a checkpoint that training can resume from")
    weights = weights_file(config)
    if not (folder / weights).is_file():
        raise InputError(f"{folder}: no {weights}, so not a checkpoint of --finetuning {config.finetuning}")
    return folder


def weights_file(config: TrainConfig) -> str:
    """The name of the file in a checkpoint that holds what was trained."""
    return MODEL_WEIGHTS if config.finetuning == "full" else ADAPTER_WEIGHTS


def _newest_complete_checkpoint(config: TrainConfig) -> Path:
    """The last checkpoint that was written to its end; a kill can leave a later one half-written."""
    output_dir = Path(config.output_dir)
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for folder in sorted(numbered, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if (folder / TRAINER_STATE).is_file() and (folder / weights_file(config)).is_file():
            return folder
        logger.warning(f"{folder}: incomplete, left out")
    raise InputError(f"{output_dir}: no checkpoint to resume from; leave out --resume_from_checkpoint")


def check_same_run(checkpoint: Path, contract: Contract) -> None:
    """Resuming goes on with the same base, prompt, pictures and trained parameters.

    Raises:
        InputError: something differs; it is named.
    """
    saved = Contract.load(checkpoint)
    if saved is None:
        raise InputError(f"{checkpoint}: no latexocr.json, so not a checkpoint of this library")
    pairs = {
        "base model": (saved.base_fingerprint, contract.base_fingerprint),
        "prompt": (saved.prompt, contract.prompt),
        "image options": (saved.image_policy, contract.image_policy),
        "load_in_4bit, load_in_8bit or quantized_parts": (saved.quantization, contract.quantization),
        "empty_thinking": (saved.empty_thinking, contract.empty_thinking),
    }
    before, now = (_recipe(found.training) for found in (saved, contract))
    pairs |= {name: (before[name], now[name]) for name in now if name in before}  # a version may add some
    different = [name for name, (before, now) in pairs.items() if before != now]
    if different:
        raise InputError(
            f"{checkpoint}: was trained with another {', '.join(different)}; resume with the same options"
        )


def _recipe(training: dict[str, Any]) -> dict[str, Any]:
    """What is trained, from the facts in `latexocr.json`; words that became tokens by what they are."""
    turns = training.get("options", {}).get("supervised_turns", "all")  # noted where it is not as by default
    return {**training.get("recipe", {}), "supervised_turns": turns, "new_tokens": training.get("new_tokens_hash")}


def _earlier_run(output_dir: Path) -> list[Path]:
    return [
        *sorted(output_dir.glob("checkpoint-*")),
        *(output_dir / name for name in LEFT_BEHIND if (output_dir / name).exists()),
    ]


def check_output_dir(config: TrainConfig, checkpoint: Path | None) -> Path:
    """Refuse to mix two runs in one folder, and to train into one that cannot be written. Nothing is deleted here.

    Raises:
        InputError: it cannot be written, or holds an earlier run.
    """
    output_dir = Path(config.output_dir)
    earlier = _earlier_run(output_dir)
    if earlier and checkpoint is None and not config.overwrite_output_dir:
        raise InputError(
            f"{output_dir}: holds an earlier run ({earlier[0].name}); choose another --output_dir, go on with "
            "--resume_from_checkpoint true, or discard it with --overwrite_output_dir true"
        )
    if config.process_index == 0:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            probe = output_dir / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"{output_dir}: cannot be written ({error.strerror}); choose another --output_dir"
            ) from error
    return output_dir


def discard_earlier_run(output_dir: Path) -> None:
    """What `--overwrite_output_dir` asks for, once everything else is known to be fine."""
    for path in _earlier_run(output_dir):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
