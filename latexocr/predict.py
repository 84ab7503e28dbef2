"""Inference: images -> LaTeX, with the prompt, image policy and end token that training used.

from latexocr.predict import LatexOCR

ocr = LatexOCR.from_pretrained("outputs/latexocr/adapter")  # without an argument: the bundled base model
print(ocr("formula.png"))
"""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latexocr.errors import InputError
from latexocr.quantization import Quantization, check_installed

if TYPE_CHECKING:
    import torch

    from latexocr.contract import Contract
    from latexocr.formats import Record
    from latexocr.generate import Generated
    from latexocr.images import ImageInput
    from latexocr.preprocess import Preprocessor

BUNDLED_BASE = Path(__file__).resolve().parent.parent / "data" / "base"
PREPARING_THREADS = 8
COLLATED = 16  # padded together, which is what `model.generate` takes at once where it is used
logger = logging.getLogger(__name__)


class LatexOCR:
    """A loaded model that reads formulas; make one with `from_pretrained`.

    Args:
        model: base, merged model, or adapter around its base, in evaluation mode.
        preprocessor: prompt builder and image policy, the same as in training.
        contract: the checkpoint's `latexocr.json`, None for a plain base model.
    """

    def __init__(self, model: Any, preprocessor: Preprocessor, contract: Contract | None = None) -> None:
        from latexocr.collate import FormulaCollator
        from latexocr.modeling import inner_model
        from latexocr.tower import Tower

        self.model, self.preprocessor, self.contract = model, preprocessor, contract
        self.collate = FormulaCollator(
            tokenizer=preprocessor.processor.tokenizer,
            family=preprocessor.family,
            blank=preprocessor.blank,
            tower=Tower.of(preprocessor.family, inner_model(model).config),
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        adapter: str | Path | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        prompt: str | None = None,
        hub: Literal["modelscope", "huggingface"] = "modelscope",
        base_bits: Literal[4, 8, 16] | None = None,
        trust_remote_code: bool = False,
    ) -> LatexOCR:
        """Load a base or merged checkpoint, with an adapter or without.

        Args:
            path: model folder, hub id, or an adapter folder (its base is then taken from `latexocr.json`); the
                adapter or else the base model of this checkout when left out.
            adapter: adapter folder to put on the model.
            device: "cpu", "cuda", "cuda:1", ...; a GPU by default when there is one.
            dtype: "float32", "bfloat16", ...; bfloat16 by default where the device has it.
            prompt: another instruction than the checkpoint was trained with.
            hub: where a hub id is downloaded from.
            base_bits: 4 or 8 rounds the base model's weights while they are loaded (bitsandbytes), 16 takes whole
                ones; as the adapter was trained by default.
            trust_remote_code: run Python code that comes with a checkpoint.

        Raises:
            InputError: not a checkpoint, an adapter for another base model, or no model named and none bundled.
        """
        import torch

        from latexocr import adapters, modeling
        from latexocr.checkpoint import ADAPTER_CONFIG
        from latexocr.config import PROMPT
        from latexocr.contract import Contract
        from latexocr.images import ImagePolicy
        from latexocr.preprocess import Preprocessor

        path = path or adapter or bundled_base()
        folder = modeling.resolve_checkpoint(path, hub)
        if adapter in (None, path) and (folder / ADAPTER_CONFIG).is_file():
            adapter = folder
            contract = adapters.check_adapter(adapter)
            if contract is None:
                raise InputError(
                    f"{path}: an adapter without latexocr.json; name its base: --model BASE --adapter {path}"
                )
            base_folder = modeling.resolve_base(contract, adapter)
        else:
            base_folder = folder
        family = modeling.family_in(base_folder)
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"device is {device!r}, but no GPU can be used here; leave it out or say cpu")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        source, contract = base_folder, Contract.load(base_folder)
        if adapter is not None:
            contract = Contract.load(Path(adapter)) or contract
        model = modeling.load_base(
            base_folder,
            dtype=dtype or modeling.default_dtype(device),
            device=device,
            quantization=_quantization(base_bits, contract, base_folder),
            whole=base_bits == 16,
            trust_remote_code=trust_remote_code,
        )
        if adapter is not None:
            model = adapters.load_adapter(model, Path(adapter), base_folder)
            if (Path(adapter) / "tokenizer_config.json").is_file():
                source = Path(adapter)
        processor = modeling.load_processor(source, trust_remote_code=trust_remote_code)
        image_processor = processor.image_processor
        policy = (
            contract.image_policy if contract else ImagePolicy(image_processor.patch_size * image_processor.merge_size)
        )
        prompt = prompt or (contract.prompt if contract else PROMPT)
        # Settings that a checkpoint stores for chat would be mixed into ours.
        modeling.inner_model(model).generation_config = modeling.greedy_config(processor, family)
        preprocessor = Preprocessor(
            processor, family, policy, prompt, positions_per_second=modeling.positions_per_second(base_folder),
            empty_thinking=contract is not None and contract.empty_thinking,
        )  # fmt: skip
        return cls(model.eval(), preprocessor, contract)

    def __call__(self, images: ImageInput | Sequence[ImageInput], **options: Any) -> str | list[str]:
        """Read one image (path, bytes, PIL image, array) -> str, or a list of them -> list[str].

        Args:
            images: one image or a list. What is known against an answer is logged as a warning.
            options: see `generate`.

        Raises:
            InputError: an image that cannot be read; it is named.
        """
        several = isinstance(images, list | tuple)
        answers = self.generate(images if several else [images], **options)
        for number, answer in enumerate(answers):
            if answer.warning:
                logger.warning(f"image {number}: {answer.warning}" if several else answer.warning)
        return [answer.text for answer in answers] if several else answers[0].text

    def generate(
        self,
        images: Sequence[ImageInput | Record],
        *,
        batch_size: int = 128,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        progress: bool = False,
    ) -> list[Generated]:
        """Read images in batches; answers come with confidence, warning, length and whether they ended by themselves.

        A blank picture is not read: its answer is empty.

        Args:
            images: paths, bytes, PIL images or arrays; or records, whose last answer is generated.
            batch_size: images at once; fewer where memory is short, and 16 at most when sampling.
            max_new_tokens: longest answer in tokens.
            temperature: greedy decoding when left out, else sampling at this temperature.
            top_p: sampling from the smallest set of tokens with this probability.
            min_p: sampling from tokens with at least this share of the best one's probability.
            progress: show a progress bar.
        """
        from PIL import Image
        from tqdm.auto import tqdm

        from latexocr.decoding import decoder_for
        from latexocr.generate import generate

        if isinstance(images, str | bytes | bytearray | Path | Image.Image) or getattr(images, "ndim", 4) in (2, 3):
            raise InputError(f"generate reads a list of images, got one ({type(images).__name__}): write [image]")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, needs at least 1")
        config = self._generation(max_new_tokens, temperature, top_p, min_p)
        answers: list[Generated] = []
        with (
            tqdm(total=len(images), desc="reading", unit="image", disable=not progress) as bar,
            decoder_for(self.model, config) as decoder,
        ):
            for prompts in self._prepared(images, batch_size):
                features = [prompt for prompt in prompts if prompt is not None]
                batches = [self.collate(features[at : at + COLLATED]) for at in range(0, len(features), COLLATED)]
                found = iter(generate(self.model, batches, self.preprocessor, config, decoder=decoder))
                answers += [_nothing() if prompt is None else self._judged(next(found)) for prompt in prompts]
                bar.update(len(prompts))
        return answers

    def _judged(self, answer: Generated) -> Generated:
        """The answer with an honest confidence, and what is known against it."""
        threshold = self.contract and self.contract.min_confidence
        if self.contract:
            answer = replace(answer, confidence=answer.confidence**self.contract.confidence_exponent)
        warning = None
        if not answer.finished:
            warning = f"the answer did not end within {answer.num_tokens} tokens and is cut off there"
        elif threshold is not None and answer.confidence < threshold:
            warning = f"confidence {answer.confidence:.2g} is below {threshold:.2g}: check this answer"
        return replace(answer, warning=warning)

    def _prompt(self, image: ImageInput | Record) -> dict[str, torch.Tensor] | None:
        """What the model gets of an image; None for one that shows nothing, of which it could only invent."""
        from latexocr.formats import Record
        from latexocr.images import load_image
        from latexocr.likeness import has_ink

        if isinstance(image, Record):
            if not self.preprocessor.is_plain(image):
                return self.preprocessor.prompt_of(image, as_bytes=True)
            image = image.media[0].load(image.where)
        picture = load_image(image)
        return self.preprocessor.prompt_features(picture, as_bytes=True) if has_ink(picture) else None

    def _prepared(
        self, images: Sequence[ImageInput | Record], batch_size: int
    ) -> Iterator[list[dict[str, torch.Tensor] | None]]:
        """Prompts of `batch_size` images each; the next ones are prepared while these are read."""
        from concurrent.futures import ThreadPoolExecutor

        waiting = []
        with ThreadPoolExecutor(PREPARING_THREADS) as pool:
            for start in range(0, len(images), batch_size):
                waiting.append(pool.map(self._prompt, images[start : start + batch_size]))
                if len(waiting) == 2:
                    yield list(waiting.pop(0))
            for prepared in waiting:
                yield list(prepared)

    def stream(self, image: ImageInput, *, max_new_tokens: int = 512, **sampling: Any) -> Iterator[str]:
        """Pieces of the answer as they are generated; joined they are what `__call__` returns, warnings included.

        Args:
            image: path, bytes, PIL image or array.
            max_new_tokens: longest answer in tokens.
            sampling: temperature, top_p, min_p as for `generate`.
        """
        if warning := (yield from self.pieces(image, max_new_tokens=max_new_tokens, **sampling)):
            logger.warning(warning)

    def pieces(
        self, image: ImageInput, *, max_new_tokens: int = 512, **sampling: Any
    ) -> Generator[str, None, str | None]:
        """`stream` that returns the warning, for who names the picture in it."""
        import threading

        from latexocr.generate import PieceStreamer, answer_pieces, generate

        config = self._generation(max_new_tokens, **{"temperature": None, "top_p": None, "min_p": None, **sampling})
        streamer = PieceStreamer(self.preprocessor.processor.tokenizer)
        prompt = self._prompt(image)
        if prompt is None:
            return _nothing().warning
        batch = self.collate([prompt])
        answers: list[Generated] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                answers.extend(generate(self.model, [batch], self.preprocessor, config, streamer=streamer))
            except BaseException as error:  # handed to the reader below, who would wait for ever otherwise
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield from answer_pieces(streamer, begun=self.preprocessor.begins_thought)
        thread.join()
        if failure:
            raise failure[0]
        return self._judged(answers[0]).warning

    def _generation(
        self, max_new_tokens: int, temperature: float | None, top_p: float | None, min_p: float | None
    ) -> Any:
        from latexocr.modeling import greedy_config

        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, needs at least 1")
        config = greedy_config(self.preprocessor.processor, self.preprocessor.family)
        config.max_new_tokens = max_new_tokens
        sampling = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
        given = {name: value for name, value in sampling.items() if value is not None}
        if any(value <= 0 for value in given.values()):
            raise InputError(f"sampling options must be above 0, given {given}; leave them out for greedy decoding")
        if given:
            config.update(do_sample=True, top_k=0, **given)
        return config


