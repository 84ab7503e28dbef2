"""SIGTERM and Ctrl-C: training ends with a checkpoint, on all ranks after the same step, workers last."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

STEPS_AHEAD = 8  # of the GPU, where
SLOW_STEP = 1.0  # seconds are not what a step takes


class StopSignal(TrainerCallback):
    """SIGTERM or Ctrl-C: finish the step, write a checkpoint, end training. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received = 0  # number of the signal that training stops for, the same on all ranks
        self._here = 0  # of the one that this process has got
        self._asked: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self._steps_ahead, self._since = 0, time.monotonic()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._here and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._here = number

    def agreed(self, world_size: int, device: torch.device) -> bool:
        """Whether any rank was told to stop: ranks must leave the loop after the same step or they hang."""
        self.received = self._here
        if world_size > 1:
            self.received = int(self._highest(device, self._here))
        return self.received != 0

    def agreed_before(self, world_size: int, device: torch.device) -> bool:
        """`agreed` a few steps ago, where an answer of now would have to wait for the GPU.

        A step that waits for its end lets the GPU idle until the next one is launched, and a late batch would stop it
        at once. So steps are launched ahead, unless any rank's last one was slow: then a signal must be heard soon.
        """
        if world_size == 1 or device.type != "cuda":
            return self.agreed(world_size, device)
        slow, self._since = time.monotonic() - self._since > SLOW_STEP, time.monotonic()
        question = self._highest(device, 2 * self._here + slow)
        answer = torch.empty((), dtype=question.dtype, pin_memory=True).copy_(question, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._asked.append((answer, event))
        while len(self._asked) > self._steps_ahead + 1:
            answer, event = self._asked.popleft()
            event.synchronize()
            # all ranks hear the same, so they go on hearing at the same steps
            self.received, slow = max(self.received, int(answer) // 2), int(answer) % 2
            self._steps_ahead = 0 if slow else STEPS_AHEAD
        return self.received != 0

    def _highest(self, device: torch.device, number: int) -> torch.Tensor:
        """The highest number of all ranks, on its way; made on the device, because a copy would wait for it."""
        highest = torch.full((), number, device=device)
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        return highest

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.agreed_before(args.world_size, args.device):
            if args.save_total_limit == 1:
                args.save_total_limit = 2  # of one, transformers keeps the best only, and this one is to go on with
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.received:  # the step's end has saved and agreed already
            control.should_save = control.should_evaluate = False


class StoppedInEvaluation(Exception):
    """Raised after the checkpoint is written when a stop signal arrives during validation."""


def outlive_stop_signals(worker_id: int, *, then: Callable[[int], None] | None = None) -> None:
    """Initialise a data-loader worker so that it ends when training ends it, not when the whole job is signalled.

    Why: Slurm, systemd, `timeout` and a terminal signal every process of a job. torch's workers die of a SIGTERM, and
    a dead worker makes the DataLoader raise before `StopSignal` has its checkpoint. A SIGTERM of the training
    process itself is how a worker is told to end, so the sender decides.

    Args:
        worker_id: given by the DataLoader.
        then: the initialisation that this one comes before.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # sigwaitinfo, which tells the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_training_says_so, args=(os.getppid(),), daemon=True).start()
    if then is not None:
        then(worker_id)


def _end_when_training_says_so(training_pid: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training_pid:
        pass
    os._exit(0)
