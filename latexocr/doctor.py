"""What is wrong with a data set, found before a GPU hour is spent on it: `latexocr doctor`.

Why: a model learns what its data says. A picture under two texts, a formula spelled in three ways, or validation
formulas that were trained on cost more than any option can win, and no loss curve shows them.
"""

from __future__ import annotations

import glob
import io
import json as json_format
import math
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from latexocr.errors import InputError
from latexocr.findings import CHECKS, Case, Facts, Row, find
from latexocr.images import ImagePolicy
from latexocr.likeness import look
from latexocr.metrics.tokens import tokenize
from latexocr.pictures import PictureError, flatten, load_picture

if TYPE_CHECKING:
    from latexocr.page import Pictures

BATCH_ROWS = 256  # pictures in memory together
EXAMPLES = 3  # cases of a finding in the text report
SHOWN_CASES, SHOWN_ROWS = 24, 4  # of a finding, of a case, in the HTML report
PICTURE_BYTES = 8 << 20  # for all pictures of the HTML report
BARS = 24  # of a histogram
QUANTILES = {"least": 0, "5%": 5, "half": 50, "95%": 95, "99%": 99, "most": 100}
EXTREMES: dict[str, Callable[[tuple[int, int]], float]] = {
    "smallest": lambda size: size[0] * size[1],
    "largest": lambda size: -size[0] * size[1],
    "widest": lambda size: -size[0] / size[1],
    "tallest": lambda size: -size[1] / size[0],
}

Encoded = bytes | str | None  # a picture, or its file


class Treatment(NamedTuple):
    """What the image policy does to one picture; sizes are width and height in pixels."""

    which: str
    row: int
    size: tuple[int, int]
    content: tuple[int, int]
    canvas: tuple[int, int]
    visual_tokens: int

    def __str__(self) -> str:
        size, content, canvas = ("{}x{}".format(*size) for size in (self.size, self.content, self.canvas))
        scale = math.sqrt(math.prod(self.content) / math.prod(self.size))
        return f"{size} -> {content} (x {scale:.2f}) on {canvas}: {self.visual_tokens} visual tokens"


@dataclass(frozen=True)
class Diagnosis:
    """Everything the doctor found; printed, it is the text report.

    Args:
        data: the files.
        rows: facts of every row, training rows first.
        findings: name (see `latexocr.findings.CHECKS`) -> its cases, the worst check first.
        lengths: what is measured -> value of each row.
        treatments: what the image policy does to the extreme pictures.
        num_formulas: different formulas, whatever their spelling.
        has_latex: whether the texts were rendered.
    """

    data: list[str]
    rows: list[Row]
    findings: dict[str, list[Case]]
    lengths: dict[str, list[int]]
    treatments: list[Treatment]
    num_formulas: int
    has_latex: bool

    def __str__(self) -> str:
        lines = [f"{' and '.join(self.data)}: {len(self.rows):,} rows, {self.num_formulas:,} formulas"]
        lines += ["", " " * 16 + "".join(f"{name:>9}" for name in QUANTILES)]
        lines += [
            f"{name:<16}" + "".join(f"{value:>9,}" for value in values.values())
            for name, values in self.sizes().items()
        ]
        lines += ["", "what the image policy does"]
        lines += [f"  {one.which:<10}{one}  {self.rows[one.row].where}" for one in self.treatments]
        for name, cases in self.findings.items():
            check, num_rows = CHECKS[name], self.num_rows(name)
            number = f"{num_rows:,} row{'s' * (num_rows != 1)}"
            lines += ["", f"{check.severity}: {check.title}: {number}", f"  {check.advice}"]
            lines += [f"  {line}" for case in cases[:EXAMPLES] for line in self._lines(case)]
            if len(cases) > EXAMPLES:
                lines.append(f"  ... and {len(cases) - EXAMPLES:,} more: see --html or --json")
        lines += ["", *([] if self.findings else ["nothing found"])]
        if not self.has_latex:
            lines.append("the programs latex and dvipng are not installed: no text was rendered")
        # what a stranger wrote must not steer the terminal
        return "\n".join("".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines).rstrip()

    @property
    def exit_status(self) -> int:
        """Of the command: 1 where there are problems, 0 for warnings and notes."""
        return int(any(CHECKS[name].severity == "problem" for name in self.findings))

    def _lines(self, case: Case) -> Iterator[str]:
        more = f" and {len(case.rows) - SHOWN_ROWS:,} more" if len(case.rows) > SHOWN_ROWS else ""
        where = ", ".join(self.rows[row].where for row in case.rows[:SHOWN_ROWS])
        yield f"- {where}{more}{': ' if case.why else ''}{case.why}"
        texts = Counter(self.rows[row].text for row in case.rows).most_common(SHOWN_ROWS)
        for text, number in texts:
            yield f"    {f'{number:,} x ' if len(texts) > 1 else ''}{_shortened(' '.join(text.split()))}"

    def num_rows(self, name: str) -> int:
        """How many rows a finding concerns."""
        side = CHECKS[name].side
        rows = {row for case in self.findings[name] for row in case.rows}
        return sum(side in (None, self.rows[row].side) for row in rows)

    def sizes(self) -> dict[str, dict[str, int]]:
        """What is measured -> quantile -> value."""
        measured = {name: values for name, values in self.lengths.items() if values}
        quantiles = {
            name: np.percentile(values, [*QUANTILES.values()], method="higher").tolist()
            for name, values in measured.items()
        }
        return {name: dict(zip(QUANTILES, found, strict=True)) for name, found in quantiles.items()}

    def to_json(self) -> str:
        """Everything, with all rows of all cases."""

        def described(row: int) -> dict[str, str]:
            return {"where": self.rows[row].where, "text": self.rows[row].text}

        findings = [
            {
                "name": name,
                **CHECKS[name]._asdict(),
                "num_rows": self.num_rows(name),
                "cases": [{"why": case.why, "rows": [described(row) for row in case.rows]} for case in cases],
            }
            for name, cases in self.findings.items()
        ]
        whole = {
            "data": self.data,
            "num_rows": len(self.rows),
            "num_formulas": self.num_formulas,
            "has_latex": self.has_latex,
            "sizes": self.sizes(),
            "image_policy": [{**one._asdict(), "row": self.rows[one.row].where} for one in self.treatments],
            "findings": findings,
        }
        return json_format.dumps(whole, indent=2) + "\n"


