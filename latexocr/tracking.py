"""SwanLab, the way people look at a training; the numbers themselves are in `metrics.jsonl`.

Why: a training that waits for somebody's server is worse than no curve. So SwanLab runs in a process of its own
(`track`): no call here waits for it, its failures become one warning, and the run's final state is right even when
training is killed.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import netrc
import os
import pickle
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from latexocr.errors import InputError, nearest
from latexocr.metrics_file import METRICS_FILE, is_number, parse_line, plain_number

if TYPE_CHECKING:
    from PIL import Image
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from latexocr.evaluation import Evaluation

logger = logging.getLogger(__name__)

MODES = ("online", "local", "offline", "disabled")
RUN_FILE = "swanlab.json"
# Longest wait for SwanLab to start (it waits beside the training, not before it) and, at the very end, to
# finish.
START_SECONDS = 60.0
FINISH_SECONDS = 20.0
# What waits for SwanLab at most; beyond this, messages are dropped and counted (metrics.jsonl has them all).
MAX_WAITING_MESSAGES = 10_000
MAX_WAITING_BOARDS = 8
MAX_PICTURE_SIDE = 1024
NUM_WORST = 20  # rows of an evaluation on the dashboard
MAX_CAPTION_CHARACTERS = 300
_PROJECT_NAME = re.compile(r"[0-9a-zA-Z_\-+.]{1,100}")
_SECRET_FIELDS = {"hub_token", "push_to_hub_token", "api_key", "password"}


@dataclass(frozen=True)
class Sample:
    """One row of the board: what the model read in a picture, and what stands there."""

    image: Image.Image
    prediction: str
    reference: str
    id: str


def resolve_mode(mode: str | None = None, *, environ: Mapping[str, str] | None = None) -> str:
    """Where a run is recorded, decided without asking anybody.

    The user's setting, else `SWANLAB_MODE`, else `online` if a key is at hand (`SWANLAB_API_KEY` or what
    `swanlab login` saved), else `local` if the dashboard is installed, else `offline` (`swanlab sync` later).

    Args:
        mode: online, local, offline, disabled, or None (or "auto") to decide.
        environ: the environment to look at, the process's own by default.

    Raises:
        InputError: an unknown mode, or `local` without the dashboard.

    >>> resolve_mode("offline")
    'offline'
    """
    environ = os.environ if environ is None else environ
    given, source = mode, "swanlab_mode"
    if given in (None, "", "auto"):
        given, source = environ.get("SWANLAB_MODE") or "auto", "SWANLAB_MODE"
    if given == "auto":
        if _has_api_key(environ):
            return "online"
        return "local" if find_spec("swanboard") else "offline"
    if given == "cloud":  # SwanLab's old name
        return "online"
    if given not in MODES:
        raise InputError(f"{source}={given!r}: not one of {', '.join(MODES)}{nearest(given, MODES)}")
    if given == "local" and find_spec("swanboard") is None:
        raise InputError(
            f"{source}='local' needs the dashboard: pip install 'swanlab[dashboard]', or choose offline or disabled"
        )
    return given


def dashboard_command(log_dir: Path | str) -> str:
    """The line that opens the local dashboard.

    **The dashboard serves any file that the user who starts it can read, without a login**, and anybody who
    reaches it can stop runs. So it is bound to 127.0.0.1; from another machine open a tunnel (`ssh -L
    5092:127.0.0.1:5092 HOST`) and never bind it to 0.0.0.0. If port 5092 is taken it picks another one: read
    the address it prints. Start it after the training has begun: on an empty folder it shows nothing, ever.

    >>> dashboard_command("outputs/my run/swanlog")
    "swanlab watch 'outputs/my run/swanlog' --host 127.0.0.1 --port 5092"
    """
    return f"swanlab watch {shlex.quote(str(log_dir))} --host 127.0.0.1 --port 5092"


def saved_run_id(output_dir: Path | str) -> str | None:
    """The id to hand to `track(run_id=...)` when a training resumes: that of an online run, else None.

    SwanLab continues a run online only. A local or offline training that resumes gets a new run.
    """
    row = None
    with contextlib.suppress(OSError):
        row = parse_line((Path(output_dir) / RUN_FILE).read_bytes())
    return row.get("run_id") if row and row.get("mode") == "online" else None


def flatten_config(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Nested settings as dotted keys with plain values, the only ones that the dashboard shows properly.

    None becomes "None" (it would show as `{}`), lists become JSON, other objects their text; tokens and passwords
    are masked.

    >>> flatten_config({"lora": {"r": 64, "targets": ["q", "v"]}})
    {'lora.r': 64, 'lora.targets': '["q", "v"]'}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, Mapping) and value:
            flat |= {f"{key}.{inner}": plain for inner, plain in flatten_config(value).items()}
        elif str(key) in _SECRET_FIELDS and value:
            flat[str(key)] = "***"
        elif isinstance(value, bool) or type(value) is str:
            flat[str(key)] = value
        elif is_number(value):
            flat[str(key)] = plain_number(value)
        elif isinstance(value, (list, tuple, Mapping)):
            flat[str(key)] = json.dumps(value, default=str, ensure_ascii=False)
        else:
            flat[str(key)] = str(getattr(value, "value", value))  # an Enum member is its value
    return flat


@contextlib.contextmanager
def track(
    *,
    name: str,
    log_dir: Path | str,
    config: Mapping[str, Any],
    project: str | None = None,
    is_main: bool = True,
    mode: str | None = None,
    tags: Sequence[str] = (),
    run_id: str | None = None,
    resume_step: int | None = None,
    run_file: Path | str | None = None,
) -> Iterator[Tracker]:
    """A SwanLab run around a training; yields the `Tracker` to log to.

    The run starts in another process while training already goes on. If online does not work (no answer
    within a minute, bad key, ...) it is recorded locally instead, with one warning, and nothing is lost. It
    ends as `success` after a normal exit, `aborted` after `tracker.finish_as("aborted", ...)`,
    KeyboardInterrupt or `sys.exit(1)`, and `crashed` after any other exception or when the process is killed.
    (The local dashboard knows only two words for it: an aborted run shows as crashed there, its reason under
    "Logs".) SIGTERM is yours to handle: turn it into `finish_as` or an exception. Leaving waits at most
    `FINISH_SECONDS` (20 s) for SwanLab to finish writing; what is not done by then goes on in the background
    for up to ten minutes.

    Args:
        name: the run's name, e.g. the output folder's.
        log_dir: SwanLab's folder, usually `output_dir/swanlog`.
        config: the training's settings; nested values are flattened with `flatten_config`.
        project: SwanLab's project; by default `SWANLAB_PROJECT` or else "latexocr".
        is_main: whether this is the main process; no other starts a run.
        mode: see `resolve_mode`.
        tags: words to find the run by.
        run_id: an online run to continue (see `saved_run_id`).
        resume_step: the step training resumes from; a run that cannot be continued says so in its name.
        run_file: where to note the run's id, mode and folder, usually `output_dir/swanlab.json`.

    Raises:
        InputError: a mode or project that cannot be; whatever happens later is a warning.

    Example:
        with track(name="try-1", log_dir="outputs/try-1/swanlog", config=args.to_dict()) as tracker:
            Trainer(..., callbacks=[MetricsFile(), tracker.callback()]).train()
    """
    mode = resolve_mode(mode)
    settings = {
        "project": _project(project, os.environ),
        "name": name[:MAX_CAPTION_CHARACTERS],
        "log_dir": str(Path(log_dir).resolve()),
        "config": flatten_config(config),
        "tags": list(tags),
        "run_id": run_id,
        "resume_step": resume_step,
        "parent_pid": os.getpid(),
        "command": shlex.join([sys.executable, *sys.argv]),
    }
    link = None
    if is_main and mode != "disabled":
        link = _Link(mode, settings, run_file=Path(run_file) if run_file else None)
    global _active
    _active = tracker = Tracker(link)
    try:
        yield tracker
    except BaseException as error:
        tracker.finish_as(*_final_state(error))
        raise
    finally:
        _active = None
        tracker.close()


_active: Tracker | None = None  # of the `track` that we are inside of


def log_evaluation(evaluation: Evaluation) -> None:
    """Send figures (`evaluation/NAME`) and the worst rows with their pictures to the SwanLab run that is active.

    That is the run of a `track` around this call, else one that the caller has begun with `swanlab.init`, else none.
    Rows without a picture that can be read are left out.

    Args:
        evaluation: what `evaluate` or `score_file` has found.
    """
    swanlab = sys.modules.get("swanlab")
    own_run = _active is None and swanlab is not None and swanlab.has_run()
    if _active is None and not own_run:
        return
    figures = evaluation.metrics.items()
    values = {f"evaluation/{name}": value for name, value in figures if not name.endswith(("_low", "_high"))}
    worst = _samples(evaluation.rows[number] for number in evaluation.worst_first())
    if own_run:
        from latexocr.tracking_worker import media

        samples = [encoded(s.image, s.prediction, s.reference, s.id) for s in worst]
        swanlab.log({**values, **(media(samples, "worst") if samples else {})})
    else:
        _active.log(values, _active.step)
        _active.log_samples(worst, _active.step, board="worst")


def _samples(rows: Iterable[dict[str, Any]]) -> list[Sample]:
    from PIL import Image

    samples: list[Sample] = []
    for row in rows:
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
            picture = Image.open(row["image_path"]).convert("RGB")
            samples.append(Sample(picture, row["prediction"] or "", row["reference"], str(row["id"])))
        if len(samples) == NUM_WORST:
            break
    return samples


class Tracker:
    """What a training tells SwanLab: every call returns at once, none raises, without a run none does anything."""

    def __init__(self, link: _Link | None) -> None:
        self._link = link
        self._final: tuple[str, str | None] = ("success", None)
        self.step = 0  # the last one that was logged

    @property
    def run(self) -> dict[str, Any]:
        """`mode`, `run_id`, `run_dir` and `url` of the run, empty while it starts and without one."""
        return dict(self._link.run) if self._link else {}

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Scalars by chart name, e.g. `{"train/loss": 0.5}`; values that are no numbers are left out."""
        self.step = max(self.step, int(step))
        numbers_only = {name: float(value) for name, value in values.items() if is_number(value)}
        if self._link and numbers_only:
            self._link.send(("scalars", numbers_only, int(step)))

    def log_samples(self, samples: Sequence[Sample], step: int, *, board: str = "samples") -> None:
        """A board: each picture with prediction and reference beneath, and the same as a table of text."""
        if self._link and samples:
            try:
                rows = [(s.image.copy(), s.prediction, s.reference, s.id) for s in samples]
            except Exception as error:  # a picture that cannot be decoded is not worth a training
                self._link.warn("samples of step %d: %s", step, error)
                return
            self._link.send(("samples", rows, int(step), board))

    def callback(self) -> TrainerCallback:
        """For `Trainer(callbacks=[...])`: sends what the Trainer logs."""
        return _SendLogs(self)

    def finish_as(self, state: str, reason: str | None = None) -> None:
        """Note how the run ends ("success", "aborted" or "crashed"); it takes effect when `track` is left."""
        self._final = (state, reason)

    def close(self) -> None:
        """End the run, waiting at most `FINISH_SECONDS`; `track` calls it."""
        if self._link:
            self._link.close(*self._final)


