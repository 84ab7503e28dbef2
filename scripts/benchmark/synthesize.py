"""Pictures a second of `latexocr synthesize`, the cost of augmentation, and how close `im2latex` comes; prints JSON.

    python scripts/benchmark/synthesize.py --formulas formulas.tsv.gz --originals latex_ocr/train.parquet

A style's rate is the whole command: choosing, exchanging letters, TeX, drawing, damage, PNG files and table, on
`--num-workers` processes, with the start of each. CPU time is that of all processes, TeX included; it says what an
idle machine would do when this one is busy. Closeness: mean absolute difference of grey levels (of 255) to originals
whose picture has as much ink in width and height as ours (in the others the label lacks blanks that the picture has),
for the best of 16 places of the page, beside plain antialiased drawing at 100 dots an inch.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

import common
import numpy as np

PLACES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--formulas", type=Path, help="text file, .gz or not, the formula last in a line; or grammar")
    parser.add_argument("--originals", type=Path, help="parquet file of LaTeX_OCR images")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--num-originals", type=int, default=200)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--engine", choices=["latex", "mathtext"])
    parser.add_argument("--output", type=Path, help="file for the JSON, which is printed in any case")
    arguments = parser.parse_args()
    from latexocr.styles import STYLES

    found: dict[str, object] = {"augment_ms": {style: _augment_ms(style) for style in STYLES}}
    with tempfile.TemporaryDirectory() as folder:
        texts = None
        if arguments.formulas:
            texts = Path(folder, "formulas.txt")
            texts.write_text("\n".join(common.read_formulas(arguments.formulas)), encoding="utf-8")
        found["synthesize"] = {
            style: _rate(Path(folder, style), style, texts, arguments) for style in ("im2latex", "print", "scan")
        }
    if arguments.originals:
        found["im2latex_difference"] = _closeness(arguments.originals, arguments.num_originals)
    common.report(arguments, found)


def _rate(folder: Path, style: str, texts: Path | None, arguments: argparse.Namespace) -> dict[str, float]:
    from latexocr.synthesize import synthesize

    started, before = time.perf_counter(), os.times()
    result = synthesize(
        output_dir=folder,
        formulas=texts,
        num_images=arguments.images,
        vary=0.3,
        style=style,
        engine=arguments.engine,
        num_workers=arguments.num_workers,
    )
    seconds, after = time.perf_counter() - started, os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    size = sum(path.stat().st_size for path in folder.rglob("*.png"))
    return {
        "images_per_second": round(result.num_images / seconds, 1),
        "cpu_ms_an_image": round(1000 * cpu / result.num_images, 2),
        "bytes_an_image": round(size / result.num_drawn),
        "rejected": result.num_images - result.num_drawn,
    }


def _augment_ms(style: str, num_calls: int = 300) -> float:
    """The best of five, for a picture of 240 x 40 pixels."""
    from PIL import Image

    from latexocr.augment import augment

    rng = np.random.default_rng(0)
    image = Image.new("L", (240, 40), 255)
    image.paste(0, (10, 10, 230, 24))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(num_calls):
            augment(image, style, rng)
        times.append((time.perf_counter() - started) / num_calls * 1000)
    return round(min(times), 3)


def _closeness(file: Path, number: int) -> dict[str, float]:
    import pyarrow.parquet
    from PIL import Image

    from latexocr.rasterize import picture
    from latexocr.render import render
    from latexocr.styles import STYLES, Style

    rows = pyarrow.parquet.read_table(file).slice(0, 4 * number).to_pylist()
    im2latex = STYLES["im2latex"]
    plain = Style(sizes=im2latex.sizes)
    ours: list[float] = []
    naive: list[float] = []
    for row, one in zip(rows, render([row["text"] for row in rows]), strict=True):
        if one.error or len(ours) == number:
            continue
        original = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("L")).astype(float)
        places = [picture(one, im2latex, np.random.default_rng(place)) for place in range(PLACES)]
        greys = [np.round(np.asarray(image) / 85) * 85 for image in places if image.size == original.shape[::-1]]
        if not greys or np.abs(_ink_size(greys[0]) - _ink_size(original)).max() > 1:
            continue
        ours.append(min(float(np.abs(grey - original).mean()) for grey in greys))
        drawn = np.full(original.shape, 255.0)
        flat = np.asarray(picture(one, plain, np.random.default_rng(0)))[: drawn.shape[0], : drawn.shape[1]]
        drawn[: flat.shape[0], : flat.shape[1]] = flat
        naive.append(float(np.abs(drawn - original).mean()))
    return {
        "originals": len(ours),
        "ours_mean": round(statistics.mean(ours), 2),
        "ours_median": round(statistics.median(ours), 2),
        "naive_mean": round(statistics.mean(naive), 2),
        "naive_median": round(statistics.median(naive), 2),
    }


def _ink_size(grey: np.ndarray) -> np.ndarray:
    places = np.argwhere(grey < 250)
    return places.max(0) - places.min(0)


if __name__ == "__main__":
    main()
