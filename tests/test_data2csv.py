"""Stage 1 on small sources whose every row can be checked by hand; real processes, real kills, no network."""

from __future__ import annotations

import csv
import fcntl
import fnmatch
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latexocr import data2csv as stage
from latexocr import pictures, sources
from latexocr.data2csv import data2csv, to_stored
from latexocr.errors import InputError
from latexocr.pictures import PictureError
from latexocr.workers import Workers

LATEX_OCR = Path(__file__).resolve().parents[2] / "shared/data/latex_ocr"


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(number: int = 0, mode: str = "RGB") -> Image.Image:
    """White paper, 20 x 10 pixels, with one dark dot whose place depends on the number."""
    image = Image.new("RGB", (20, 10), "white")
    image.putpixel((number % 20, number // 20 % 10), (0, 0, 0))
    return image.convert(mode)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds hardly any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 10))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def write_parquet(path: Path, rows: list[tuple], **options) -> Path:
    """The LaTeX_OCR schema: image = struct{bytes, path}, text = string."""
    images = [{"bytes": image, "path": f"{number}.png"} for number, (image, _) in enumerate(rows)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(images, kind), "text": pa.array([text for _, text in rows], pa.string())}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def formulas(num_rows: int) -> list[tuple]:
    return [(encode(picture(number, "P")), f"x _ {{ {number} }}") for number in range(num_rows)]


def table(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def tree(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "latexocr", "data2csv", *map(str, arguments)]


# --- pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "suffix"),
    [
        (encode(picture(mode="RGB")), ".png"),
        (encode(picture(mode="L")), ".png"),
        (encode(picture(mode="1")), ".png"),
        (encode(picture(mode="RGB"), "JPEG"), ".jpg"),
        (encode(picture(mode="L"), "JPEG"), ".jpg"),
    ],
    ids=["RGB", "L", "1", "JPEG", "grey-JPEG"],
)
def test_fit_pictures_keep_their_bytes(data, suffix):
    assert to_stored(data) == (data, suffix)


def rgba(alpha: int) -> Image.Image:
    """A black dot on black paper of this opacity."""
    image = Image.new("RGBA", (20, 10), (0, 0, 0, alpha))
    image.putpixel((3, 4), (0, 0, 0, 255))
    return image


def sixteen_bit() -> Image.Image:
    samples = np.full((10, 20), 65535, np.uint16)
    samples[4, 3] = 0
    samples[4, 5] = 257 * 100
    return Image.fromarray(samples)


def with_palette_alpha() -> bytes:
    image = Image.new("P", (20, 10), 0)
    image.putpalette([0, 0, 0, 0, 0, 255])  # 0: black, made transparent below; 1: blue
    image.putpixel((3, 4), 1)
    return encode(image, transparency=0)


@pytest.mark.parametrize(
    ("data", "mode", "pixel", "paper"),
    [
        (encode(picture(83, "P")), "L", 0, 255),
        (encode(rgba(0)), "L", 0, 255),
        (encode(rgba(51)), "L", 0, 204),  # a fifth of black on white
        (encode(rgba(0).convert("LA")), "L", 0, 255),
        (with_palette_alpha(), "RGB", (0, 0, 255), (255, 255, 255)),
        (encode(picture(83), transparency=(255, 255, 255)), "L", 0, 255),
        (encode(picture(83), "GIF"), "L", 0, 255),
        (encode(picture(83), "BMP"), "RGB", (0, 0, 0), (255, 255, 255)),
        (encode(picture(83), "WEBP", lossless=True), "RGB", (0, 0, 0), (255, 255, 255)),
        (encode(picture(83, "CMYK"), "TIFF"), "L", 0, 255),
        (encode(sixteen_bit()), "L", 0, 255),
        (encode(sixteen_bit(), "TIFF"), "L", 0, 255),
        (encode(Image.fromarray(np.asarray(picture(83, "L"), np.float32) / 255), "TIFF"), "L", 0, 255),
    ],
    ids=[
        "P",
        "RGBA",
        "half-RGBA",
        "LA",
        "P-alpha",
        "tRNS",
        "GIF",
        "BMP",
        "WEBP",
        "CMYK",
        "16-bit-PNG",
        "16-bit-TIFF",
        "float",
    ],
)
def test_other_pictures_become_plain_png(data, mode, pixel, paper):
    stored, suffix = to_stored(data)
    image = Image.open(io.BytesIO(stored))
    assert (suffix, image.format, image.mode, image.info) == (".png", "PNG", mode, {})
    assert (image.size, image.getpixel((3, 4)), image.getpixel((0, 0))) == ((20, 10), pixel, paper)


