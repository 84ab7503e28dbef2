"""Python processes that need not import torch: forks of a server that has imported it.

Why: the tests start more than a hundred processes that import torch, transformers and peft, 8 seconds of CPU time
each. `warm.py ask` takes the arguments of Python; a fork of the server runs them as `__main__` of a process of its
own, with the caller's environment, folder, stdin, stdout and stderr. It gets the signals that the caller gets and is
killed with it. Nothing of latexocr is imported before the fork. What packages read from the environment when they
are imported (OMP_NUM_THREADS, PYTHONPATH), the server has read.

    warm.py serve SOCKET                       until its stdin ends
    warm.py ask SOCKET [-u] SCRIPT | -m MODULE | -c CODE [ARGUMENT ...]
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import sys

# what a training has imported when it takes its first step
MODULES = (
    "torch.distributed.run", "torchvision.transforms.v2", "transformers.trainer", "peft", "datasets", "sacrebleu",
    "transformers.models.qwen2_vl.modeling_qwen2_vl", "transformers.models.qwen2_vl.processing_qwen2_vl",
)  # fmt: skip
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def ask(address: str, words: list[str]) -> None:
    """Have `words` run, and end as they end."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = json.dumps([words, dict(os.environ)]).encode()
    socket.send_fds(server, [b"%16d" % len(request)], [0, 1, 2, os.open(".", os.O_RDONLY)])
    server.sendall(request)
    pid = int(server.recv(16, socket.MSG_WAITALL))
    for number in FORWARDED:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = int(server.recv(16, socket.MSG_WAITALL))
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(address: str) -> list[str]:
    """Fork for every request; returns in the forks, with what they are to run."""
    import gc
    import importlib
    import select

    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # a collection would copy the pages that the forks share
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    watchers = 0
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            sys.exit()
        caller, _ = listener.accept()
        while watchers and os.waitpid(-1, os.WNOHANG)[0]:
            watchers -= 1
        watchers += 1
        if os.fork() == 0:
            listener.close()
            return take(caller)
        caller.close()


def take(caller: socket.socket) -> list[str]:
    """In a fork of the server: fork once more for the work, wait for it or for the end of its caller."""
    import select

    length, (*streams, folder), _, _ = socket.recv_fds(caller, 16, 4)
    request = caller.recv(int(length), socket.MSG_WAITALL)
    pid = os.fork()
    if pid:
        caller.sendall(b"%16d" % pid)
        if caller in select.select([os.pidfd_open(pid), caller], [], [])[0]:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):
            caller.sendall(b"%16d" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    caller.close()
    words, environment = json.loads(request)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.fchdir(folder)
    os.close(folder)
    os.environ.clear()
    os.environ.update(environment)
    return words


status = 0


def leave() -> None:
    """Freeing a gigabyte of modules object by object would cost each fork 2 seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(words: list[str]) -> None:
    """What `python WORDS` does."""
    import runpy
    from pathlib import Path

    if words[0] == "-u":
        words = words[1:]
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], str(Path.cwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        ask(sys.argv[2], sys.argv[3:])
    atexit.register(leave)  # before the imports: what is registered first runs last
    try:
        run(serve(sys.argv[2]))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        raise
    except BaseException:
        status = 1
        raise
