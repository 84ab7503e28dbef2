"""Features of a frozen vision tower, computed once into a file, and read in the place of pixels ever after.

Why: where only the language model is trained, the tower says the same about an image in every epoch. With its
answers on disk no image is decoded and no vision block runs in any step; the operating system keeps the file in
memory as far as there is room.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from latexocr.contract import Contract, write_text
from latexocr.dataset import Selection
from latexocr.errors import InputError
from latexocr.families import family_of
from latexocr.modeling import activation_dtype, inner_model
from latexocr.preprocess import Preprocessor
from latexocr.records import Records
from latexocr.stopping import outlive_stop_signals

FOLDER = "vision_features"  # in output_dir: kept for resuming, removed when training has come to its end
GRID_BYTES = 24  # time, height and width of an image, in front of its features


class FeatureFile:
    """Grid and features of every image, one behind the other in one file.

    Args:
        path: the file; opened at each access, so that any process may read and write its own images.
        image_tokens: visual tokens of each image.
        width: numbers a visual token.
        dtype: of the features.
    """

    def __init__(self, path: Path, image_tokens: list[int], width: int, dtype: torch.dtype) -> None:
        self.path, self.width, self.dtype = path, width, dtype
        sizes = torch.tensor(image_tokens) * width * dtype.itemsize + GRID_BYTES
        self._ends = sizes.cumsum(0)
        self.num_bytes = int(self._ends[-1])

    def _start(self, index: int) -> int:
        return int(self._ends[index - 1]) if index else 0

    def write(self, index: int, grid: torch.Tensor, features: torch.Tensor) -> None:
        """Store one image.

        Args:
            index: number of the image.
            grid: (3,) patches in time, height, width.
            features: (visual tokens, width)
        """
        content = grid.long().numpy().tobytes() + features.contiguous().view(torch.uint8).numpy().tobytes()
        assert len(content) == int(self._ends[index]) - self._start(index), "not the number of visual tokens"
        with self.path.open("r+b") as file:
            file.seek(self._start(index))
            file.write(content)

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        """`image_features` (visual tokens, width) and `image_grid_thw` (1, 3) of one image."""
        with self.path.open("rb") as file:
            file.seek(self._start(index))
            content = bytearray(file.read(int(self._ends[index]) - self._start(index)))
        return {
            "image_features": torch.frombuffer(content, dtype=self.dtype, offset=GRID_BYTES).view(-1, self.width),
            "image_grid_thw": torch.frombuffer(content, dtype=torch.long, count=3)[None],
        }


@dataclass
class _Handed:
    """What the models ask of an image's features."""

    pooler_output: torch.Tensor | tuple[torch.Tensor, ...]
    deepstack_features: list[torch.Tensor]