class _SendLogs(TrainerCallback):
    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            self._tracker.log(_chart_names(logs or {}), state.global_step)


def _chart_names(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The Trainer's names as chart names: train/, eval/, test/, and summary/ for the log after the last step.

    >>> _chart_names({"loss": 0.5, "epoch": 1.0})
    {'train/loss': 0.5, 'train/epoch': 1.0}
    >>> _chart_names({"eval_loss": 0.5, "epoch": 1.0})
    {'eval/loss': 0.5}
    """
    if "train_runtime" in logs:
        group, prefix = "summary", "train_"
    else:
        group = next((group for group in ("eval", "test") if any(n.startswith(f"{group}_") for n in logs)), "train")
        prefix = f"{group}_"
    named = {f"{group}/{name.removeprefix(prefix)}": value for name, value in logs.items()}
    if group != "train":
        named.pop(f"{group}/epoch", None)  # one chart of it is enough
    return named


def _final_state(error: BaseException) -> tuple[str, str | None]:
    if isinstance(error, SystemExit) and error.code in (0, None):
        return "success", None
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return "aborted", f"{type(error).__name__} {error}".strip()
    return "crashed", "".join(traceback.format_exception(error))


def _project(given: str | None, environ: Mapping[str, str]) -> str:
    """The setting, else a `SWANLAB_PROJECT` that is a name (SwanLab itself wants JSON there), else latexocr."""
    if given and not _PROJECT_NAME.fullmatch(given):
        raise InputError(f"swanlab_project={given!r}: up to 100 letters, digits and _ - + . are allowed")
    from_environment = environ.get("SWANLAB_PROJECT", "")
    return given or (from_environment if _PROJECT_NAME.fullmatch(from_environment) else "latexocr")


def _has_api_key(environ: Mapping[str, str]) -> bool:
    """Whether SwanLab would find a key: the environment, or the files that `swanlab login` writes."""
    if environ.get("SWANLAB_API_KEY"):
        return True
    root = environ.get("SWANLAB_ROOT") or environ.get("SWANLAB_SAVE_DIR") or Path.home() / ".swanlab"
    for folder in (Path.cwd() / ".swanlab", Path(root)):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(folder / ".netrc").hosts:
                return True
    return False


# ---- the process that talks to SwanLab ---------------------------------------------------------------------


class _Link:
    """A queue, and the thread that carries it to the worker process (`latexocr.tracking_worker`)."""

    def __init__(self, mode: str, settings: dict[str, Any], *, run_file: Path | None) -> None:
        self.run: dict[str, Any] = {}
        self._mode, self._settings, self._run_file = mode, settings, run_file
        self._messages: queue.Queue[tuple] = queue.Queue(MAX_WAITING_MESSAGES)
        self._boards = threading.Semaphore(MAX_WAITING_BOARDS)
        self._final: tuple[str, str | None] = ("success", None)
        self._closing = threading.Event()
        self._over = False
        self._num_dropped = 0
        self._warnings: set[str] = set()
        self._thread = threading.Thread(target=self._carry, name="latexocr-tracking", daemon=True)
        self._thread.start()

    def send(self, message: tuple) -> None:
        if self._over or self._closing.is_set():
            return
        if message[0] == "samples" and not self._boards.acquire(blocking=False):
            self._num_dropped += 1
            return
        try:
            self._messages.put_nowait(message)
        except queue.Full:
            self._num_dropped += 1
            if message[0] == "samples":
                self._boards.release()

    def close(self, state: str, reason: str | None) -> None:
        if self._closing.is_set():
            return
        self._final = (state, reason)
        self._closing.set()
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            logger.warning(
                "SwanLab has not finished within %.0f s; it goes on in the background (up to ten minutes)",
                FINISH_SECONDS,
            )
        if self._num_dropped:
            logger.warning(
                "SwanLab was too slow: %d logs are missing there; %s has all numbers",
                self._num_dropped,
                METRICS_FILE,
            )

    def _carry(self) -> None:
        """The thread: start a worker, hand it every message, tell it the end, wait for its last word."""
        try:
            worker = self._start()
            if worker is None:
                return
            while not (self._closing.is_set() and self._messages.empty()):
                with contextlib.suppress(queue.Empty):
                    self._pass_on(self._messages.get(timeout=0.1), worker)
            worker.send(("finish", *self._final))
            worker.wait()
        except BrokenPipeError:
            self.warn("SwanLab's process has ended early; its log is %s", self._worker_log)
        except Exception as error:  # whatever it is, training goes on
            self.warn("tracking has failed: %s", f"{type(error).__name__}: {error}")
        finally:
            self._over = True
            while not self._messages.empty():  # nobody reads them any more
                self._messages.get_nowait()

    def _pass_on(self, message: tuple, worker: _Worker) -> None:
        if message[0] == "samples":
            self._boards.release()
            try:
                message = ("samples", [encoded(*sample) for sample in message[1]], *message[2:])
            except Exception as error:  # an exotic picture costs its board, not the tracking
                self.warn("samples of step %d: %s", message[2], error)
                return
        worker.send(message)

    def _start(self) -> _Worker | None:
        """A worker whose run has begun, in the first mode that works."""
        modes = [self._mode]
        if self._mode == "online" and find_spec("swanboard"):
            modes.append("local")
        if "offline" not in modes:
            modes.append("offline")
        for mode in modes:
            worker = _Worker(self._settings_for(mode), warn=self.warn)
            self.run = worker.wait_until_ready(self._seconds_to_start)
            if self.run:
                self._report(mode, fallback=mode != self._mode)
                return worker
            self.warn("SwanLab could not start %s (%s)", mode, worker.failure)
        self.warn("SwanLab is off for this run; %s has all numbers", METRICS_FILE)
        return None

    def _seconds_to_start(self) -> float:
        """How long a start may take; once training is over, half of what is left for the end."""
        return min(START_SECONDS, FINISH_SECONDS / 2) if self._closing.is_set() else START_SECONDS

    def _settings_for(self, mode: str) -> dict[str, Any]:
        settings = dict(self._settings, mode=mode, run_id=self._settings["run_id"] if mode == "online" else None)
        if settings["resume_step"] is not None and not settings["run_id"]:
            settings["name"] += f" (resumed at step {settings['resume_step']})"
        return settings

    def _report(self, mode: str, *, fallback: bool) -> None:
        self.run |= {"mode": mode, "project": self._settings["project"]}
        view = {"online": self.run["url"], "local": dashboard_command(self._settings["log_dir"])}.get(
            mode, f"swanlab sync {shlex.quote(self.run['run_dir'])}"
        )
        if fallback:
            self.warn("SwanLab records this run %s instead: %s", mode, view)
        else:
            logger.info("SwanLab (%s): %s", mode, view)
        self._note_run()

    def _note_run(self) -> None:
        if self._run_file:
            with contextlib.suppress(OSError):
                self._run_file.parent.mkdir(parents=True, exist_ok=True)
                temporary = self._run_file.with_name(f".{self._run_file.name}.tmp")
                temporary.write_text(json.dumps(self.run, indent=1) + "\n", encoding="utf-8")
                temporary.replace(self._run_file)

    def warn(self, message: str, *args: Any) -> None:
        """Log a warning, the same one only once."""
        text = message % args
        if text not in self._warnings and len(self._warnings) < 20:
            self._warnings.add(text)
            logger.warning("%s", text)

    @property
    def _worker_log(self) -> Path:
        return Path(self._settings["log_dir"]) / "worker.log"


class _Worker:
    """One `latexocr.tracking_worker` process, its pipe, and the thread that reads its replies."""

    def __init__(self, settings: dict[str, Any], *, warn: Callable[..., None]) -> None:
        self.failure = "no answer in time"
        self._warn = warn
        self._ready: dict[str, Any] = {}
        self._answered = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "latexocr.tracking_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # an inherited one would keep the caller's pipe open after our end
            env=_worker_environment(os.environ),
            start_new_session=True,  # Ctrl-C reaches a terminal's whole group; this process must outlive it
        )
        self._reader = threading.Thread(target=self._read, name="latexocr-tracking-replies", daemon=True)
        self._reader.start()
        with contextlib.suppress(BrokenPipeError):  # it is dead already: `wait_until_ready` will say so
            self.send(settings)

    def send(self, message: Any) -> None:
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()

    def wait_until_ready(self, seconds: Callable[[], float]) -> dict[str, Any]:
        """The run's data; empty when the worker failed or needed more than `seconds()` (then it is gone)."""
        start = time.monotonic()
        while not self._answered.wait(0.1) and time.monotonic() - start < seconds():
            pass
        if not self._ready:
            self._process.kill()
            self._process.wait()
        return self._ready

    def wait(self) -> None:
        """Until the worker has finished its run and ended."""
        self._process.stdin.close()
        self._process.wait()
        self._reader.join(5)  # what it said last; bounded, because a fork of it may hold the pipe open

    def _read(self) -> None:
        for line in self._process.stdout:
            event = parse_line(line) or {}
            kind = event.pop("event", None)
            if kind == "ready":
                self._ready = event
            elif kind == "failed":
                self.failure = " ".join(event["reason"].split())
            elif kind == "warning":
                self._warn("SwanLab: %s", " ".join(event["reason"].split()))
            self._answered.set()
        self._answered.set()


def encoded(image: Image.Image, prediction: str, reference: str, sample_id: str) -> tuple:
    """A sample as the worker takes it: PNG small enough for a page, caption, text, text's caption.

    Done in the thread, not in training.
    """
    image = image.convert("RGB")
    image.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    png = io.BytesIO()
    image.save(png, "PNG")
    caption = f"prediction {_shortened(prediction)} | reference {_shortened(reference)}"
    return png.getvalue(), caption, prediction or "(empty)", f"{sample_id}: {reference}"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CAPTION_CHARACTERS else text[:MAX_CAPTION_CHARACTERS] + "…"


def _worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would crash SwanLab, with the folder that this package comes from.

    swanlab 0.10.3 reads `SWANLAB_PROJECT` and its like as JSON objects and fails on plain words; an unknown
    `SWANLAB_MODE` fails too, and the mode is already decided.
    """
    groups = {
        f"SWANLAB_{name}" for name in ("PROJECT", "EXPERIMENT", "RUN", "INTEGRATION", "CORE", "PROBE", "TERMINAL")
    }
    clean = {
        name: value
        for name, value in environ.items()
        if name.upper() != "SWANLAB_MODE" and not (name.upper() in groups and not value.startswith("{"))
    }
    package_parent = str(Path(__file__).resolve().parent.parent)
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, environ.get("PYTHONPATH")]))
    return clean
