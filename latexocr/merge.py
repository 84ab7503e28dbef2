"""Stage 6: adapter -> stand-alone checkpoint, proven to answer as the adapter did.

Merged in float32 (in bfloat16 the small LoRA update is partly rounded away) into the whole weights of the base, also
where the adapter was trained on weights in 4 bits (what that changes is reported; LoftQ's adapters, which correct the
rounding, are merged into the rounded ones), stored in the base model's type and
under the hub's key names, then loaded again from disk and compared on pictures: the merged model must answer as base +
adapter, the loaded one as the stored weights; what rounding costs is reported.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from latexocr.errors import InputError, MergeMismatch
from latexocr.quantization import PACKAGE, Quantization, check_installed

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import PreTrainedModel

    from latexocr.contract import Contract
    from latexocr.predict import LatexOCR

# Accepted mean difference of log-probabilities where both sides compute the same in float32.
EXACT_TOLERANCE = 1e-4
# What rounding the weights to 16 bits may cost on average before it is worth a warning. It is no mismatch: random
# weights of Qwen2-VL-2B's shape, which amplify rounding, gave 0.34 although every stored weight was right.
NOTABLE_ROUNDING = 0.1
logger = logging.getLogger(__name__)


class Difference(NamedTuple):
    """Between two models' log-probabilities, over tokens that either gives a probability above 0.001."""

    mean: float
    largest: float

    def __str__(self) -> str:
        return f"{self.mean:.2g} on average, {self.largest:.2g} at most"


@dataclass(frozen=True)
class MergeResult:
    """Where the checkpoint lies and how far it is from base + adapter.

    Args:
        output: the checkpoint folder.
        merged: difference of log-probabilities, merged against base + adapter, both in float32.
        stored: the same for the checkpoint loaded back from disk, whose weights are rounded to `dtype`.
        dtype: type of the stored weights.
        rounded_base: difference of base + adapter as trained (in 4 or 8 bits) against what is merged: whole weights +
            adapter, or with LoftQ the rounded ones. None where nothing was rounded or bitsandbytes is missing.
    """

    output: Path
    merged: Difference
    stored: Difference
    dtype: str
    rounded_base: Difference | None = None

    def __str__(self) -> str:
        rounded = f", {self.rounded_base} from the rounded base it was trained on" if self.rounded_base else ""
        return (
            f"{self.output}: merged, stored as {self.dtype}; log-probabilities differ from base + adapter by "
            f"{self.merged} merged, {self.stored} loaded back{rounded}"
        )


def merge(
    adapter: Path,
    output: Path,
    *,
    model: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16", "4bit"] = "auto",
    max_shard_size: str = "5GB",
    images: list[str] | None = None,
    device: str | None = None,
    hub: Literal["modelscope", "huggingface"] = "modelscope",
    trust_remote_code: bool = False,
) -> MergeResult:
    """Merge an adapter into its base model and check the result.

    Args:
        adapter: adapter folder (adapter/ or checkpoint-N/).
        output: folder for the merged checkpoint; must be new or empty.
        model: the base model, when it is no longer where latexocr.json says.
        dtype: type of the stored weights (auto: the base model's; 4bit: the decoder's layers in NF4 by bitsandbytes,
            the rest as the base).
        max_shard_size: size of a weights file from which on there are several, such as 5GB.
        images: pictures to compare on (default: three drawn by this command).
        device: cpu, cuda, ... (default: a GPU when there is one).
        hub: where a hub id is downloaded from.
        trust_remote_code: run Python code that comes with a checkpoint.

    Raises:
        InputError: not an adapter, another base model, or a folder in use.
        MergeMismatch: the merged model answers differently; nothing is left behind.
    """
    import torch

    from latexocr import adapters, modeling
    from latexocr.images import load_image
    from latexocr.predict import LatexOCR

    contract = adapters.check_adapter(adapter)
    if contract is None and model is None:
        raise InputError(f"{adapter}: no latexocr.json, so its base model is unknown; give --model")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: already there and not empty; choose a new folder")
    if dtype == "4bit":
        check_installed("merge --dtype 4bit")
    if not re.fullmatch(r"\d+[KMG]B", max_shard_size):
        raise InputError(f"max_shard_size is {max_shard_size!r}, needs a size such as 5GB or 500MB")
    base_folder = modeling.resolve_checkpoint(model, hub) if model else modeling.resolve_base(contract, adapter)
    pictures = [load_image(path) for path in images] if images else check_pictures()
    options = {"device": device, "dtype": "float32", "hub": hub, "trust_remote_code": trust_remote_code}

    ocr = LatexOCR.from_pretrained(base_folder, adapter=adapter, base_bits=16, **options)
    loftq, trained, rounded_base = _corrects_rounding(contract), None, None
    if contract and contract.quantization and (loftq or importlib.util.find_spec(PACKAGE)):
        trained = LatexOCR.from_pretrained(base_folder, adapter=adapter, **options)
    if loftq:
        adapters.take_rounded(ocr.model, trained.model)
    answers = [answer.text for answer in ocr.generate(pictures, max_new_tokens=32)]
    expected = log_probabilities(ocr, pictures, answers)
    if trained:
        rounded_base = difference(log_probabilities(trained, pictures, answers), expected)
        del trained
    ocr.model = ocr.model.merge_and_unload()
    merged = difference(expected, log_probabilities(ocr, pictures, answers))
    if merged.mean > EXACT_TOLERANCE:
        raise MergeMismatch(f"merging {adapter} changed log-probabilities by {merged}")

    stored_dtype = _stored_dtype(base_folder) if dtype in ("auto", "4bit") else dtype
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror})") from error
    try:
        _cast_parameters(ocr.model, getattr(torch, stored_dtype))
        if dtype == "4bit":
            ocr.model = _in_4bit(ocr.model, output)
            options, stored_dtype = {**options, "dtype": stored_dtype}, f"4-bit and {stored_dtype}"
        _save(ocr, output, max_shard_size)
        if dtype != "4bit":
            _cast_parameters(ocr.model, torch.float32)
        rounded = log_probabilities(ocr, pictures, answers)
        ocr.model = None  # two copies in float32 need not be in memory together
        reloaded = log_probabilities(LatexOCR.from_pretrained(output, **options), pictures, answers)
        kept, stored = difference(rounded, reloaded), difference(expected, reloaded)
        if kept.mean > EXACT_TOLERANCE:
            raise MergeMismatch(f"{output}: loaded back, it differs from what was stored by {kept}; removed")
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # nothing half-written
        raise
    if stored.mean > NOTABLE_ROUNDING:
        logger.warning(f"rounding to {stored_dtype} moved log-probabilities by {stored}; --dtype float32 avoids it")
    return MergeResult(output, merged, stored, stored_dtype, rounded_base)


