"""`README.md` of every adapter and model that is saved: what it is, how to use it, what made it, how good it is.

The front matter is what the hubs read (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from latexocr.checkpoint import HUB_ID
from latexocr.contract import write_text
from latexocr.info import Info, inspect, option_texts

FILE_NAME = "README.md"
WITH_LATEXOCR = """\
```python
from latexocr.predict import LatexOCR

ocr = LatexOCR.from_pretrained("{place}"{base})
print(ocr("formula.png"))
```

or `latexocr predict --model {place} formula.png`; DIR is this folder. Prompt, picture sizes and end token come from
`latexocr.json`."""
ELSEWHERE = """\
Other software must do the same as training did: the picture first, then exactly the prompt below, greedy decoding
without a repetition penalty until `{end}`, and pictures of the sizes below."""
READS = {"latex": "formulas as LaTeX", "json": "images as JSON"}
# see `train_config.NOT_SHOWN`
OPTIONS = """\
{options}. What says where files are, how pictures are prepared (above), how validation, saving and logging go, or only
how fast and in how much memory it runs is left out; all others as latexocr {version} has them by default."""
MERGE_FIRST = "For vLLM, llama.cpp and others make a whole model: `latexocr merge --adapter DIR --output MERGED`."
WHOLE = """\
It is an ordinary transformers checkpoint: `AutoModelForImageTextToText.from_pretrained(DIR)`, or `vllm serve DIR`."""


def write_card(folder: Path) -> None:
    """Write the card of the adapter or model in `folder`, which holds weights, configuration and `latexocr.json`."""
    write_text(folder / FILE_NAME, card(inspect(folder)))


def card(found: Info) -> str:
    """The text of the card.

    Args:
        found: of a folder that this library has written.
    """
    parts = [
        _front_matter(found),
        f"# {found.base_model and Path(found.base_model).name}, reading {READS[_answers(found)]}",
        _what(found),
        "## Use",
        _use(found),
        "## What it is",
        _table(_rows(found)),
    ]
    if found.options:
        options = ", ".join(f"`{text}`" for text in option_texts(found.options))
        version = found.contract.versions.get("latexocr")
        parts += ["## Training options", OPTIONS.format(options=options, version=version)]
    if found.scores:
        parts += ["## Scores", _scores(found)]
    return "\n\n".join(parts) + "\n"


def _answers(found: Info) -> str:
    return found.contract.answer_format if found.contract else "latex"


def _front_matter(found: Info) -> str:
    """YAML for the hubs. A base that is a folder is left out: they refuse what is no id of theirs."""
    import yaml

    adapter = found.kind == "adapter"
    values: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["latexocr", _answers(found), "ocr", *(["lora"] if adapter else [])],
    }
    if found.base_model and HUB_ID.fullmatch(found.base_model):
        relation = "adapter" if adapter else "quantized" if found.quantised else "finetune"
        values |= {"base_model": found.base_model, "base_model_relation": relation}
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _what(found: Info) -> str:
    what = "A LoRA adapter" if found.kind == "adapter" else "A model"
    if found.quantised:
        what += f" with {found.weight_type} weights"
    return (
        f"{what} of the family {found.family or found.model_type}, trained with latexocr for "
        f"reading {READS[_answers(found)]}."
    )


def _use(found: Info) -> str:
    adapter = found.kind == "adapter"
    # a base in a folder of the machine that trained is nowhere else
    local = adapter and found.base_model and not HUB_ID.fullmatch(found.base_model)
    use = WITH_LATEXOCR.format(place="BASE" if local else "DIR", base=', adapter="DIR"' if local else "")
    if local:
        use = use.replace("--model BASE", "--model BASE --adapter DIR")
    return "\n\n".join([use, ELSEWHERE.format(end=found.contract.end_token), MERGE_FIRST if adapter else WHOLE])


def _rows(found: Info) -> list[tuple[str, str]]:
    """What has no section of its own; of a base in a folder its name, for a card is read elsewhere."""
    rows = {name: text for name, text in found.rows() if name not in ("options", "scores")}
    if found.base_model and not HUB_ID.fullmatch(found.base_model):
        rows["base model"] = Path(found.base_model).name
    return list(rows.items())


def _scores(found: Info) -> str:
    training = found.training
    text = f"Validation at step {training['evaluation'].get('step')}."
    if "val_records" in training:
        of, generated = training["val_records"], training["generated_records"]
        text += f" Records: {of:,}" + (f"; for all but the loss {generated:,} of them." if generated < of else ".")
    return f"{text}\n\n{_table((name, f'{value:.4g}') for name, value in found.scores.items())}"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in rows)])


def _cell(text: str) -> str:
    """A prompt may hold line breaks, bars and markup; in a cell they are shown as they are."""
    return json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"').replace("|", "\\|").replace("<", "&lt;")
