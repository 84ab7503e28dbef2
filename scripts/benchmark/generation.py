"""Validation by generation: images/s of this library against the tutorial's one-by-one `predict`, LoRA unmerged.

    python scripts/benchmark/generation.py --data outputs/data/train.json

Every answer has the same number of tokens: the end token is replaced by one that a random model does not write.
Reading and preparing pictures is included everywhere. "validation" is `trainer.evaluate` as training calls it: loss
over all rows, generation, metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import common

NEVER_WRITTEN = "<|vision_pad|>"


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--images-one-by-one", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256])
    arguments = parser.parse_args()
    with common.workplace(arguments) as (model_folder, folder):
        found = measure(arguments, model_folder, folder)
    baseline = found[0]["images_per_second"]
    for row in found:
        row["over_one_by_one"] = round(row["images_per_second"] / baseline, 1)
    common.report(arguments, found, tokens=arguments.tokens)


def measure(arguments: Any, model_folder: Path, folder: Path) -> list[dict]:
    import numpy as np
    import torch

    from latexocr.console import Console
    from latexocr.predict import LatexOCR
    from latexocr.stopping import StopSignal
    from latexocr.train import TrainConfig, build_trainer, load_data, load_model

    config = TrainConfig(
        model_name_or_path=str(model_folder), train_json=str(arguments.data), val_json=str(arguments.data),
        output_dir=str(folder / "run"), image_mode="fixed", max_new_tokens=arguments.tokens, disable_tqdm=True,
        eval_generate_samples=arguments.images, per_device_eval_batch_size=64, save_strategy="no", report_to=[],
    )  # fmt: skip
    data = load_data(config)
    chosen = np.arange(arguments.images) % len(data.training.records)  # from the start again if there are few
    rows = data.training.records.take(chosen)
    images = [rows[number].image_path for number in range(len(rows))]
    data = replace(data, validation=replace(data.validation, records=rows))
    model, contract = load_model(config, data)
    model.to(config.device).eval()
    endless = replace(data.preprocessor, family=replace(data.preprocessor.family, end_token=NEVER_WRITTEN))
    reader = LatexOCR(model, endless, contract)

    def timed(name: str, num_images: int, read: Callable[[], Any]) -> dict:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        lengths = read()
        seconds = time.perf_counter() - begun
        assert lengths is None or set(lengths) == {arguments.tokens}, "an answer ended early"
        row = {"reader": name, "images": num_images, "seconds": round(seconds, 2),
               "images_per_second": round(num_images / seconds, 3)}  # fmt: skip
        if torch.cuda.is_available():
            row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return row

    def ours(batch_size: int) -> Callable[[], list[int]]:
        options = {"batch_size": batch_size, "max_new_tokens": arguments.tokens}
        return lambda: [answer.num_tokens for answer in reader.generate(images, **options)]

    few = images[: arguments.images_one_by_one]
    stock = Stock(model, endless, arguments.tokens)
    stock(few[:1])
    found = [timed("one by one", len(few), lambda: [stock([image])[0] for image in few])]
    batches = [images[at : at + 64] for at in range(0, len(images), 64)]
    found.append(timed("stock batches of 64", len(images), lambda: [n for batch in batches for n in stock(batch)]))
    for batch_size in arguments.batch_sizes:
        for time_of in ("first", "again"):
            found.append(timed(f"ours, batches of {batch_size}, {time_of}", len(images), ours(batch_size)))
    trainer = build_trainer(config, data, model, contract, stop=StopSignal(), on_board=lambda *_: None)
    trainer.remove_callback(Console)  # it prints
    found.append(timed("ours, validation", len(images), lambda: trainer.evaluate() and None))
    return found


class Stock:
    """The tutorial's `predict`: the processor, then `model.generate`; also for several images at once."""

    def __init__(self, model: Any, preprocessor: Any, num_tokens: int) -> None:
        from latexocr.modeling import greedy_config

        self.model, self.processor, self.prompt = model, preprocessor.processor, preprocessor.prompt
        self.config = greedy_config(self.processor, preprocessor.family)
        self.config.max_new_tokens = num_tokens

    def __call__(self, images: list[Path]) -> list[int]:
        """Lengths of the answers."""
        import torch
        from PIL import Image

        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.prompt}]}]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pictures = [Image.open(image).convert("RGB").resize((504, 112)) for image in images]
        inputs = self.processor(text=[text] * len(pictures), images=pictures, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with torch.no_grad():
            output = self.model.generate(**inputs, generation_config=self.config)
        answers = output[:, inputs["input_ids"].shape[1] :]
        self.processor.batch_decode(answers, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [len(answer) for answer in answers]


if __name__ == "__main__":
    main()
