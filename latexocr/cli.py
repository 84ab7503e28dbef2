"""The command line: every verb is a typed function, its parser is read from signature and docstring.

Why: help text written once. A stage's function is its Python API and its command; `Args:` in the docstring is
the `--help`. Nothing heavier than argparse is imported before the arguments are known to be good, so `--help`
answers at once (stage modules import torch inside their functions).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from latexocr.errors import InputError, MergeMismatch, nearest

# verb: (module, function, one line of help)
VERBS = {
    "data2csv": ("latexocr.data2csv", "data2csv", "data set of formula images -> images and data.csv"),
    "synthesize": ("latexocr.synthesize", "synthesize", "formulas -> pictures and data.csv, as many as wanted"),
    "csv2json": ("latexocr.csv2json", "csv2json", "data.csv -> train.json and val.json"),
    "doctor": ("latexocr.doctor", "doctor", "what is wrong with a data set, before it is trained on"),
    "preview": ("latexocr.preview", "preview", "what the model will see: tokens, labels, picture"),
    "plan": ("latexocr.plan", None, "a training's memory, speed and time on this machine, and what to change"),
    "train": ("latexocr.train", None, "train.json -> adapter"),
    "evaluate": ("latexocr.evaluate", "evaluate", "model, adapter and data -> predictions, metrics and report"),
    "score": ("latexocr.evaluate", "score_file", "predictions.jsonl -> metrics, report, comparison"),
    "predict": ("latexocr.predict", "predict", "images -> LaTeX"),
    "merge": ("latexocr.merge", "merge", "adapter -> stand-alone checkpoint"),
    "info": ("latexocr.info", "info", "what an adapter's, a model's or a run's folder is"),
    "upload": ("latexocr.upload", "upload", "adapter or model -> ModelScope or Hugging Face"),
    "build": (
        "latexocr.build",
        "build",
        "checkpoint of a real architecture with random weights, built offline",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status (0 fine, 1 a failed check, 2 bad input, 128 + signal when stopped)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: latexocr VERB [--option value ...]\n")
        print("\n".join(f"  {verb:<11}{line}" for verb, (_, _, line) in VERBS.items()))
        print("\n`latexocr VERB --help` lists a verb's options; --debug shows tracebacks.")
        return 0 if argv else 2
    if argv[0] == "--version":
        from latexocr import __version__

        print(__version__)
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        print(f"latexocr: unknown verb {verb!r}{nearest(verb, VERBS)} (see latexocr --help)", file=sys.stderr)
        return 2
    debug = "--debug" in rest
    rest = [argument for argument in rest if argument != "--debug"]
    warnings.filterwarnings("ignore", category=FutureWarning)  # renames between library versions are not the user's
    # Waiting OpenMP threads that spin bring each other to a halt when other work shares the cores: two CPU trainings
    # on two cores ran at 1 sample/s each, and at 26 like this. Read when torch is loaded, so it is set here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "filelock", "fsspec", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels for CPUs wherever it is installed
    try:
        return _run(verb, rest)
    except (InputError, FileNotFoundError, PermissionError) as error:
        if debug:
            raise
        print(f"latexocr {verb}: {_one_line(error)}", file=sys.stderr)
        return 2
    except MergeMismatch as error:
        if debug:
            raise
        print(f"latexocr {verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"latexocr {verb}: stopped", file=sys.stderr)
        return 130


def _run(verb: str, argv: list[str]) -> int:
    module_name, function_name, _ = VERBS[verb]
    if verb in ("train", "plan"):
        return _with_training_options(verb, argv)
    function = getattr(importlib.import_module(module_name), function_name)
    arguments = vars(parser_for(verb, function).parse_args(argv))
    parameters = inspect.signature(function).parameters.values()
    words = [arguments.pop(item.name) for item in parameters if item.kind is item.POSITIONAL_ONLY]
    result = function(*words, **arguments)
    if result is not None:
        print(result)
    return getattr(result, "exit_status", 0)  # a result may be that something is wrong


def _with_training_options(verb: str, argv: list[str]) -> int:
    """`train` and `plan` take any TrainConfig field, thousands of combinations: see `latexocr.config`."""
    from latexocr.config import parse_train_arguments, train_help

    if "-h" in argv or "--help" in argv:
        print(train_help(verb))
        return 0
    as_json = verb == "plan" and "--json" in argv
    values = parse_train_arguments([word for word in argv if not (as_json and word == "--json")])
    from latexocr.train import TrainConfig, train

    config = TrainConfig.from_dict(values)
    if verb == "plan":
        from latexocr.plan import plan

        found = plan(config)
        if config.process_index == 0:
            print(found.to_json() if as_json else found)
        return 0
    result = train(config)
    if result.is_main_process:
        print(result)
    return 128 + result.stopped_by if result.stopped_by else 0


class _Parser(argparse.ArgumentParser):
    """argparse prints the whole usage before an error; ours is one line like every other."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists all options)")


