r"""Pictures of formulas with their texts, as many as wanted: texts of a file or of our grammar, typeset and drawn.

Why: real pictures with labels are few and always of somebody else's field. Whoever has formulas of a field has
training data for it; and a formula whose letters are exchanged at random (`--vary`) can be used many times.

    latexocr synthesize --output-dir data/mine --formulas formulas.txt --num-images 100000 --vary 0.3
    latexocr csv2json --csv data/mine/data.csv --train-json data/train.json --val-json data/val.json

Texts are handled as programs of strangers, as in `latexocr.render`. The work is cut into chunks, one run of TeX and
one font each; every choice depends on the seed and the number of the chunk or picture alone, so the output is the
same for any number of workers.
"""

from __future__ import annotations

import contextlib
import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from latexocr.errors import InputError
from latexocr.metrics import normalize

if TYPE_CHECKING:
    from PIL import Image

    from latexocr.render import Rendering
    from latexocr.styles import Style

CHUNK_PICTURES = {"latex": 500, "mathtext": 50}  # TeX takes 0.1 s to start, mathtext 0.02 s a formula
FOLDER_PICTURES = 5_000


@dataclass(frozen=True)
class SynthesizeResult:
    """What became of every picture: `num_images == num_drawn + sum(rejected.values())`."""

    csv: Path
    rejected_csv: Path
    num_images: int
    num_drawn: int
    rejected: dict[str, int]

    def __str__(self) -> str:
        line = f"{self.csv}: {self.num_drawn} pictures"
        if not self.rejected:
            return line
        reasons = ", ".join(f"{number} {reason}" for reason, number in list(self.rejected.items())[:5])
        return f"{line}; {self.rejected_csv}: {sum(self.rejected.values())} formulas not drawn ({reasons})"


class _Chunk(NamedTuple):
    """The part of the work that one worker does at a time; the options are the same for every chunk."""

    number: int
    pictures: range
    texts: list[str] | None
    options: _Options


class _Options(NamedTuple):
    output_dir: Path
    vary: float
    style: str
    engine: Literal["latex", "mathtext"]
    augment: bool
    label: Literal["canonical", "as_is"]
    max_tokens: int
    seed: int


def synthesize(
    *,
    output_dir: Path,
    formulas: Path | None = None,
    num_images: int | None = None,
    vary: float = 0.0,
    style: Literal["im2latex", "print", "scan", "pencil", "chalk"] = "print",
    engine: Literal["latex", "mathtext"] | None = None,
    augment: bool = True,
    label: Literal["canonical", "as_is"] = "canonical",
    max_tokens: int = 150,
    num_workers: int | None = None,
    seed: int = 0,
) -> SynthesizeResult:
    """Pictures of formulas -> images/, data.csv (image_path,text) and rejected.csv.

    Args:
        output_dir: Folder to write.
        formulas: Texts to typeset: one a line (.txt), or the text column of .csv, .tsv, .jsonl or .parquet, or
            the answers of a train.json; without it, our grammar writes them.
        num_images: Number of pictures; more than there are texts takes each several times. Without it, one for
            each text, or 1000 of the grammar.
        vary: Probability that a letter, digit or symbol is exchanged for another of its kind, in text and picture.
        style: What the pictures look like.
        engine: Program that typesets; without it, latex where it is installed. mathtext knows less LaTeX.
        augment: Damage the pictures as the style says (blur, noise, ...).
        label: canonical is the text's tokens in the spelling of normalize(text, level=1), joined by blanks.
        max_tokens: Most tokens of a label; longer formulas are rejected.
        num_workers: Processes; without it, one a core.
        seed: Another seed gives other choices.

    Raises:
        InputError: the folder holds a data.csv already, a file cannot be read, TeX does not run.
    """
    from latexocr.styles import style_named

    _check(output_dir, vary, num_images=num_images, max_tokens=max_tokens, num_workers=num_workers)
    style_named(style)
    options = _Options(output_dir.absolute(), vary, style, _engine(engine), augment, label, max_tokens, seed)
    texts = read_formulas(formulas) if formulas else None
    num_images = num_images or (len(texts) if texts else 1000)
    output_dir.mkdir(parents=True, exist_ok=True)
    rejected = _draw_all(
        _chunks(texts, num_images, options), output_dir, num_images, num_workers or os.cpu_count() or 1
    )
    return SynthesizeResult(
        csv=output_dir / "data.csv",
        rejected_csv=output_dir / "rejected.csv",
        num_images=num_images,
        num_drawn=num_images - rejected.total(),
        rejected=dict(rejected.most_common()),
    )