def _quantization(bits: int | None, contract: Contract | None, folder: Path) -> Quantization | None:
    """What `base_bits` means for a checkpoint; one that is stored rounded stays as it is."""
    from latexocr.modeling import check_whole, stored_quantization

    if bits in (4, 8):
        check_whole(folder, "--base-bits")
    trained = contract.quantization if contract else None
    if bits == 16 or (bits is None and (not trained or stored_quantization(folder))):
        return None
    found = trained if bits is None else Quantization(bits, trained.parts if trained else ("language",))
    check_installed(f"{folder} in {found.bits} bits", "--base-bits 16")
    return found


def bundled_base() -> Path:
    """The folder of the base model that comes with a checkout; that it is used is said once.

    Raises:
        InputError: this is an installation without the checkout's data.
    """
    if not (BUNDLED_BASE / "config.json").is_file():
        raise InputError(
            f"no model named, and no bundled one at {BUNDLED_BASE} (it comes with a checkout of the repository, not "
            "with an installed package); name a checkpoint: --model DIR_OR_HUB_ID"
        )
    _say_bundled()
    return BUNDLED_BASE


@cache
def _say_bundled() -> None:
    logger.warning(f"no model named: using the bundled base model for printed formulas, {BUNDLED_BASE}")


def _nothing() -> Generated:
    """The answer to a blank picture."""
    from latexocr.generate import Generated

    return Generated("", 0, True, 0.0, "the picture is blank: nothing to read")


