"""Run a program on the input of strangers: no input, a private folder, limits on time, memory and files.

Why its own module: the limits do not depend on what is run. TeX's own guards (no shell, no files outside the
folder) are set here too, through the environment, because kpathsea reads them from there.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

STARTUP_SECONDS = 60.0  # a cold disk; TeX starts in 0.1 s
CPU_SECONDS = 600
MEMORY_KIB = 2_000_000
FILE_BLOCKS = 40_000  # of 512 bytes: 20 MB
MAX_OUTPUT_BYTES = 20_000_000

# `ulimit` in a shell and not `preexec_fn`: that one may hang in a process with threads, and a training has them.
_LIMITS = f"ulimit -c 0; ulimit -t {CPU_SECONDS}; ulimit -f {FILE_BLOCKS}; ulimit -v {MEMORY_KIB} 2>/dev/null; "


class Output(NamedTuple):
    text: str
    finished: bool  # False: stopped here, or killed by a limit


def run(command: Sequence[str], *, folder: str, seconds: float, progress: bytes, num_steps: int) -> Output:
    """Run `command` in `folder` until it ends, or until it has not printed `progress` for `seconds`.

    Args:
        command: program and arguments.
        folder: working folder, the only place where it may read and write files of its own.
        seconds: wall time between two signs of progress; the first may take `STARTUP_SECONDS` longer.
        progress: bytes that the program prints when it has come further.
        num_steps: how often it does so; further signs are a stranger's, who wants more time, and give none.
    """
    process = subprocess.Popen(
        ["sh", "-c", _LIMITS + 'exec "$@"', "sh", *command],
        cwd=folder,
        env=_environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, in_time = _read(process, seconds, progress, num_steps)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
    return Output(output.decode("utf-8", "replace"), in_time and process.returncode in (0, 1))


def _environment(folder: str) -> dict[str, str]:
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C",
        "HOME": folder,
        "TMPDIR": folder,
        "TEXMFOUTPUT": folder,
        "openin_any": "p",
        "openout_any": "p",
        "shell_escape": "f",
        "MKTEXTFM": "0",
        "MKTEXMF": "0",
        "max_print_line": "10000",
    }


def _read(process: subprocess.Popen, seconds: float, progress: bytes, num_steps: int) -> tuple[bytes, bool]:
    """What the program printed, and whether it closed its output in time."""
    output = bytearray()
    deadline = time.monotonic() + STARTUP_SECONDS + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0 and len(output) < MAX_OUTPUT_BYTES:
            if not selector.select(left):
                break
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                process.wait()
                return bytes(output), True
            seen = max(0, len(output) - len(progress) + 1)
            output += chunk
            signs = output.count(progress, seen)
            if 0 < signs <= num_steps:
                deadline = time.monotonic() + seconds
            num_steps -= signs
    return bytes(output), False