def _draw_all(chunks: Iterator[_Chunk], output_dir: Path, num_images: int, num_workers: int) -> Counter[str]:
    """Write pictures and both tables; returns how many formulas were rejected for each kind of reason."""
    from tqdm.auto import tqdm

    from latexocr.workers import ordered_map

    rejected: Counter[str] = Counter()
    with (
        _table(output_dir / "data.csv", "image_path", "text") as data,
        _table(output_dir / "rejected.csv", "text", "reason") as refused,
        tqdm(total=num_images, unit="picture", desc="synthesize") as bar,
    ):
        for drawn, failed in ordered_map(draw_chunk, chunks, num_workers=num_workers):
            data.writerows(drawn)
            refused.writerows(failed)
            rejected.update(_kind(reason) for _, reason in failed)
            bar.update(len(drawn) + len(failed))
    return rejected


@contextlib.contextmanager
def _table(path: Path, *columns: str) -> Iterator:
    """A CSV file that has its name when it is complete. Every field is quoted: csv leaves a lone \\r bare."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(columns)
        yield writer
    partial.replace(path)


def _check(output_dir: Path, vary: float, **counts: int | None) -> None:
    if (output_dir / "data.csv").exists():
        raise InputError(f"{output_dir} holds a data.csv already; choose another --output-dir or remove it")
    for name, number in counts.items():
        if number is not None and number < 1:
            raise InputError(f"{name} {number} is less than 1")
    if not 0 <= vary <= 1:
        raise InputError(f"vary {vary} is no probability; give 0 to 1")


def _engine(engine: str | None) -> str:
    from latexocr.render import can_typeset

    return engine or ("latex" if can_typeset() else "mathtext")


def _kind(reason: str) -> str:
    """Reasons are counted without what differs from formula to formula."""
    return reason.split(":")[0].split("\\")[0].strip()


# --- texts --------------------------------------------------------------------------------------------------------


def read_formulas(file: Path) -> list[str]:
    """The texts of a file in any of the formats that other stages read, or one a line.

    Raises:
        InputError: no such column, no texts, malformed.
    """
    texts = [text for text in _texts(file) if text.strip()]
    if not texts:
        raise InputError(f"{file}: no formulas")
    return texts


def _texts(file: Path) -> Iterator[str]:
    from latexocr.sources import csv_records, jsonl_records

    if file.suffix == ".json":
        from latexocr.records import read_records

        yield from (record.text for record in read_records(file))
    elif file.suffix == ".parquet":
        import pyarrow.parquet

        column = _text_column(pyarrow.parquet.read_schema(file).names, file)
        yield from pyarrow.parquet.read_table(file, columns=[column])[column].to_pylist()
    elif file.suffix in (".csv", ".tsv", ".jsonl"):
        for record in (jsonl_records if file.suffix == ".jsonl" else csv_records)(file):
            yield record[_text_column(list(record), file)]
    else:
        try:
            yield from file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 ({error.reason}); convert it to UTF-8") from error


def _text_column(names: list[str], file: Path) -> str:
    from latexocr.sources import TEXT_COLUMNS

    for name in TEXT_COLUMNS:
        if name in names:
            return name
    raise InputError(f"{file}: no text column ({', '.join(TEXT_COLUMNS)}) among its columns {', '.join(names)}")


def _chunks(texts: Sequence[str] | None, num_images: int, options: _Options) -> Iterator[_Chunk]:
    """Every text once in random order, then again in another, until there are enough; None: of the grammar."""
    size = CHUNK_PICTURES[options.engine]
    order = np.arange(0)
    for number, first in enumerate(range(0, num_images, size)):
        numbers = range(first, min(first + size, num_images))
        part: list[str] | None = None if texts is None else []
        for round_, place in (divmod(picture, len(texts)) for picture in numbers if texts):
            if place == 0:
                order = np.random.default_rng([options.seed, _ORDER, round_]).permutation(len(texts))
            part.append(texts[order[place]])
        yield _Chunk(number, numbers, part, options)


_CHUNK_SIZES = 3
_ORDER, _CHUNK, _PICTURE = range(3)  # first number of the seeds of choices


# --- one chunk ----------------------------------------------------------------------------------------------------


def draw_chunk(chunk: _Chunk) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Write a chunk's pictures; returns rows of (image path, text) and of (text, reason)."""
    from latexocr.render import render
    from latexocr.styles import FONTS, style_named

    options = chunk.options
    style = style_named(options.style)
    generators = [np.random.default_rng([options.seed, _PICTURE, number]) for number in chunk.pictures]
    texts = chunk.texts or [_of_grammar(rng, options) for rng in generators]
    texts = [_varied(text, options.vary, rng) for text, rng in zip(texts, generators, strict=True)]
    chosen = np.random.default_rng([options.seed, _CHUNK, chunk.number])
    font = chosen.choice(style.fonts)
    # Few sizes and one weight, so that most glyphs of a chunk have been drawn before: twice as fast.
    sizes, weights = chosen.choice(style.dpi, _CHUNK_SIZES), chosen.choice(style.weights, 1)
    style = replace(style, dpi=tuple(map(int, sizes)), weights=tuple(map(int, weights)))
    renderings = render(texts, engine=options.engine, preamble=FONTS[font])
    drawn, failed = [], []
    for number, text, rendering, rng in zip(chunk.pictures, texts, renderings, generators, strict=True):
        path = f"images/{number // FOLDER_PICTURES:04d}/{number:08d}.png"
        try:
            label = _label(text, options)
            _store(_drawn(rendering, style, rng, options), options.output_dir / path, style.levels)
        except InputError as error:
            failed.append((text.replace("\0", "\\x00"), str(error)))  # CSV readers stop at NUL
        else:
            drawn.append((path, label))
    return drawn, failed


