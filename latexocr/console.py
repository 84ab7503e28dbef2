"""What a person sees while training runs: one bar, and one short line for every log."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

# name in the Trainer's logs -> how it is shown
TRAINING = {
    "loss": "loss {:.4f}",
    "grad_norm": "gradient norm {:.3f}",
    "learning_rate": "learning rate {:.2e}",
    "samples_per_second": "{:,.1f} samples/s",
    "tokens_per_second": "{:,.0f} tokens/s",
    "peak_memory_gib": "{:.1f} GiB",
}
VALIDATION = {
    "eval_loss": "validation: loss {:.4f}",
    "eval_exact_match": "exact match {:.3f}",
    "eval_edit_distance": "edit distance {:.3f}",
    "eval_bleu": "BLEU {:.1f}",
    "eval_runaway_rate": "runaways {:.3f}",
    "eval_runtime": "{:.1f} s",
}


class Console(TrainerCallback):
    """Replaces Trainer's own printing (dictionaries of quoted numbers); everything is in metrics.jsonl anyway."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        hidden = args.disable_tqdm or not state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", disable=hidden, dynamic_ncols=True
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line = log_line(state.global_step, logs)
        if line:
            tqdm.write(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def log_line(step: int, logs: dict[str, float]) -> str:
    """One line for a log of the Trainer; empty for its closing summary.

    >>> log_line(20, {"loss": 1.5, "learning_rate": 1e-4})
    'step 20  loss 1.5000  learning rate 1.00e-04'
    """
    shown = [form.format(logs[name]) for name, form in {**TRAINING, **VALIDATION}.items() if name in logs]
    return "  ".join([f"step {step}", *shown]) if {"loss", "eval_loss"} & logs.keys() else ""