def test_sixteen_bit_samples_are_scaled_not_clipped():
    image = Image.open(io.BytesIO(to_stored(encode(sixteen_bit()))[0]))
    assert image.getpixel((5, 4)) == 100


def test_exif_rotation_is_applied():
    image = Image.new("L", (20, 10), 255)
    image.paste(0, (0, 0, 10, 10))  # the left half is black
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned 90 degrees clockwise: left becomes top
    stored = Image.open(io.BytesIO(to_stored(encode(image, "JPEG", exif=exif, quality=100))[0]))
    assert (stored.format, stored.size) == ("PNG", (10, 20))
    assert stored.getpixel((5, 2)) < 20
    assert stored.getpixel((5, 17)) > 235


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(Image.new("RGB", (20, 10), "white")), "blank image: a single colour"),
        (encode(Image.new("RGBA", (20, 10), (9, 9, 9, 0))), "blank image: a single colour"),
        (encode(Image.new("L", (1, 1))), "absurd size: 1x1 pixels, a side needs at least 4"),
        (encode(Image.new("L", (50, 3))), "absurd size: 50x3 pixels, a side needs at least 4"),
        (encode(Image.new("L", (805, 4))), "absurd size: 805x4 pixels, one side more than 200 times the other"),
        (png_header(8001, 8000), "absurd size: 8001x8000 pixels, more than 64 megapixels"),
        (png_header(10_000, 10_000), "absurd size: 10000x10000 pixels, more than 64 megapixels"),
        (png_header(20_000, 20_000), "absurd size: 400 megapixels, more than 64"),
        (b"hello", "undecodable image: not one of the formats PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable image: not one of the formats PNG"),
        (encode(picture())[:-30], "undecodable image: "),
        (encode(picture(), "JPEG")[:-300], "undecodable image: "),
        (png_header(20, 10), "undecodable image: "),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_unusable_pictures_have_a_reason(data, reason):
    with warnings.catch_warnings(), pytest.raises(PictureError) as error:
        warnings.simplefilter("error")  # PIL's bomb warning must not come through
        to_stored(data)
    assert str(error.value).startswith(reason)


@pytest.mark.parametrize(("size", "fine"), [((4, 4), True), ((800, 4), True), ((8000, 8000), True), ((3, 9), False)])
def test_size_limits(size, fine):
    assert (pictures.check_size(*size) is None) == fine


# --- every row ends in one of two tables -------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2])
def test_rows_end_in_one_of_two_tables(tmp_path, num_workers):
    good, white = encode(picture()), encode(Image.new("L", (20, 10), 255))
    rows = [(good, "a"), (good, " \n"), (good, None), (white, "b"), (b"", "c"), (None, "d"), (good[:60], "e")]
    rows += [(encode(Image.new("L", (1, 1))), "f"), (png_header(20_000, 20_000), "g"), (good, "nul \0")]
    source = write_parquet(tmp_path / "x.parquet", rows)
    result = data2csv(str(source), tmp_path / "out", num_workers=num_workers)
    assert table(result.csv) == [{"image_path": "images/0000/00000000.png", "text": "a"}]
    assert [tuple(row.values())[:3] for row in table(result.rejected_csv)] == [
        ("1", "1.png", " \n"),
        ("2", "2.png", ""),
        ("3", "3.png", "b"),
        ("4", "4.png", "c"),
        ("5", "5.png", "d"),
        ("6", "6.png", "e"),
        ("7", "7.png", "f"),
        ("8", "8.png", "g"),
        ("9", "9.png", "nul \\x00"),
    ]
    assert [row["reason"].partition(":")[0] for row in table(result.rejected_csv)] == [
        "blank text",
        "blank text",
        "blank image",
        "undecodable image",
        "missing image",
        "undecodable image",
        "absurd size",
        "absurd size",
        "unusable text",
    ]
    assert str(result) == (
        f"{tmp_path}/out/data.csv: 1 of 10 rows kept, 9 rejected (absurd size 2, blank image 1, blank text 2, "
        f"missing image 1, undecodable image 2, unusable text 1; see {tmp_path}/out/rejected.csv)"
    )
    assert sorted(tree(tmp_path / "out")) == [
        ".data2csv.json",
        "data.csv",
        "images/0000/00000000.png",
        "rejected.csv",
    ]