class GivenFeatures:
    """`model` takes features that come as `pixel_values` for those of the images, during training steps only.

    Instead of `mm_encoder_outputs`, which transformers 5.23 knows and 5.17 does not. With deepstack the tower itself
    hands them on, because these versions differ in what they make of its output.

    Args:
        model: with or without adapter.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        inner = inner_model(model)
        self._width = inner.config.get_text_config().hidden_size
        self._deepstack = family_of(inner.config.model_type).deepstack
        self._place = (inner.model.visual, "forward") if self._deepstack else (inner.model, "get_image_features")
        setattr(*self._place, self._hand_on)
        decoder = {id(parameter) for parameter in inner.model.language_model.parameters()}
        self._tower = [parameter for parameter in inner.model.parameters() if id(parameter) not in decoder]
        self._parked: list[torch.Tensor] = []

    def park(self) -> None:
        """Keep the tower's weights in the host's memory until pixels are looked at: 1.2 GiB of Qwen2-VL's."""
        self._parked = [parameter.data.cpu() for parameter in self._tower]
        for parameter in self._tower:
            parameter.data = parameter.data.new_empty(0)

    def _unpark(self) -> None:
        for parameter, values in zip(self._tower, self._parked, strict=True):
            parameter.data = values.to(parameter.device)
        self._parked = []

    def _hand_on(self, features: torch.Tensor, *_: Any, **__: Any) -> _Handed:
        pooler_output, *deepstack_features = features.split(self._width, dim=1)
        return _Handed(pooler_output if self._deepstack else (pooler_output,), deepstack_features)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pixels are looked at again inside."""
        parked = bool(self._parked)
        if parked:
            self._unpark()
        delattr(*self._place)
        try:
            yield
        finally:
            setattr(*self._place, self._hand_on)
            if parked:
                self.park()


def image_features(model: Any, pixel_values: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """(visual tokens, width): what the decoder gets of images; deepstack features stand beside the others.

    Args:
        model: the transformers model.
        pixel_values: (patches, ...) of all images.
        grids: (images, 3) patches in time, height, width.
    """
    if not family_of(model.config.model_type).deepstack:
        return torch.cat(model.model.get_image_features(pixel_values, grids).pooler_output)
    output = model.model.visual(pixel_values, grid_thw=grids)
    return torch.cat([output.pooler_output, *output.deepstack_features], dim=1)


class VisionCache:
    """Computes the features of a training's images, each rank a part of them, unless an earlier start has.

    Args:
        trainer: a `FormulaTrainer` with the model on its device.
        selection: the training records with their lengths.
        preprocessor: as for training.
        contract: tells base model and image policy.

    Raises:
        InputError: weights sharded over the ranks, or too little room on the disk.
    """

    def __init__(self, trainer: Any, selection: Selection, preprocessor: Preprocessor, contract: Contract) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError("cache_vision_features needs whole weights on every rank: not with FSDP or DeepSpeed")
        if not preprocessor.all_plain(selection.records):
            raise InputError("cache_vision_features needs records of one picture and its answer; leave it out")
        self.trainer, self.contract, self.patches_per_token = trainer, contract, preprocessor.patches_per_token
        self.images = _Images(selection.records, preprocessor)
        (example,) = self._features([self.images[0]])
        self.file = FeatureFile(
            Path(trainer.args.output_dir) / FOLDER / "features.bin",
            selection.counts.image.tolist(),
            example.shape[1],
            example.dtype,
        )
        held = self.file.path.stat().st_blocks * 512 if self.file.path.is_file() else 0
        free = shutil.disk_usage(trainer.args.output_dir).free
        if self.file.num_bytes > free + held:
            raise InputError(
                f"{trainer.args.output_dir}: the vision features need {self.file.num_bytes / 1e9:.1f} GB, "
                f"{free / 1e9:.1f} GB are free; choose another --output_dir or leave out cache_vision_features"
            )

    def filled(self) -> FeatureFile:
        """The file, complete: as it is where base model, images and image policy are still the same, else new.

        Raises:
            InputError: an image cannot be read, or the ranks do not share `output_dir`.
        """
        accelerator, description = self.trainer.accelerator, self._description()
        marker = self.file.path.with_name("complete.json")
        ready = marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == description
        num_ready = accelerator.reduce(torch.tensor(int(ready), device=accelerator.device), reduction="sum")
        if int(num_ready) < accelerator.num_processes:
            if accelerator.is_main_process:
                self.file.path.parent.mkdir(exist_ok=True)
                marker.unlink(missing_ok=True)
                self.file.path.write_bytes(b"")
            accelerator.wait_for_everyone()
            self._compute()
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_text(marker, json.dumps(description, indent=2) + "\n")
        return self.file

    def remove(self) -> None:
        """Free the disk, once no rank reads any more."""
        self.trainer.accelerator.wait_for_everyone()
        if self.trainer.accelerator.is_main_process:
            shutil.rmtree(self.file.path.parent)

    def _description(self) -> dict[str, Any]:
        """What the features depend on; images by name, size and time of change."""
        digest = hashlib.sha256()
        for record in self.images.records:
            digest.update(f"{_version(record.media[0].content)}\n".encode())
        return {
            "base_fingerprint": self.contract.base_fingerprint,
            "quantization": str(self.contract.quantization),
            "image_policy": asdict(self.contract.image_policy),
            "images": digest.hexdigest(),
            "width": self.file.width,
            "dtype": str(self.file.dtype),
        }

    def _compute(self) -> None:
        if not self.file.path.is_file():
            raise InputError(
                f"{self.file.path.parent.parent}: must be one folder for all nodes to cache_vision_features"
            )
        args = self.trainer.args
        mine = range(args.process_index, len(self.images), args.world_size)
        loader = DataLoader(
            self.images,
            sampler=mine,
            batch_size=args.per_device_eval_batch_size,
            collate_fn=list,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=outlive_stop_signals,
            generator=torch.Generator(),  # the global one belongs to training
        )
        hidden = args.disable_tqdm or args.process_index > 0
        with tqdm(total=len(mine), desc="vision features", unit=" images", disable=hidden) as bar:
            indices = iter(mine)
            for images in loader:
                if self.trainer.stop.received:
                    raise SystemExit(128 + self.trainer.stop.received)  # there is no step to finish yet
                for image, features in zip(images, self._features(images), strict=True):
                    self.file.write(next(indices), image["image_grid_thw"][0], features)
                bar.update(len(images))

    @torch.no_grad()
    def _features(self, images: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        """Features of each image, (visual tokens, width)."""
        model = inner_model(self.trainer.model)
        pixels, grids = (torch.cat([image[key] for image in images]) for key in ("pixel_values", "image_grid_thw"))
        sizes = (grids.prod(-1) // self.patches_per_token).tolist()
        with self.trainer.accelerator.autocast():
            features = image_features(model, pixels.to(model.device, activation_dtype(model)), grids.to(model.device))
        return features.cpu().split(sizes)


def _version(content: Path | bytes | str) -> str:
    """Tells one picture from another, and a file from what it was before."""
    if not isinstance(content, Path):
        return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()
    status = content.stat()
    return f"{content} {status.st_size} {status.st_mtime_ns}"


@dataclass(frozen=True)
class _Images(Dataset):
    """The records' images as patches."""

    records: Records
    preprocessor: Preprocessor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        record = self.records[index]
        return self.preprocessor.patches(record.media[0].load(record.where), record.where)
