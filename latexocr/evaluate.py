"""Stage 5: model and data -> predictions.jsonl and all that can be said of them; or from a predictions file alone.

Read `assess` for the story: texts are normalised and rendered once, every metric says what each row adds, and
figures, intervals, slices and comparisons are weighted sums of that one table (`latexocr.metrics.bootstrap`).
"""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latexocr.errors import InputError
from latexocr.evaluation import Evaluation, tidy

if TYPE_CHECKING:
    from latexocr.metrics.bootstrap import Table
    from latexocr.metrics.fields import Judged
    from latexocr.metrics.scores import Pairs

REPORT = "report.html"
logger = logging.getLogger(__name__)


def evaluate(
    model: str,
    data: Path,
    output_dir: Path,
    *,
    adapter: Path | None = None,
    batch_size: int = 128,
    max_new_tokens: int = 512,
    max_samples: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    prompt: str | None = None,
    device: str | None = None,
    hub: Literal["modelscope", "huggingface"] = "modelscope",
    base_bits: Literal[4, 8, 16] | None = None,
    trust_remote_code: bool = False,
    pictures: bool = True,
    answer_format: Literal["latex", "json"] | None = None,
    allow_urls: bool = False,
    allow_outside_paths: bool = False,
) -> Evaluation:
    """Answer every record of a data file and score the answers.

    Args:
        model: base or merged model, or an adapter folder: a path or a hub id.
        data: val.json, as csv2json writes it, or any other file that training reads.
        output_dir: folder for predictions.jsonl, metrics.json, slices.csv, rows.csv and, of LaTeX, report.html.
        adapter: adapter folder to put on the model.
        batch_size: images at once; fewer where memory is short, and 16 at most when sampling.
        max_new_tokens: longest answer in tokens.
        max_samples: only the first so many records.
        temperature: greedy decoding when left out, else sampling at this temperature.
        top_p: sampling from the smallest set of tokens with this probability.
        min_p: sampling from tokens with at least this share of the best one's probability.
        prompt: another instruction than the checkpoint was trained with.
        device: cpu, cuda, ... (default: a GPU when there is one).
        hub: where a hub id is downloaded from.
        base_bits: 4 or 8 rounds the base model's weights while they are loaded (bitsandbytes), 16 takes whole ones
            (default: as the adapter was trained).
        trust_remote_code: run Python code that comes with a checkpoint.
        pictures: render predictions and references and compare the pictures too.
        answer_format: what answers are: LaTeX, or JSON objects that are compared field by field (default: as the model
            was trained, else LaTeX).
        allow_urls: open URLs that records name, once: ~/.cache/latexocr/urls keeps what they hold.
        allow_outside_paths: open files that records name outside of the data file's folder.

    Raises:
        InputError: data (two records with one id, say), model or adapter that cannot be used, or a folder that
            cannot be written.
    """
    from latexocr.formats import Access
    from latexocr.images import load_image
    from latexocr.predict import LatexOCR
    from latexocr.records import read_records
    from latexocr.video import video_header

    if max_samples is not None and max_samples < 1:
        raise InputError(f"max_samples is {max_samples}, needs at least 1")
    access = Access(urls=allow_urls, outside=allow_outside_paths)
    records = read_records(data, access=access, hub=hub)[:max_samples]
    (name, count), *_ = Counter(record.id for record in records).most_common(1)
    if count > 1:
        raise InputError(f"{data}: {count} records have the id {name!r}; give each its own, by which answers are told")
    for record in records:  # a broken image is found before an hour of generation, not after
        for media in record.media:
            if media.kind == "image":
                load_image(media.load(record.where), record.place_of(media))
            else:
                video_header(media, record.where)
    _make_folder(output_dir)
    ocr = LatexOCR.from_pretrained(
        model, adapter=adapter, device=device, prompt=prompt, hub=hub, base_bits=base_bits,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    answers = ocr.generate(
        list(records), batch_size=batch_size, max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, min_p=min_p, progress=True,
    )  # fmt: skip
    rows = [answer.as_row(record) for record, answer in zip(records, answers, strict=True)]
    write_predictions(output_dir / "predictions.jsonl", rows)
    if answer_format is None:
        answer_format = ocr.contract.answer_format if ocr.contract else "latex"
    return score_rows(rows, output_dir, pictures=pictures, answer_format=answer_format)


def score_file(
    predictions: Path,
    *,
    output_dir: Path | None = None,
    baseline: Path | None = None,
    pictures: bool = True,
    answer_format: Literal["latex", "json"] = "latex",
) -> Evaluation:
    """Metrics from a predictions file, without a model.

    Args:
        predictions: predictions.jsonl with `id`, `reference` and `prediction` on every line; a prediction that is
            null counts as an empty answer. `image_path`, `source`, `num_tokens`, `finished` and `confidence` are used
            where given.
        output_dir: folder for metrics.json, slices.csv, rows.csv and, of LaTeX, report.html; nothing is written when
            left out.
        baseline: another predictions file of the same ids and references to compare with.
        pictures: render predictions and references and compare the pictures too.
        answer_format: what answers are: LaTeX, or JSON objects that are compared field by field.

    Raises:
        InputError: no such file, a malformed line, a line without the keys, an id that stands there twice, no line
            at all, or a baseline of other ids or references.
    """
    rows = read_predictions(predictions)
    other_rows = None if baseline is None else _in_order_of(rows, read_predictions(baseline), predictions, baseline)
    return score_rows(rows, output_dir, baseline=other_rows, pictures=pictures, answer_format=answer_format)


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The rows of a predictions file.

    Raises:
        InputError: see `score_file`.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such predictions file; `latexocr evaluate` writes one")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    rows: list[dict[str, Any]] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = _prediction(f"{path} line {number}", line)
        first = lines.setdefault(row["id"], number)
        if first != number:
            raise InputError(
                f"{path} line {number}: the id {row['id']!r} is that of line {first} too; which one counts? Remove one"
            )
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: holds no predictions")
    return rows


# What a line may say besides, as `evaluate` does.
_OPTIONAL = {
    "image_path": (str, "the path of a picture"),
    "source": ((str, int), "a name"),
    "num_tokens": ((int, float), "a number of tokens"),
    "finished": (bool, "true or false"),
    "confidence": ((int, float), "a number from 0 to 1"),
}


def _prediction(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if "\\ud" in line.lower():  # half a character, which no file can hold: U+FFFD stands for it
            text = json.dumps(row, ensure_ascii=False).encode("utf-16", "surrogatepass")
            row = json.loads(text.decode("utf-16", "replace"))
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: malformed JSON ({error.msg})") from error
    kinds = {"id": (str, int), "reference": str, "prediction": (str, type(None))}
    wrong = [key for key, kind in kinds.items() if not (isinstance(row, dict) and isinstance(row.get(key, ...), kind))]
    if wrong:
        raise InputError(f"{where}: needs an object with text under {' and '.join(map(repr, wrong))}")
    for key, (kind, name) in _OPTIONAL.items():
        if row.get(key) is not None and not isinstance(row[key], kind):
            raise InputError(f"{where}: {key!r} is {row[key]!r:.40}, needs {name}, or leave it out")
    if row.get("confidence") is not None and not 0 <= row["confidence"] <= 1:
        raise InputError(f"{where}: 'confidence' is {row['confidence']}, needs a number from 0 to 1, or leave it out")
    return {**row, "id": str(row["id"])}


def _in_order_of(
    rows: list[dict[str, Any]], others: list[dict[str, Any]], path: Path, other_path: Path
) -> list[dict[str, Any]]:
    """The rows of `others` that have the ids of `rows`: a comparison is fair over the same formulas only."""
    by_id = {row["id"]: row for row in others}
    missing = [row["id"] for row in rows if row["id"] not in by_id]
    surplus = by_id.keys() - {row["id"] for row in rows}
    for found, here, there in ((missing, path, other_path), (sorted(surplus), other_path, path)):
        if found:
            raise InputError(
                f"{len(found)} ids of {here} are not in {there}, the first is {found[0]!r}; "
                "compare predictions for the same data"
            )
    for row in rows:
        if by_id[row["id"]]["reference"] != row["reference"]:
            raise InputError(
                f"the references of id {row['id']!r} differ between {path} and {other_path}; "
                "compare predictions for the same data"
            )
    return [by_id[row["id"]] for row in rows]


def write_predictions(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, whole or not at all."""
    from latexocr.contract import write_text

    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def score_rows(
    rows: Sequence[dict[str, Any]],
    output_dir: Path | None,
    *,
    baseline: Sequence[dict[str, Any]] | None = None,
    pictures: bool = True,
    answer_format: Literal["latex", "json"] = "latex",
) -> Evaluation:
    """Score rows, write what was found, and show it on the dashboard of a run that is active; see `assess`."""
    if output_dir is not None:
        _make_folder(output_dir)
    if answer_format == "json":
        evaluation = replace(assess_fields(rows, baseline=baseline), output_dir=output_dir)
        if output_dir is not None:
            _write_tables(evaluation, output_dir)
            (output_dir / REPORT).unlink(missing_ok=True)  # of an earlier score as LaTeX
            logger.info(f"no {REPORT}: it shows LaTeX; fields are in slices.csv, rows in rows.csv")
        return evaluation
    evaluation = replace(assess(rows, baseline=baseline, pictures=pictures), output_dir=output_dir)
    if output_dir is not None:
        _write(evaluation, output_dir)
    if sys.modules.keys() & {"latexocr.tracking", "swanlab"}:  # else no run can be active: save the import's seconds
        from latexocr.tracking import log_evaluation

        log_evaluation(evaluation)
    return evaluation


def assess(
    rows: Sequence[dict[str, Any]], *, baseline: Sequence[dict[str, Any]] | None = None, pictures: bool = True
) -> Evaluation:
    """All figures of rows with `reference`, `prediction` and, if known, `finished`.

    Args:
        rows: at least one.
        baseline: rows of another model, for the same formulas in the same order.
        pictures: render and compare, else text metrics only.
    """
    from latexocr.metrics.bootstrap import Table
    from latexocr.metrics.calibration import calibration, reliability
    from latexocr.metrics.slices import members

    both = [rows] if baseline is None else [rows, baseline]
    drawn = _rendered(both) if pictures else [None] * len(both)
    pairs = [_pairs(some, rendered) for some, rendered in zip(both, drawn, strict=True)]
    tables = [Table(some) for some in pairs]
    confidences, right = _confident(rows, pairs[0])
    described = _described(rows, pairs[0], tables[0])
    if baseline is not None:
        described = _beside(described, baseline, tables[1])
    slices = [
        row
        for (by, name), numbers in members(described).items()
        for row in tidy(tables[0].estimates(numbers), by=by, slice=name, num_rows=len(numbers))
    ]
    return Evaluation(
        metrics=_flat(tables[0].estimates()) | calibration(confidences, right) | _counts(rows, pairs[0]),
        rows=described,
        slices=slices,
        engine=drawn[0][1][0].engine if pictures else None,
        comparison=None if baseline is None else tables[0].compare(tables[1]),
        reliability=[bin._asdict() for bin in reliability(confidences, right)],
        renderings=_by_text(both, drawn) if pictures else {},
    )


def assess_fields(rows: Sequence[dict[str, Any]], *, baseline: Sequence[dict[str, Any]] | None = None) -> Evaluation:
    """`assess` of JSON answers: no pictures, and fields in place of structures."""
    from latexocr.metrics.bootstrap import Table
    from latexocr.metrics.calibration import calibration, reliability
    from latexocr.metrics.fields import counts, field_metrics

    judged = [_judged(some) for some in ([rows] if baseline is None else [rows, baseline])]
    tables = [Table(some, field_metrics(judged[0])) for some in judged]
    estimates = tables[0].estimates()
    fields = {name.partition(".")[2]: found for name, found in estimates.items() if "." in name}
    confidences, right = _confident_fields(rows, judged[0])
    return Evaluation(
        metrics=_flat({name: found for name, found in estimates.items() if "." not in name})
        | {f"field_match.{name}": found.value for name, found in fields.items()}
        | calibration(confidences, right)
        | counts(judged[0]),
        rows=[{**row, **one.as_row()} for row, one in zip(rows, judged[0], strict=True)],
        slices=[
            row
            for name, found in fields.items()
            for row in tidy(
                {"field_match": found}, by="field", slice=name, num_rows=sum(name in one.hits for one in judged[0])
            )
        ],
        comparison=None if baseline is None else tables[0].compare(tables[1]),
        reliability=[bin._asdict() for bin in reliability(confidences, right)],
    )


def _judged(rows: Sequence[dict[str, Any]]) -> list[Judged]:
    from latexocr.metrics.fields import judge

    return judge([row["prediction"] for row in rows], [row["reference"] for row in rows])


def _confident_fields(rows: Sequence[dict[str, Any]], judged: Sequence[Judged]) -> tuple[list[float], list[bool]]:
    """Confidences of the rows that have one, and whether those answers are right."""
    known = [number for number, row in enumerate(rows) if row.get("confidence") is not None]
    return [rows[number]["confidence"] for number in known], [judged[number].exact for number in known]


def quick_scores(
    rows: Sequence[dict[str, Any]], *, pictures: bool, answer_format: Literal["latex", "json"] = "latex"
) -> dict[str, float]:
    """The figures alone, for the validations of a training; see `assess`."""
    from latexocr.metrics.calibration import calibration
    from latexocr.metrics.fields import figures as field_figures
    from latexocr.metrics.scores import figures

    if answer_format == "json":
        judged = _judged(rows)
        return field_figures(judged) | calibration(*_confident_fields(rows, judged))
    pairs = _pairs(rows, _rendered([rows])[0] if pictures else None)
    return figures(pairs) | calibration(*_confident(rows, pairs))


def _confident(rows: Sequence[dict[str, Any]], pairs: Pairs) -> tuple[list[float], list[bool]]:
    """Confidences of the rows that have one, and whether those answers are right: exact match, level 2."""
    known = zip([row.get("confidence") for row in rows], *pairs.tokens(2), strict=True)
    found = [(confidence, ours == theirs) for confidence, ours, theirs in known if confidence is not None]
    return [confidence for confidence, _ in found], [right for _, right in found]


def _pairs(rows: Sequence[dict[str, Any]], pictures: tuple[list, list] | None) -> Pairs:
    from latexocr.metrics.scores import Pairs

    return Pairs(
        [row["prediction"] or "" for row in rows],
        [row["reference"] for row in rows],
        finished=[row.get("finished") for row in rows],
        pictures=pictures,
    )


def _rendered(both: Sequence[Sequence[dict[str, Any]]]) -> list[tuple[list, list]]:
    """Renderings of predictions and references of each file, all in one go."""
    from latexocr.render import render

    texts = [[row[key] or "" for row in rows] for rows in both for key in ("prediction", "reference")]
    drawn = iter(render([text for side in texts for text in side]))
    sides = [list(islice(drawn, len(side))) for side in texts]
    return list(zip(sides[::2], sides[1::2], strict=True))


def _by_text(both: Sequence[Sequence[dict[str, Any]]], drawn: Sequence[tuple[list, list]]) -> dict[str, Any]:
    found = {}
    for rows, sides in zip(both, drawn, strict=True):
        for key, renderings in zip(("prediction", "reference"), sides, strict=True):
            found |= zip([row[key] or "" for row in rows], renderings, strict=True)
    return found


# Key of a row: the metric of which it is the row's value.
ROW_VALUES = {
    "exact_match": "exact_match",
    "edit_distance": "edit_distance",
    "bleu_sentence": "bleu",
    "runaway": "runaway_rate",
    "renders": "render_rate",
    "picture_match": "picture_match",
    "glyph_f1": "glyph_f1",
}
_FLAGS = {"exact_match", "runaway", "renders", "picture_match"}


def _described(rows: Sequence[dict[str, Any]], pairs: Pairs, table: Table) -> list[dict[str, Any]]:
    """Every row with what is known about it."""
    from latexocr.metrics.slices import describe

    values = table.row_values()
    columns = {key: values[name].tolist() for key, name in ROW_VALUES.items() if name in values}
    columns["token_errors"] = pairs.token_errors.tolist()
    described = []
    for number, (row, tokens) in enumerate(zip(rows, pairs.tokens(1)[1], strict=True)):
        found = {key: _plain(key, column[number]) for key, column in columns.items()}
        described.append({**row, **found, **describe(tokens)})
    return described


def _beside(rows: list[dict[str, Any]], baseline: Sequence[dict[str, Any]], table: Table) -> list[dict[str, Any]]:
    """The rows with the baseline's answer, and by how much its edit distance is larger."""
    distances = table.row_values()["edit_distance"].tolist()
    return [
        {**row, "baseline_prediction": other["prediction"], "gain": distance - row["edit_distance"]}
        for row, other, distance in zip(rows, baseline, distances, strict=True)
    ]


def _plain(key: str, value: float) -> float | int | None:
    if value != value:
        return None
    return int(value) if key in _FLAGS or key == "token_errors" else value


def _flat(estimates: dict[str, Any]) -> dict[str, float]:
    flat = {}
    for name, (value, low, high) in estimates.items():
        flat |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return flat


def _counts(rows: Sequence[dict[str, Any]], pairs: Pairs) -> dict[str, float]:
    from latexocr.metrics.scores import counts

    missing = sum(row["prediction"] is None for row in rows)
    return {**counts(pairs), "missing_predictions": float(missing)}


def _write(evaluation: Evaluation, folder: Path) -> None:
    from latexocr.report import write_report

    _write_tables(evaluation, folder)
    write_report(evaluation, folder / REPORT)


def _write_tables(evaluation: Evaluation, folder: Path) -> None:
    from latexocr.contract import write_text

    write_text(folder / "metrics.json", json.dumps(evaluation.metrics, indent=2) + "\n")
    write_text(folder / "slices.csv", _csv(evaluation.slices))
    rows = [{key: _cell(value) for key, value in row.items()} for row in evaluation.rows]
    write_text(folder / "rows.csv", _csv(rows))
    if evaluation.comparison is None:
        (folder / "comparison.json").unlink(missing_ok=True)  # of an earlier score with a baseline
    else:
        write_text(folder / "comparison.json", json.dumps(evaluation.comparison, indent=2) + "\n")


def _cell(value: Any) -> Any:
    return " ".join(value) if isinstance(value, list) else value


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """RFC 4180 text with the keys of all rows as columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --output-dir") from error
