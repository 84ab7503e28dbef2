"""One function in several processes, results in order, memory flat.

Why not `multiprocessing`: its children either copy a process that may run CUDA and threads (fork) or run the user's
script a second time (spawn), and pools leave orphans behind after `kill -9`. These are plain Python processes that
read arguments from a pipe until it closes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from latexocr.errors import InputError


def ordered_map(
    function: Callable,
    arguments: Iterable,
    *,
    num_workers: int,
    where: Callable[[Any], str] = lambda argument: "",
    pass_fds: Sequence[int] = (),
) -> Iterator:
    """`map(function, arguments)` in that many processes; at most two arguments a worker are under way.

    Args:
        function: of a module of this package, by its name; argument and result can be pickled.
        arguments: one for each call.
        num_workers: processes; 1 calls the function here.
        where: what an argument is about, for the error: "rows 1 to 10: ".
        pass_fds: open files that the processes hold open, too: a lock that is to outlive this process with them.

    Raises:
        InputError: a process died.
    """
    if num_workers == 1:
        yield from map(function, arguments)
        return
    pending: deque = deque()
    with Workers(function, where, pass_fds) as workers, ThreadPoolExecutor(num_workers) as threads:
        try:
            for argument in arguments:
                pending.append(threads.submit(workers.call, argument))
                if len(pending) >= 2 * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)


class Workers:
    """Child processes, started when first needed; each ends when this process is gone. Arguments as `ordered_map`."""

    def __init__(self, function: Callable, where: Callable[[Any], str], pass_fds: Sequence[int]) -> None:
        self._function, self._where, self._pass_fds = function, where, pass_fds
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self._all: list[subprocess.Popen] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
        for worker in self._all:
            worker.wait()
            worker.stdout.close()

    def call(self, argument: object) -> object:
        """The function's result from a child process; called from as many threads as there are workers."""
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = self._start()
        try:
            pickle.dump(argument, worker.stdin)
            worker.stdin.flush()
            result, problem = pickle.load(worker.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise InputError(
                f"{self._where(argument)}a worker process died (exit status {worker.wait()}; -9 is usually lack of "
                "memory); run again with --num-workers 1"
            ) from error
        self._idle.put(worker)
        if problem is not None:
            raise problem
        return result

    def _start(self) -> subprocess.Popen:
        paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
        code = f"from latexocr.workers import work; work({self._function.__module__!r}, {self._function.__name__!r})"
        worker = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=self._pass_fds,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            start_new_session=True,  # Ctrl-C is for the parent; the pipe tells the child
        )
        self._all.append(worker)
        return worker


def work(module: str, name: str) -> None:
    """A worker's life: arguments from stdin, result or error of each to stdout, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    function = getattr(importlib.import_module(module), name)
    arguments = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints must not enter the pipe
    while True:
        try:
            argument = pickle.load(arguments)
        except (EOFError, pickle.UnpicklingError):  # the parent ended, or was killed while writing
            return
        try:
            answer = function(argument), None
        except (InputError, OSError) as error:
            answer = None, error
        try:
            answers.write(pickle.dumps(answer))
        except BrokenPipeError:
            return