def doctor(
    data: Path,
    *,
    val_data: Path | None = None,
    html: Path | None = None,
    json: Path | None = None,
    model: str | None = None,
) -> Diagnosis:
    """Look for what harms a training: bad pictures, bad texts, contradictions, leakage and outliers.

    Args:
        data: train.json, data.csv, or another local file, folder or pattern that data2csv reads, such as '*.parquet';
            of conversations those of one picture, one question and one answer.
        val_data: validation data, likewise; adds the search for what stands on both sides.
        html: file for a report with pictures.
        json: file for a report with every case.
        model: checkpoint whose tokenizer counts and whose image options hold (default: the recipe's for Qwen2-VL).

    Returns:
        All findings; printed, it is the text report. The command's exit status is 1 where one is a problem.

    Raises:
        InputError: data or model that cannot be used, or a report that cannot be written.
    """
    from latexocr.render import engine_available, render

    for report in filter(None, (html, json)):
        if not report.parent.is_dir():  # not after minutes of work
            raise InputError(f"{report}: no folder {report.parent}; make it or choose another place")
    sources = {side: path for side, path in (("train", data), ("val", val_data)) if path is not None}
    policy, count_tokens = _model_facts(model)
    rows = [row for side, path in sources.items() for row in _read(path, side)]
    has_latex = engine_available() == "latex"
    texts = list(dict.fromkeys(row.text for row in rows if row.text.strip())) if has_latex else []
    facts = Facts(rows, policy, dict(zip(texts, render(texts), strict=True)), lambda wanted: _load(sources, wanted))
    diagnosis = Diagnosis(
        data=[str(path) for path in sources.values()],
        rows=rows,
        findings=find(facts),
        lengths=_lengths(facts, count_tokens),
        treatments=_extreme_treatments(facts),
        num_formulas=len({facts.canonical(1)[row] for row in facts.texted}),
        has_latex=has_latex,
    )
    _write(diagnosis, facts, html, json)
    return diagnosis