HARD_TEXTS = ["nan", "null", "NA", "", "#N/A", 'a "b"', "a, b", "\\frac{a}{b} \\\\", "a\nb", "a\r\nb", "a\rb"]
HARD_TEXTS += ["设 x > 0", " x ", '"', "007", "1.50", "=1+1", "a\u2028b", "😀", "'"]


def test_hard_texts_survive_in_data_csv(tmp_path):
    source = write_parquet(tmp_path / "x.parquet", [(encode(picture()), text) for text in HARD_TEXTS])
    result = data2csv(str(source), tmp_path / "out", num_workers=1)
    assert [row["text"] for row in table(result.csv)] == [text for text in HARD_TEXTS if text]
    assert result.rejected == {"blank text": 1}


def test_pictures_go_into_folders_of_ten_thousand(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "FOLDER_ROWS", 2)
    source = write_parquet(tmp_path / "x.parquet", formulas(5))
    result = data2csv(str(source), tmp_path / "out", num_workers=1)
    assert [row["image_path"][7:] for row in table(result.csv)] == [
        "0000/00000000.png",
        "0000/00000001.png",
        "0001/00000002.png",
        "0001/00000003.png",
        "0002/00000004.png",
    ]


def test_max_samples_reads_the_first_rows(tmp_path):
    source = write_parquet(tmp_path / "x.parquet", formulas(300))
    result = data2csv(str(source), tmp_path / "out", max_samples=130, num_workers=2)
    assert [row["text"] for row in table(result.csv)] == [f"x _ {{ {number} }}" for number in range(130)]


def test_large_pictures_make_short_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "CHUNK_BYTES", 250)
    rows = [sources.Row(bytes(100), "", "x")] * 7
    source = sources.Source(7, [], lambda: iter(rows))
    assert [(c.index, c.first_row, len(c.rows)) for c in stage._chunks(source, 7)] == [
        (0, 0, 3),
        (1, 3, 3),
        (2, 6, 1),
    ]


# --- interruptions -----------------------------------------------------------------------------------------


def die_at_file_operation(number: int, run) -> bool:
    """Run in a forked process that kills itself with SIGKILL before its so-manieth file operation."""
    pid = os.fork()
    if pid == 0:
        left = [number]

        def hook(event: str, arguments: tuple) -> None:
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa")
            if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("earlier", [None, 3])
def test_killed_before_any_file_operation_it_continues_to_the_same_files(tmp_path, monkeypatch, earlier):
    """`earlier`: the folder first holds a finished run of other options, whose files have to go."""
    monkeypatch.setattr(stage, "CHUNK_ROWS", 2)
    rows = [*formulas(4), (b"", "broken")]
    source = str(write_parquet(tmp_path / "x.parquet", rows))
    out = tmp_path / "out"
    data2csv(source, out, num_workers=1)
    expected = tree(out)
    num_kills = 0
    while True:
        shutil.rmtree(out)
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        if earlier:
            data2csv(source, out, max_samples=earlier, num_workers=1)
        killed = die_at_file_operation(num_kills, lambda: data2csv(source, out, num_workers=1))
        data2csv(source, out, num_workers=1)
        assert tree(out) == {**expected, "notes.txt": b"mine"}, f"killed before file operation {num_kills}"
        if not killed:
            break
        num_kills += 1
    assert num_kills >= 24  # 4 pictures, 3 parts, 2 tables, 2 states, each written and renamed, and more