def parser_for(verb: str, function: Callable) -> argparse.ArgumentParser:
    """An argument parser from a function's signature: parameter = flag, annotation = type, docstring = help."""
    summary, helps = _docstring(function)
    parser = _Parser(f"latexocr {verb}", description=summary, allow_abbrev=False)
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        kind, is_list = _flag_type(hints[name])
        options: dict = {"help": helps[name].replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction if parameter.default else "store_true"
        else:
            options["type"] = kind
            choices = _choices(hints[name])
            if choices:
                options["choices"] = choices
            else:
                options["metavar"] = name.upper().removesuffix("S" if is_list else "")
        if required and typing.get_origin(hints[name]) is list:  # predict IMAGE [IMAGE ...]
            parser.add_argument(name, nargs="+", **options)
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:  # info FOLDER
            parser.add_argument(name, **options)
            continue
        if is_list:
            options["nargs"] = "+"
        if not required:
            options["default"] = parameter.default
            if parameter.default not in (None, False):
                options["help"] += f" (default: {parameter.default})"
        flags = [f"--{name.replace('_', '-')}", *([f"--{name}"] if "_" in name else [])]
        if len(name) == 1:
            flags = [f"-{name}", *flags]
        parser.add_argument(*flags, dest=name, required=required, **options)
    return parser


def _flag_type(hint: object) -> tuple[Callable, bool]:
    """The callable that reads one value of this annotation, and whether the flag takes several."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        if set(members) == {int, float}:
            return _number, False
        several = [member for member in members if typing.get_origin(member) is list]  # Path | list[Path]
        return _flag_type((several or members)[0])
    if typing.get_origin(hint) is typing.Literal:
        return type(typing.get_args(hint)[0]), False
    if typing.get_origin(hint) in (list, tuple):
        return _flag_type(typing.get_args(hint)[0])[0], True
    return {bool: bool, int: int, float: float, Path: Path}.get(hint, str), False


def _number(text: str) -> int | float:
    """`200` is a count, `0.1` a fraction."""
    try:
        return int(text)
    except ValueError:
        return float(text)


_number.__name__ = "number"  # argparse names the type in its error


def _choices(hint: object) -> list | None:
    members = typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else [hint]
    for member in members:
        if typing.get_origin(member) is typing.Literal:
            return list(typing.get_args(member))
    return None


def _docstring(function: Callable) -> tuple[str, dict[str, str]]:
    """First paragraph, and the `Args:` section as a dictionary."""
    text = inspect.getdoc(function) or ""
    summary = text.split("\n\n")[0].replace("\n", " ")
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    helps: dict[str, str] = {}
    for match in re.finditer(r"^    (\w+): (.*(?:\n     +.*)*)", section.group(1) if section else "", re.MULTILINE):
        helps[match.group(1)] = " ".join(match.group(2).split())
    return summary, helps


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    # torch puts a data-loader worker's traceback into the message; the original stands last
    return " ".join(str(error).split("latexocr.errors.InputError: ")[-1].split())
