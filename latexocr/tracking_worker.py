"""The process that talks to SwanLab; `latexocr.tracking` starts one beside the training process.

Why a process of its own: `swanlab.init` replaces the SIGINT handler, `sys.excepthook` and, while it lasts,
stdout; its exit hook can wait minutes for a server that is gone; a log call in local mode costs about 10 ms
of CPU. Here none of that touches the training, a hang can be left behind, and when the training is killed
(SIGKILL, out of memory) the end of the pipe tells this process to close the run as crashed, which nothing
inside could do.

Protocol: pickled messages on stdin (first the settings), one JSON object a line on stdout (`ready` or
`failed`, later `warning`, `finished`). Everything that SwanLab prints goes to `worker.log` in the log folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import IO, Any

# After the end of training an upload may go on for this long, then the process gives up.
AFTERLIFE_SECONDS = 600
LOST_TRAINING = "the training process ended without closing its run (killed?)"


def main() -> None:
    """Start the run that the first message describes, carry out the rest, finish it."""
    # The end of training is told by the pipe; a Ctrl-C or a scheduler's SIGTERM for the whole job is not for
    # us.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    messages = sys.stdin.buffer
    settings = pickle.load(messages)
    replies = _redirect_output(Path(settings["log_dir"]))
    try:
        run = start_run(settings)
    except BaseException as error:
        reply(replies, event="failed", reason=f"{type(error).__name__}: {error}")
        os._exit(1)
    url = run.url if settings["mode"] == "online" else None
    reply(replies, event="ready", run_id=run.id, run_dir=str(run.dir), url=url)
    try:
        carry_out(messages, replies, settings)
    except BaseException as error:
        reply(replies, event="warning", reason=f"{type(error).__name__}: {error}")
        os._exit(1)
    reply(replies, event="finished")
    os._exit(0)  # the run is closed; SwanLab's own exit hooks have nothing left to wait for


def start_run(settings: dict[str, Any]) -> Any:
    """`swanlab.init` for these settings; never prompts, never touches the terminal."""
    import swanlab

    _report_command(settings["command"])
    if settings["mode"] == "local":
        _number_folders_from_zero()
    resume = {"id": settings["run_id"], "resume": "allow"} if settings["run_id"] else {}
    return swanlab.init(
        mode=settings["mode"],
        project=settings["project"],
        name=settings["name"],
        log_dir=settings["log_dir"],
        tags=settings["tags"],
        config=settings["config"],
        settings=swanlab.Settings(interactive=False, terminal={"proxy_type": "none"}),
        **resume,
    )


def carry_out(messages: IO[bytes], replies: IO[str], settings: dict[str, Any]) -> None:
    """Log what arrives until a `finish` message, the end of the pipe, or the death of the trainer."""
    import swanlab

    inbox: queue.SimpleQueue[tuple] = queue.SimpleQueue()
    # Read at once and always, so that the training process never waits for room in the pipe.
    threading.Thread(target=_read, args=(messages, inbox), daemon=True).start()
    warned: set[str] = set()
    while True:
        try:
            kind, *content = inbox.get(timeout=1)
        except queue.Empty:
            # A forked data-loader worker may hold the pipe open after the training process has been killed.
            if os.getppid() == settings["parent_pid"]:
                continue
            kind, content = "finish", ["crashed", LOST_TRAINING]
        if kind == "finish":
            break
        values, step, *board = content
        if kind == "scalars" and settings["mode"] == "local":
            values = _drawable(values, step, warned, replies)
        try:
            swanlab.log(media(values, *board) if kind == "samples" else values, step=step)
        except Exception as error:
            reply(replies, event="warning", reason=f"{type(error).__name__}: {error}")
    _exit_in(AFTERLIFE_SECONDS)
    state, reason = content
    # The local dashboard of swanlab 0.10.3 takes a run with an error for crashed and any other for finished.
    error = {"success": None, "aborted": f"aborted: {reason or 'no reason given'}"}.get(state, reason or state)
    swanlab.finish(state=state, error=error)


def reply(replies: IO[str], **event: Any) -> None:
    """One line to the training process; there may be nobody left to read it."""
    with contextlib.suppress(OSError):
        replies.write(json.dumps(event) + "\n")
        replies.flush()


def _read(messages: IO[bytes], inbox: queue.SimpleQueue[tuple]) -> None:
    try:
        while True:
            inbox.put(pickle.load(messages))
    except (EOFError, OSError, pickle.UnpicklingError):  # closed, or torn off in the middle of a message
        inbox.put(("finish", "crashed", LOST_TRAINING))


def media(samples: list[tuple[bytes, str, str, str]], board: str) -> dict[str, list]:
    """Samples as `latexocr.tracking.encoded` makes them -> what `swanlab.log` draws."""
    import swanlab
    from PIL import Image

    pictures, texts = [], []
    for png, caption, prediction, reference in samples:
        pictures.append(swanlab.Image(Image.open(io.BytesIO(png)), caption=caption))
        texts.append(swanlab.Text(prediction, caption=reference))
    return {f"{board}/images": pictures, f"{board}/text": texts}


def _drawable(values: dict[str, float], step: int, warned: set[str], replies: IO[str]) -> dict[str, float]:
    """Finite values only: after one NaN the "Tables" page of swanboard 0.1.10b2 is an error for all runs."""
    for name, value in values.items():
        if not math.isfinite(value) and name not in warned:
            warned.add(name)
            reply(replies, event="warning", reason=f"{name} is {value} at step {step}, which it cannot draw")
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _redirect_output(log_dir: Path) -> IO[str]:
    """Keep stdout for the replies; what SwanLab prints goes to `worker.log`, or nowhere if that cannot be."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        target = os.open(log_dir / "worker.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        target = os.open(os.devnull, os.O_WRONLY)
    os.dup2(target, 1)
    os.dup2(target, 2)
    return replies


def _exit_in(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, args=(1,))
    timer.daemon = True
    timer.start()


def _number_folders_from_zero() -> None:
    """Make the local dashboard's "Tables" page show each value in its own column.

    swanlab 0.10.3 numbers a run's metric folders from 1, swanboard 0.1.10b2 looks for the n-th metric in
    folder n counted from 0 (`get_project_summary`). Every other page asks the database for the folder, so
    starting at 0 suits all. Delete when swanlab's `LocalCallbacker._next_kid` starts at 0.
    """
    from swanlab.deprecated.local import LocalCallbacker

    original = LocalCallbacker.__init__

    def from_zero(self: LocalCallbacker) -> None:
        original(self)
        self._next_kid = 0

    LocalCallbacker.__init__ = from_zero


def _report_command(command: str) -> None:
    """Let the run's page show the command that started the training, not this process's (swanlab 0.10.3)."""
    with contextlib.suppress(ImportError):
        from swanlab.sdk.internal.probe_python.environment import runtime

        runtime.get_command = lambda: command


if __name__ == "__main__":
    main()