@pytest.mark.slow
def test_killed_with_workers_it_continues_to_the_same_files(tmp_path):
    source = write_parquet(tmp_path / "x.parquet", [(encode(picture(n, "P")), f"{n}") for n in range(3000)])
    data2csv(str(source), tmp_path / "whole", num_workers=2)
    expected = tree(tmp_path / "whole")
    for num_parts in (0, 1, 5, 12, 20):
        out = tmp_path / f"killed{num_parts}"
        run = command("--source", source, "--output-dir", out, "--num-workers", 2)
        process = subprocess.Popen(run, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list((out / stage.PARTS).glob("*.json"))) < num_parts:
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (out / "data.csv").exists()
        subprocess.run(run, check=True, stderr=subprocess.DEVNULL, timeout=60)
        assert tree(out) == expected


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_workers_go_with_a_killed_parent(tmp_path):
    source = write_parquet(tmp_path / "x.parquet", [(encode(picture(n, "P")), f"{n}") for n in range(3000)])
    for how, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        out = tmp_path / str(status)
        run = command("--source", source, "--output-dir", out, "--num-workers", 2)
        # a shell starts background jobs with Ctrl-C ignored, which children inherit
        listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, preexec_fn=listening)
        while not list((out / stage.PARTS).glob("*.json")):
            time.sleep(0.001)
        process.send_signal(how)
        errors = process.stderr.read()  # ends when the last worker has closed its stderr
        assert process.wait() == status
        assert "Traceback" not in errors
        folder = os.open(out, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it any more
        os.close(folder)


def test_finished_it_does_nothing(tmp_path):
    source = str(write_parquet(tmp_path / "x.parquet", formulas(3)))
    first = data2csv(source, tmp_path / "out", num_workers=1)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    assert data2csv(source, tmp_path / "out", num_workers=2) == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before


def test_finished_folder_can_be_moved(tmp_path):
    source = str(write_parquet(tmp_path / "x.parquet", formulas(3)))
    data2csv(source, tmp_path / "out", num_workers=1)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert data2csv(source, tmp_path / "moved", num_workers=1).num_kept == 3


def test_changed_source_starts_over_and_leaves_foreign_files(tmp_path):
    source = write_parquet(tmp_path / "x.parquet", formulas(5))
    out = tmp_path / "out"
    data2csv(str(source), out, num_workers=1)
    (out / "images/mine.png").write_bytes(b"mine")
    (out / "train.json").write_text("[]")
    write_parquet(source, formulas(2))
    assert data2csv(str(source), out, num_workers=1).num_kept == 2
    assert sorted(tree(out)) == [
        ".data2csv.json",
        "data.csv",
        "images/0000/00000000.png",
        "images/0000/00000001.png",
        "images/mine.png",
        "rejected.csv",
        "train.json",
    ]


@pytest.mark.parametrize("lost", ["images/0000/00000001.png", "data.csv", "rejected.csv"])
def test_lost_file_is_made_again(tmp_path, lost):
    source = str(write_parquet(tmp_path / "x.parquet", formulas(3)))
    data2csv(source, tmp_path / "out", num_workers=1)
    expected = tree(tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    data2csv(source, tmp_path / "out", num_workers=1)
    assert tree(tmp_path / "out") == expected


def test_edited_table_is_not_replaced(tmp_path):
    source = str(write_parquet(tmp_path / "x.parquet", formulas(3)))
    result = data2csv(source, tmp_path / "out", num_workers=1)
    result.csv.write_text("image_path,text\nimages/0000/00000000.png,corrected\n")
    data2csv(source, tmp_path / "out", num_workers=1)  # same options: finished, stays
    with pytest.raises(InputError, match=r"data\.csv: edited since .* move it away"):
        data2csv(source, tmp_path / "out", max_samples=1, num_workers=1)
    assert "corrected" in result.csv.read_text()


# --- sources -----------------------------------------------------------------------------------------------


def texts_of(result: stage.Data2CsvResult) -> list[str]:
    return [row["text"] for row in table(result.csv)]


def test_glob_reads_files_in_order(tmp_path):
    for number in range(3):
        write_parquet(tmp_path / f"in/part-{number}.parquet", [(encode(picture()), f"{number}")])
    assert texts_of(data2csv(f"{tmp_path}/in/part-*.parquet", tmp_path / "out", num_workers=1)) == ["0", "1", "2"]


def test_folder_of_parquet_keeps_splits_apart(tmp_path):
    write_parquet(tmp_path / "in/train.parquet", [(encode(picture()), "train")])
    write_parquet(tmp_path / "in/val.parquet", [(encode(picture()), "val")])
    for split, text in (("train", "train"), ("val", "val"), ("validation", "val")):
        assert texts_of(data2csv(str(tmp_path / "in"), tmp_path / split, split=split, num_workers=1)) == [text]
    with pytest.raises(InputError, match="no split 'test'; it has train, validation"):
        data2csv(str(tmp_path / "in"), tmp_path / "out", split="test")


@pytest.mark.parametrize("image_type", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary())])])
def test_other_image_columns(tmp_path, image_type):
    data = encode(picture())
    values = [{"bytes": data}] if pa.types.is_struct(image_type) else [data]
    pq.write_table(pa.table({"image": pa.array(values, image_type), "latex": ["x"]}), tmp_path / "x.parquet")
    assert data2csv(str(tmp_path / "x.parquet"), tmp_path / "out", num_workers=1).num_kept == 1


