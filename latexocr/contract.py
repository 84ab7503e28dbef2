"""`latexocr.json`: what inference must repeat exactly as training did it.

Why: the commonest complaint about fine-tuned vision models is a low loss and wrong answers, because inference
used another resolution, prompt or end token. Every checkpoint carries this file; everything that loads a
checkpoint reads it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from latexocr import __version__
from latexocr.checkpoint import tensor_headers
from latexocr.errors import InputError
from latexocr.images import ImagePolicy
from latexocr.quantization import Quantization

FILE_NAME = "latexocr.json"
FORMAT = 1
VERSIONED = ("torch", "transformers", "peft", "accelerate")


def _versions() -> dict[str, str]:
    """Versions of this package (also when it runs from a checkout that is not installed) and of what it stands on."""
    return {"latexocr": __version__, **{package: importlib.metadata.version(package) for package in VERSIONED}}


@dataclass(frozen=True)
class Contract:
    """The content of `latexocr.json`.

    Args:
        base_model: the folder or hub id that the run was given.
        base_fingerprint: hash of the base checkpoint's weight files, so that an adapter is not put on another base;
            of its config.json where training began with fresh weights.
        model_type: `config.model_type` of the base.
        prompt: the instruction beside every image.
        image_policy: how pictures were prepared.
        end_token: what ends an answer.
        hub: where `base_model` comes from when it is a hub id.
        quantization: how the base was rounded in training; None where it was not, or is stored like that.
        answer_format: what answers are: LaTeX, or JSON objects.
        empty_thinking: in earlier turns too, answers without reasoning begin with an empty thought.
        confidence_exponent: power of a whole answer's probability that makes it honest; 1 where too few validation
            answers were there to fit it on.
        min_confidence: answers below it are probably wrong (`latexocr.metrics.calibration`); None where too few
            validation answers were right to say.
        training: facts about the run (step, samples, scores), for people.
        versions: package versions that wrote it.
    """

    base_model: str
    base_fingerprint: str
    model_type: str
    prompt: str
    image_policy: ImagePolicy
    end_token: str
    hub: str = "modelscope"
    quantization: Quantization | None = None
    answer_format: str = "latex"
    empty_thinking: bool = False
    confidence_exponent: float = 1.0
    min_confidence: float | None = None
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=_versions)

    def save(self, folder: Path) -> None:
        """Write `latexocr.json` into `folder`, whole or not at all."""
        content = json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False, indent=2)
        write_text(folder / FILE_NAME, content + "\n")

    @classmethod
    def load(cls, folder: Path) -> Contract | None:
        """Read it from `folder`; None when there is no such file (a plain base checkpoint).

        Raises:
            InputError: unreadable, or of a newer format.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") > FORMAT:
                raise InputError(f"{path}: written by a newer latexocr; upgrade this one")
            values["image_policy"] = ImagePolicy(**values["image_policy"])
            if values.get("quantization"):
                rounded = values["quantization"]
                values["quantization"] = Quantization(rounded["bits"], tuple(rounded["parts"]))
            return cls(**values)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a latexocr contract ({error})") from error


def config_fingerprint(folder: Path) -> str:
    """`fingerprint` of a shape whose weights are made anew: a hash of its `config.json`."""
    return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:16]


def fingerprint(folder: Path) -> str:
    """A hash that tells checkpoints apart: every tensor's name, shape and first 512 bytes, read from the files.

    Reads a few hundred kilobytes at most.

    Raises:
        InputError: no safetensors weights in the folder.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: no *.safetensors weights (other formats are not read)")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            for tensor in tensor_headers(path):
                file.seek(tensor.start)
                digest.update(f"{tensor.name} {tensor.shape}".encode())
                digest.update(file.read(min(512, tensor.end - tensor.start)))
    return digest.hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: readers see the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