def predict(
    images: list[str],
    model: str | None = None,
    *,
    adapter: Path | None = None,
    batch_size: int = 128,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    json: bool = False,
    stream: bool = False,
    prompt: str | None = None,
    device: str | None = None,
    hub: Literal["modelscope", "huggingface"] = "modelscope",
    base_bits: Literal[4, 8, 16] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Print one line of LaTeX for every image; blank and doubtful ones are named on stderr.

    Args:
        images: image files.
        model: base or merged model, or an adapter folder: a path or a hub id (default: the bundled base model).
        adapter: adapter folder to put on the model.
        batch_size: images at once; fewer where memory is short, and 16 at most when sampling.
        max_new_tokens: longest answer in tokens.
        temperature: greedy decoding when left out, else sampling at this temperature.
        top_p: sampling from the smallest set of tokens with this probability.
        min_p: sampling from tokens with at least this share of the best one's probability.
        json: print one JSON object a line: image_path, prediction, num_tokens, finished, confidence, warning.
        stream: print tokens as they come.
        prompt: another instruction than the checkpoint was trained with.
        device: cpu, cuda, ... (default: a GPU when there is one).
        hub: where a hub id is downloaded from.
        base_bits: 4 or 8 rounds the base model's weights while they are loaded (bitsandbytes), 16 takes whole ones
            (default: as the adapter was trained).
        trust_remote_code: run Python code that comes with a checkpoint.
    """
    if stream and json:
        raise InputError("--stream and --json exclude each other: tokens as they come are no JSON")
    for image in images:
        if Path(image).is_dir():
            raise InputError(f"{image}: a folder; name the images in it: {Path(image) / '*.png'}")
        if not Path(image).is_file():
            raise InputError(f"{image}: no such image file")
    ocr = LatexOCR.from_pretrained(
        model, adapter=adapter, device=device, prompt=prompt, hub=hub, base_bits=base_bits,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "min_p": min_p}
    if stream:
        for image in images:
            warning = _print_pieces(ocr.pieces(image, **sampling))
            if warning:
                logger.warning(f"{image}: {warning}")
        return
    answers = ocr.generate(images, batch_size=batch_size, **sampling)
    for image, answer in zip(images, answers, strict=True):
        if answer.warning:
            logger.warning(f"{image}: {answer.warning}")
        print(_json_line(image, answer) if json else " ".join(answer.text.splitlines()), flush=True)


def _print_pieces(pieces: Generator[str, None, str | None]) -> str | None:
    """A line of pieces as they come; returns what is known against it."""
    try:
        while True:
            print(next(pieces), end="", flush=True)
    except StopIteration as end:
        return end.value
    finally:
        print(flush=True)


def _json_line(image: str, answer: Generated) -> str:
    row = {
        "image_path": image,
        "prediction": answer.text,
        "num_tokens": answer.num_tokens,
        "finished": answer.finished,
        "confidence": answer.rounded_confidence,
        "warning": answer.warning,
    }
    return json.dumps(row, ensure_ascii=False)