def test_parquet_of_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(picture()))
    images = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    pq.write_table(pa.table({"image": images, "text": ["x", "y"]}), tmp_path / "x.parquet")
    result = data2csv(str(tmp_path / "x.parquet"), tmp_path / "out", num_workers=1)
    assert (texts_of(result), result.rejected) == (["x"], {"missing image": 1})


LABELS = {
    "labels.csv": 'image_path,text\na.png,"x, ""y"""\nb.png,nan\nmissing.png,z\n',
    "labels.tsv": 'file_name\tlatex\na.png\tx, "y"\nb.png\tnan\nmissing.png\tz\n',
    "anything.jsonl": '{"image": "a.png", "label": "x, \\"y\\""}\n\n{"image": "b.png", "label": "nan"}\n'
    '{"image": "missing.png", "label": "z"}\n',
    "metadata.jsonl": '{"file_name": "a.png", "text": "x, \\"y\\""}\n{"file_name": "b.png", "text": "nan"}\n'
    '{"file_name": "missing.png", "text": "z"}\n',
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("given", ["folder", "file", "split folder"])
def test_images_with_labels(tmp_path, name, given):
    folder = tmp_path / "in" / ("train" if given == "split folder" else "")
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(encode(picture()))
    (folder / "b.png").write_bytes(encode(picture(1, "RGBA")))
    (folder / name).write_text(LABELS[name])
    source = folder / name if given == "file" else tmp_path / "in"
    result = data2csv(str(source), tmp_path / "out", num_workers=1)
    assert texts_of(result) == ['x, "y"', "nan"]
    (rejected,) = table(result.rejected_csv)
    assert rejected["image_path"] == "missing.png"
    assert rejected["reason"] == f"missing image: no such file: {folder / 'missing.png'}"
    assert result.rejected == {"missing image": 1}


def test_changed_image_of_a_labels_file_starts_over(tmp_path):
    (tmp_path / "labels.csv").write_text("image_path,text\na.png,x\n")
    for _ in range(2):  # also when there is nothing left to do
        with pytest.raises(
            InputError, match=r"data\.csv: 0 of 1 rows kept, .* \(missing image 1; see .*nothing is left"
        ):
            data2csv(str(tmp_path / "labels.csv"), tmp_path / "out", num_workers=1)
    (tmp_path / "a.png").write_bytes(encode(picture()))
    assert data2csv(str(tmp_path / "labels.csv"), tmp_path / "out", num_workers=1).num_kept == 1


def test_jsonl_numbers_keep_their_spelling(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(picture()))
    lines = [f'{{"image": "a.png", "text": {value}}}' for value in ("1.50", "7", "NaN", "true", "null")]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    result = data2csv(str(tmp_path / "labels.jsonl"), tmp_path / "out", num_workers=1)
    assert texts_of(result) == ["1.50", "7", "NaN"]
    assert [row["reason"] for row in table(result.rejected_csv)] == [
        "unusable text: bool instead of a string",
        "blank text",
    ]


# --- hubs: only the download itself is replaced ------------------------------------------------------------

CARD = """---
license: apache-2.0
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
- config_name: small
  data_files:
  - split: train
    path: small/train-*
  - split: validation
    path: [small/validation-*]
---
# A data set
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub data set in a folder; asking for it copies what the patterns allow, as both hubs' clients do."""
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    names = ("data/train-0", "data/train-1", "small/train-0", "small/validation-0")
    for name in names:
        write_parquet(remote / f"{name}.parquet", [(encode(picture()), name)])
    (remote / "README.md").write_text(CARD)

    def snapshot(source: str, hub: str, allow_patterns: list[str] | None) -> Path:
        assert (source, hub) == ("owner/name", "modelscope")
        for file in sorted(remote.rglob("*")):
            name = file.relative_to(remote).as_posix()
            wanted = allow_patterns is None or any(fnmatch.fnmatch(name, p) for p in allow_patterns)
            if file.is_file() and wanted:
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, cache / name)
        return cache

    monkeypatch.setattr(sources, "_snapshot", snapshot)
    return remote


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["data/train-0", "data/train-1"]),
        ({"subset": "small"}, ["small/train-0"]),
        ({"subset": "small", "split": "val"}, ["small/validation-0"]),
    ],
)
def test_hub_delivers_one_subset_and_split(tmp_path, hub, options, expected):
    result = data2csv("owner/name", tmp_path / "out", num_workers=1, **options)
    assert texts_of(result) == expected
    downloaded = [file.relative_to(tmp_path / "cache") for file in (tmp_path / "cache").rglob("*.parquet")]
    assert sorted(str(file.with_suffix("")) for file in downloaded) == expected