def _save(ocr: LatexOCR, output: Path, max_shard_size: str) -> None:
    from latexocr import modeling
    from latexocr.card import write_card

    with modeling.no_progress_bars():
        ocr.model.save_pretrained(output, save_original_format=True, max_shard_size=max_shard_size)
    modeling.save_processor(ocr.preprocessor.processor, output, ocr.preprocessor.policy)
    if ocr.contract:
        # it keeps saying which base and which training this came from; how that base was rounded is past
        replace(ocr.contract, quantization=None).save(output)
        write_card(output)


def _in_4bit(model: PreTrainedModel, output: Path) -> PreTrainedModel:
    """The decoder's layers in 4 bits, by way of the disk: they are rounded while they are read."""
    from latexocr import modeling

    with TemporaryDirectory(dir=output) as folder:
        with modeling.no_progress_bars():
            model.save_pretrained(folder, save_original_format=True)
        options = {"dtype": model.dtype, "device": model.device, "quantization": Quantization()}
        return modeling.load_base(Path(folder), **options).eval()


def _corrects_rounding(contract: Contract | None) -> bool:
    """Whether an adapter takes back what rounding did (LoftQ), so that only rounded weights fit it."""
    return contract is not None and contract.training.get("recipe", {}).get("lora_init") == "loftq"


def _cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Only the weights: casting buffers too (rotary frequencies) would lose what is computed at loading."""
    from latexocr.modeling import keeps_float32

    for name, parameter in model.named_parameters():
        if not keeps_float32(model, name):
            parameter.data = parameter.data.to(dtype)


def log_probabilities(ocr: LatexOCR, pictures: list[Image.Image], answers: list[str]) -> list[torch.Tensor]:
    """Log-probabilities (answer tokens, vocabulary) along the same given answers, one tensor a picture."""
    import torch

    found = []
    for picture, answer in zip(pictures, answers, strict=True):
        sample = ocr.preprocessor.sample(picture, answer)
        batch = {key: value.to(ocr.model.device) for key, value in ocr.collate([sample]).items() if key != "labels"}
        batch["pixel_values"] = batch["pixel_values"].to(ocr.model.dtype)
        with torch.no_grad():
            found.append(ocr.model(**batch).logits[0].float().log_softmax(-1).cpu())
    return found


def check_pictures() -> list[Image.Image]:
    """Three simple drawings: the comparison needs pictures, not formulas."""
    from PIL import Image, ImageDraw

    pictures = []
    for text in ("a + b = c", "x^2 - 1", "f(x) = sin x"):
        picture = Image.new("L", (14 * len(text), 40), "white")
        ImageDraw.Draw(picture).text((8, 8), text, fill="black")
        pictures.append(picture)
    return pictures


def difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> Difference:
    """Compare what `log_probabilities` gave for two models."""
    import math

    import torch

    likely = [(one > math.log(1e-3)) | (other > math.log(1e-3)) for one, other in zip(expected, found, strict=True)]
    gaps = torch.cat([(a - b).abs()[mask] for a, b, mask in zip(expected, found, likely, strict=True)])
    return Difference(float(gaps.mean()), float(gaps.max()))


def _stored_dtype(folder: Path) -> str:
    from latexocr.modeling import read_config

    config: dict[str, Any] = read_config(folder)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")