def _model_facts(model: str | None) -> tuple[ImagePolicy, Callable[[list[str]], list[int]] | None]:
    """The image policy, and what counts a text's tokens as the model does."""
    if model is None:
        return ImagePolicy(), None
    from latexocr.contract import Contract
    from latexocr.modeling import load_processor, resolve_checkpoint

    folder = resolve_checkpoint(model)
    processor, contract = load_processor(folder), Contract.load(folder)
    cell = processor.image_processor.patch_size * processor.image_processor.merge_size

    def count_tokens(texts: list[str]) -> list[int]:
        return [len(ids) for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    return contract.image_policy if contract else ImagePolicy(cell), count_tokens


# --- reading ----------------------------------------------------------------------------------------------


def _read(path: Path, side: str) -> Iterator[Row]:
    """Facts of every row; pictures are decoded by several threads, and not kept."""
    from tqdm.auto import tqdm

    entries = iter(tqdm(_entries(path), unit="row", desc=f"reading {path.name}"))
    with ThreadPoolExecutor() as threads:
        while batch := list(islice(entries, BATCH_ROWS)):
            yield from threads.map(lambda entry: _facts_of(*entry, side), batch)


def _entries(path: Path) -> Iterator[tuple[str, Encoded, str]]:
    """Where each row stands, its picture, its text: of our own records, or of a source that data2csv reads."""
    from latexocr.records import read_records
    from latexocr.sources import open_source

    if not path.exists() and not glob.has_magic(str(path)):
        raise InputError(f"{path}: no such file or folder; a hub's data set is brought here by `latexocr data2csv`")
    if path.suffix == ".json" or (path.suffix == ".jsonl" and _holds_records(path)):
        for record in read_records(path):
            roles = [turn.role for turn in record.turns if turn.role != "system"]
            if roles != ["user", "assistant"] or [media.kind for media in record.media] != ["image"]:
                raise InputError(
                    f"{record.where}: doctor compares pictures with their LaTeX, one of each a row, this shows "
                    f"{len(record.media)} and has the turns {', '.join(roles)}; leave it out here: `latexocr preview` "
                    "shows it, and training refuses media and texts that it cannot use before it starts"
                )
            content = record.media[0].load(record.where)
            where = record.where.removeprefix(f"{path.parent}/")
            yield where, content if isinstance(content, bytes) else str(content), record.text
        return
    for number, row in enumerate(open_source(str(path)).rows()):
        name = f" ({row.image_path})" if row.image_path else ""
        yield f"{path.name} row {number}{name}", row.image, row.text if isinstance(row.text, str) else ""


def _holds_records(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = lines.readline()
        return '"conversations"' in first or '"messages"' in first


def _facts_of(where: str, encoded: Encoded, text: str, side: str) -> Row:
    row = Row(where, text, side)
    try:
        image = _decode(encoded)
    except (PictureError, OSError) as error:
        row.problem = f"no such file: {error.filename}" if isinstance(error, FileNotFoundError) else str(error)
        return row
    row.size, row.look = image.size, look(image)
    return row


def _decode(encoded: Encoded) -> Image.Image:
    if encoded is None:
        raise PictureError("missing image: no bytes and no path")
    return flatten(load_picture(Path(encoded) if isinstance(encoded, str) else io.BytesIO(encoded)))


def _load(sources: dict[str, Path], wanted: set[int]) -> Iterator[tuple[int, Image.Image]]:
    """The pictures of some rows, read once more."""
    if not wanted:
        return
    entries = (entry for path in sources.values() for entry in _entries(path))
    for number, (_, encoded, _) in enumerate(islice(entries, max(wanted) + 1)):
        if number in wanted:
            yield number, _decode(encoded)


# --- measures ---------------------------------------------------------------------------------------------


def _lengths(facts: Facts, count_tokens: Callable[[list[str]], list[int]] | None) -> dict[str, list[int]]:
    sizes = [row.size for row in facts.rows if row.size]
    texts = [facts.rows[row].text for row in facts.texted]
    return {
        "width (pixels)": [width for width, _ in sizes],
        "height (pixels)": [height for _, height in sizes],
        "visual tokens": [facts.policy.visual_tokens(*size) for size in sizes],
        "LaTeX tokens": [len(tokenize(text)) for text in texts],
        **({"model's tokens": count_tokens(texts)} if count_tokens else {}),
    }


def _extreme_treatments(facts: Facts) -> list[Treatment]:
    sized = [number for number, row in enumerate(facts.rows) if row.size]
    return [
        _treatment(which, row, facts)
        for which, key in EXTREMES.items()
        for row in sorted(sized, key=lambda row: key(facts.rows[row].size))[:1]
    ]


def _treatment(which: str, row: int, facts: Facts) -> Treatment:
    size = facts.rows[row].size
    width, height, *canvas = facts.policy.layout(*size)
    return Treatment(which, row, size, (width, height), tuple(canvas), facts.policy.visual_tokens(*size))


# --- reports ----------------------------------------------------------------------------------------------


def _write(diagnosis: Diagnosis, facts: Facts, html: Path | None, json: Path | None) -> None:
    from latexocr.contract import write_text

    try:
        if json is not None:
            write_text(json, diagnosis.to_json())
        if html is not None:
            _write_html(diagnosis, facts, html)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be written ({error.strerror}); choose another place") from error


def _write_html(diagnosis: Diagnosis, facts: Facts, path: Path) -> None:
    """The first cases of each finding with their pictures, and histograms."""
    from latexocr.page import Pictures, write_page

    shown = {
        name: [(case.rows[:SHOWN_ROWS], len(case.rows), _shortened(case.why)) for case in cases[:SHOWN_CASES]]
        for name, cases in diagnosis.findings.items()
    }
    needed = {row for cases in shown.values() for rows, _, _ in cases for row in rows}
    needed |= {one.row for one in diagnosis.treatments}
    pictures = Pictures()
    findings = [
        {"name": name, **CHECKS[name]._asdict(), "num_rows": diagnosis.num_rows(name),
         "num_cases": len(diagnosis.findings[name]), "cases": cases}
        for name, cases in shown.items()
    ]  # fmt: skip
    data = {
        "data": diagnosis.data,
        "num_rows": len(diagnosis.rows),
        "num_formulas": diagnosis.num_formulas,
        "has_latex": diagnosis.has_latex,
        "sizes": diagnosis.sizes(),
        "histograms": {name: histogram(values) for name, values in diagnosis.lengths.items() if values},
        "findings": findings,
        "treatments": [{"which": one.which, "row": one.row, "what": str(one)} for one in diagnosis.treatments],
        "rows": _shown_rows(facts, needed, pictures),
    }
    title = f"Doctor: {', '.join(Path(name).name for name in diagnosis.data)}"
    write_page(path, name="doctor", title=title, data=data, pictures=pictures)


def _shown_rows(facts: Facts, needed: set[int], pictures: Pictures) -> dict[str, dict]:
    """What the page shows of a row: its picture, its text, and what the text prints."""
    from latexocr.page import PRINT_DPI, small_picture
    from latexocr.render import draw

    readable = {row for row in needed if facts.rows[row].size}
    max_bytes = PICTURE_BYTES // max(1, len(needed))
    photographs = {row: pictures.add(small_picture(image, max_bytes)) for row, image in facts.load(readable)}
    texts = [text for text in {facts.rows[row].text for row in needed} if text in facts.renderings]
    drawn = draw([facts.renderings[text] for text in texts], dpi=PRINT_DPI)
    drawings = dict(zip(texts, map(pictures.add_print, drawn), strict=True))
    return {
        str(row): {
            "where": facts.rows[row].where,
            "text": _shortened(facts.rows[row].text, 1000),
            "picture": photographs.get(row),
            "drawn": drawings.get(facts.rows[row].text),
        }
        for row in sorted(needed)
    }


def histogram(values: list[int]) -> list[tuple[int, int, int]]:
    """At most `BARS` bars of (least, most, rows) with equal steps; the last one takes all above the 99% quantile.

    >>> histogram([1, 1, 2, 5])
    [(1, 1, 2), (2, 2, 1), (3, 3, 0), (4, 4, 0), (5, 5, 1)]
    """
    least, most = min(values), max(values)
    usual = math.ceil(np.percentile(values, 99))
    step = max(1, math.ceil((usual - least + 1) / BARS))
    starts = list(range(least, usual + 1, step))
    ends = [start - 1 for start in starts[1:]] + [max(most, starts[-1])]
    counts = np.bincount(np.minimum((np.array(values) - least) // step, len(starts) - 1), minlength=len(starts))
    return list(zip(starts, ends, counts.tolist(), strict=True))


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."
