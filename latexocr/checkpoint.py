"""What lies in a checkpoint's folder: the names of its files, and what their headers say, without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from latexocr.errors import InputError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL_WEIGHTS = "config.json", "model.safetensors"
TRAINER_STATE, LOSS_METER = "trainer_state.json", "loss_meter.json"  # what a resumed training reads
AVERAGE_WEIGHTS = "average.safetensors"  # beside a checkpoint's own weights, see `latexocr.averaging`
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class TensorHeader(NamedTuple):
    """A tensor in a safetensors file: its name, type (F32, BF16, U8, ...), shape, and bytes from `start` to `end`."""

    name: str
    dtype: str
    shape: list[int]
    start: int
    end: int


def tensor_headers(path: Path) -> Iterator[TensorHeader]:
    """The tensors of a safetensors file in the order of their names.

    The format (https://github.com/huggingface/safetensors#format): 8 bytes of header length, JSON header, data.

    Raises:
        InputError: not a safetensors file; a large file of a hub that was not downloaded is a short text.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size)))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a safetensors file; download or copy it again") from error
    header.pop("__metadata__", None)
    for name, tensor in sorted(header.items()):
        start, end = (8 + length + offset for offset in tensor["data_offsets"])
        if end > size:
            raise InputError(f"{path}: ends before its tensor {name}; download or copy it again")
        yield TensorHeader(name, tensor["dtype"], tensor["shape"], start, end)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: not JSON, or no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: malformed JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: needs a JSON object, holds {type(values).__name__}")
    return values