def _of_grammar(rng: np.random.Generator, options: _Options) -> str:
    from latexocr.grammar import formulas

    return next(formulas(rng, max_tokens=options.max_tokens, tex=options.engine == "latex"))


def _varied(text: str, probability: float, rng: np.random.Generator) -> str:
    from latexocr.vary import vary

    return vary(text, probability, rng) if probability else text


def _label(text: str, options: _Options) -> str:
    canonical = normalize(text, level=1)
    num_tokens = len(canonical.split())
    if not num_tokens:
        raise InputError("empty label")
    if num_tokens > options.max_tokens:
        raise InputError(f"more than {options.max_tokens} tokens: {num_tokens}")
    return canonical if options.label == "canonical" else text


def _drawn(rendering: Rendering, style: Style, rng: np.random.Generator, options: _Options) -> Image.Image:
    from latexocr.augment import augment
    from latexocr.pictures import check_size
    from latexocr.rasterize import picture

    if rendering.error:
        raise InputError(rendering.error)
    image = picture(rendering, style, rng)
    if options.augment:
        image = augment(image, options.style, rng)
    problem = check_size(*image.size)
    if problem:
        raise InputError(problem)
    return image


def _store(image: Image.Image, path: Path, levels: int) -> None:
    """A PNG of so many levels of grey; 16 take four bits a pixel, 4 take two."""
    from PIL import Image

    options = {}
    if levels < 256:
        step = 255 / (levels - 1)
        image = image.point([round(level / step) for level in range(256)])
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([round(index * step) for index in range(levels) for _ in "RGB"])
        options["bits"] = (levels - 1).bit_length()
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG", compress_level=3, **options)