def test_hub_without_card_uses_folders_as_subsets(tmp_path, hub):
    (hub / "README.md").unlink()
    assert texts_of(data2csv("owner/name", tmp_path / "o1", subset="small", num_workers=1)) == ["small/train-0"]
    with pytest.raises(InputError, match="no subset 'smal'; did you mean 'small'"):
        data2csv("owner/name", tmp_path / "o2", subset="smal", num_workers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset": "smal"}, "no subset 'smal'; did you mean 'small'.; give --subset, one of default, small"),
        ({"split": "test"}, "subset 'default': no split 'test'; it has train"),
    ],
)
def test_hub_subset_or_split_that_is_not_there(tmp_path, hub, options, message):
    with pytest.raises(InputError, match=message):
        data2csv("owner/name", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_unreachable_hub_says_what_to_do_and_leaves_finished_work(tmp_path, hub, monkeypatch):
    first = data2csv("owner/name", tmp_path / "out", num_workers=1)

    def unreachable(*_):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(sources, "_snapshot", unreachable)
    assert data2csv("owner/name", tmp_path / "out", num_workers=1) == first
    with pytest.raises(InputError, match=r"modelscope could not deliver it .*give a local parquet file"):
        data2csv("owner/name", tmp_path / "other")
    assert not (tmp_path / "other").exists()


# --- bad input: one line, nothing written ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.parquet", None, "nothing.parquet: no such file or folder; give a parquet file"),
        ("none-*.parquet", None, "no file matches this pattern"),
        ("x.parquet", b"not parquet", "x.parquet: not a readable parquet file"),
        ("x.txt", b"?", r"needed are .parquet files or one labels file \(.csv, .tsv, .jsonl\), found x.txt"),
        ("x.csv", b"", "x.csv: empty file; needed is a header line"),
        ("x.csv", b"image_path,text\n", "x.csv: no rows"),
        ("x.csv", b"picture,text\na,b\n", r"no image column \(image, .*\) among its columns picture, text"),
        ("x.csv", b"image_path,tex\na,b\n", r"no text column \(text, .*\) among its columns image_path, tex"),
        ("x.csv", b"image_path,text\na,b\nc,d,e\n", "x.csv, line 3: 3 fields, header has 2; put texts"),
        ("x.csv", b'image_path,text\na,"b\n', "x.csv, line 2: malformed"),
        ("x.csv", "image_path,text\na,设\n".encode("gbk"), "x.csv: not UTF-8"),
        ("x.jsonl", b'{"image": "a", "text": "b"}\n{"image"\n', "x.jsonl, line 2: malformed JSON"),
        ("x.jsonl", b"[1]\n", "x.jsonl, line 1: needed is an object"),
        ("x.jsonl", b'{"file": "a", "text": "b"}\n', "no image column"),
    ],
)
def test_bad_source_is_one_line_and_leaves_nothing(tmp_path, name, content, message):
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(InputError, match=message):
        data2csv(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [b"x"], "caption": ["y"]}, "no text column .* among its columns image, caption"),
        ({"img": [b"x"], "text": ["y"]}, "no image column .* among its columns img, text"),
        ({"image": [1], "text": ["y"]}, "column 'image' holds int64; needed are encoded images"),
        ({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}, "no rows"),
    ],
)
def test_bad_parquet_columns(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=message):
        data2csv(str(tmp_path / "x.parquet"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_without_or_with_several_labels(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match=r"in: neither parquet files nor a labels file; needed is metadata\.jsonl"):
        data2csv(str(tmp_path / "in"), tmp_path / "out")
    for name in ("a.csv", "b.csv"):
        (tmp_path / "in" / name).write_text("image_path,text\nx,y\n")
    with pytest.raises(InputError, match=r"several labels files \(a\.csv, b\.csv\); give one as --source"):
        data2csv(str(tmp_path / "in"), tmp_path / "out")


def test_damaged_parquet_pages(tmp_path):
    source = write_parquet(tmp_path / "x.parquet", formulas(200))
    data = bytearray(source.read_bytes())
    data[200:2000] = bytes(1800)
    source.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.parquet: damaged parquet file"):
        data2csv(str(source), tmp_path / "out", num_workers=1)
    assert not (tmp_path / "out/data.csv").exists()


@pytest.mark.parametrize("option", ["max_samples", "num_workers"])
def test_numbers_below_one(tmp_path, option):
    with pytest.raises(InputError, match="needed is a number of at least 1"):
        data2csv(str(tmp_path), tmp_path / "out", **{option: 0})


def test_output_folder_that_cannot_be_written(tmp_path):
    source = write_parquet(tmp_path / "x.parquet", formulas(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/out: cannot be written \(Not a directory\).*--output-dir"):
        data2csv(str(source), tmp_path / "file/out", num_workers=1)
    with pytest.raises(InputError, match="file: cannot be written"):
        data2csv(str(source), tmp_path / "file", num_workers=1)


@pytest.mark.parametrize("name", ["data.csv", "images", "rejected.csv"])
def test_output_folder_with_files_of_others_is_refused(tmp_path, name):
    source = write_parquet(tmp_path / "x.parquet", formulas(1))
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir()
    foreign.mkdir() if name == "images" else foreign.write_text("mine")
    with pytest.raises(InputError, match=f"holds {name} that data2csv did not make; move"):
        data2csv(str(source), tmp_path / "out", num_workers=1)
    assert [file.name for file in (tmp_path / "out").iterdir()] == [name]


def test_two_runs_into_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "LOCK_SECONDS", 0.1)
    source = write_parquet(tmp_path / "x.parquet", formulas(1))
    (tmp_path / "out").mkdir()
    folder = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="out: another data2csv writes here"):
        data2csv(str(source), tmp_path / "out", num_workers=1)
    os.close(folder)


def test_disk_error_in_a_worker_is_one_line(tmp_path):
    source = write_parquet(tmp_path / "x.parquet", formulas(300))
    out = tmp_path / "out"
    data2csv(str(source), out, num_workers=2)
    (out / "data.csv").unlink()
    shutil.rmtree(out / "images")
    (out / "images").write_text("a file where a folder has to be")
    with pytest.raises(InputError, match=r"images.*: cannot be written \(.*\).*run again \(it continues\)"):
        data2csv(str(source), out, num_workers=2)
    (out / "images").unlink()
    assert data2csv(str(source), out, num_workers=2).num_kept == 300


def test_worker_that_dies_names_the_rows(tmp_path):
    (tmp_path / stage.PARTS).mkdir()
    job = tmp_path, stage.Chunk(3, 384, [sources.Row(encode(picture()), "", "x")] * 2)
    with Workers(stage.store_chunk, stage._rows_of_job, []) as workers:
        assert workers.call(job) == 2
        workers._all[0].kill()
        workers._all[0].wait()
        with pytest.raises(InputError, match=r"rows 384 to 385: a worker process died .*--num-workers 1"):
            workers.call(job)


def test_command_line(tmp_path):
    source = write_parquet(tmp_path / "x.parquet", [*formulas(2), (b"", "broken")])
    done = subprocess.run(
        command("--source", source, "--output-dir", tmp_path / "out"), capture_output=True, text=True
    )
    assert done.stdout == (
        f"{tmp_path}/out/data.csv: 2 of 3 rows kept, 1 rejected (undecodable image 1; see "
        f"{tmp_path}/out/rejected.csv)\n"
    )
    failed = subprocess.run(command("--source", tmp_path / "no.parquet"), capture_output=True, text=True)
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)
    assert failed.stderr.startswith(f"latexocr data2csv: {tmp_path}/no.parquet: no such file or folder")


def test_importing_the_stage_is_light():
    heavy = "{'pandas', 'torch', 'pyarrow', 'datasets', 'PIL', 'numpy', 'transformers', 'tqdm'}"
    code = f"import sys, latexocr.data2csv, latexocr.csv2json; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# --- at size -----------------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from latexocr.data2csv import data2csv
data2csv(sys.argv[1], sys.argv[2], max_samples=int(sys.argv[3]), num_workers=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_stays_flat(tmp_path):
    """Ten times the rows (100 KB each, one row group: 150 MB) take no more memory."""
    noise = np.random.default_rng(0)
    rows = [(encode(Image.fromarray(noise.integers(0, 256, (180, 185, 3), np.uint8))), "x") for _ in range(50)]
    source = write_parquet(tmp_path / "x.parquet", rows * 30, use_dictionary=False)
    megabytes = []
    for num_rows in (150, 1500):
        run = [sys.executable, "-c", PEAK, source, tmp_path / f"{num_rows}", f"{num_rows}"]
        done = subprocess.run(list(map(str, run)), capture_output=True, text=True, check=True)
        megabytes.append(int(done.stdout))
    assert megabytes[1] - megabytes[0] < 40, megabytes


def test_real_rows_keep_every_pixel(tmp_path):
    if not LATEX_OCR.is_dir():
        pytest.skip("the real LaTeX_OCR rows are not beside this checkout (../shared/data/latex_ocr)")
    result = data2csv(str(LATEX_OCR / "val.parquet"), tmp_path / "out")
    originals = pq.read_table(LATEX_OCR / "val.parquet").to_pylist()
    assert (result.num_kept, result.rejected) == (1000, {})
    for row, original in zip(table(result.csv), originals, strict=True):
        assert row["text"] == original["text"]
        before = Image.open(io.BytesIO(original["image"]["bytes"])).convert("RGB")
        with Image.open(result.csv.parent / row["image_path"]) as after:
            assert after.convert("RGB").tobytes() == before.tobytes()


def test_state_names_source_and_options(tmp_path):
    source = write_parquet(tmp_path / "x.parquet", formulas(1))
    data2csv(str(source), tmp_path / "out", max_samples=5, num_workers=1)
    state = json.loads((tmp_path / "out" / stage.STATE).read_text())
    assert state["options"]["max_samples"] == 5
    assert state["fingerprint"][0][:2] == [str(source), source.stat().st_size]
