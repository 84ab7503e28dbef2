"""What the model will see, before a GPU hour is spent on it: ids decoded, labels marked, the picture saved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import Image

SHAPES_THE_INPUT = (
    "prompt", "image_mode", "image_height", "image_width", "min_visual_tokens", "max_visual_tokens",
    "supervised_turns", "empty_thinking", "allow_urls", "allow_outside_paths", "trust_remote_code",
)  # fmt: skip


def preview(
    data: Path,
    model: str,
    *,
    n: int = 5,
    output_dir: Path = Path("preview"),
    config: Path | None = None,
    hub: Literal["modelscope", "huggingface"] = "modelscope",
) -> str:
    """Print the first records as the model gets them and save each picture as the model sees it.

    Args:
        data: train.json or val.json.
        model: base model: a folder or a hub id.
        n: number of records.
        output_dir: folder for the pictures, made back from the patches.
        config: training YAML with the prompt and image options to use (default: the recipe's).
        hub: where a hub id is downloaded from.

    Raises:
        InputError: data, model or configuration that cannot be used.
    """
    from latexocr.config import read_yaml
    from latexocr.formats import Access
    from latexocr.preprocess import decode_sample
    from latexocr.records import read_records
    from latexocr.train import TrainConfig, load_preprocessor

    given = read_yaml(config) if config else {}
    values = {name: value for name, value in given.items() if name in SHAPES_THE_INPUT}
    options = TrainConfig.from_dict({**values, "use_cpu": True, "model_name_or_path": model, "hub": hub})
    _, preprocessor = load_preprocessor(options)
    access = Access(urls=options.allow_urls, outside=options.allow_outside_paths)
    records = read_records(data, access=access, hub=hub)[:n]
    output_dir.mkdir(parents=True, exist_ok=True)
    blocks = []
    for record in records:
        sample, counts = preprocessor(record), preprocessor.count_tokens(record)
        pictures = []
        for number, picture in enumerate(_pictures(sample, preprocessor.processor.image_processor)):
            name = re.sub(r"[^\w.-]", "_", record.id) + (f"_{number + 1}" if number else "")
            picture.save(output_dir / f"{name}.png")
            pictures.append(f", picture {picture.width}x{picture.height} -> {output_dir / name}.png")
        blocks.append(
            f"{record.where}: {counts.total} tokens (prompt {counts.prompt}, image {counts.image}, "
            f"answer {counts.answer}){''.join(pictures)}\n{decode_sample(sample, preprocessor)}\n"
        )
    return "\n".join(blocks)


def _pictures(sample: dict[str, Any], image_processor: Any) -> Iterator[Image.Image]:
    """What a sample shows, the first frame of each patch in time."""
    from latexocr.images import unpatchify

    at = 0
    for grid in sample.get("image_grid_thw", ()):
        frames, height, width = grid.tolist()
        for _ in range(frames):
            patches = sample["pixel_values"][at : at + height * width]
            yield unpatchify(patches, grid, image_processor)
            at += height * width
