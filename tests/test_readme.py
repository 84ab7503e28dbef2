"""Both READMEs against the code: their commands parse, their Python runs, tables, tree and links are current."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from contextlib import nullcontext

import pytest
import yaml
from conftest import ROOT, SAMPLE, untied, write_records

from latexocr.errors import InputError

READMES = ("README.md", "README.zh-CN.md")
# What the Python block names -> what the test puts there; nothing else in it is changed.
STANDS_FOR = {
    "Qwen/Qwen2-VL-2B-Instruct": "tiny model",
    "train.json": "train.json",
    "val.json": "val.json",
    "outputs/run": "run",
    "formula.png": "formula.png",
}


def text_of(readme: str) -> str:
    return (ROOT / readme).read_text(encoding="utf-8")


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(readme), re.MULTILINE | re.DOTALL)


def commands(readme: str) -> list[list[str]]:
    """Every command line of the bash blocks, comments left out."""
    lines = "\n".join(blocks(readme, "bash")).splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def options_script():
    spec = importlib.util.spec_from_file_location("readme_options", ROOT / "scripts/readme_options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_options(argv: list[str], monkeypatch) -> dict:
    """What `latexocr train ARGV` would hand to TrainConfig; a `--config` file that is none of ours is left out."""
    from latexocr import config
    from latexocr.train import TrainConfig

    monkeypatch.setattr(config, "read_yaml", lambda path: {})
    return config.typed_values(TrainConfig, config.parse_train_arguments(argv))


def test_both_readmes_have_the_same_commands_and_python():
    english, chinese = (commands(readme) for readme in READMES)
    assert english == chinese
    assert len(english) >= 20
    assert {words[1] for words in english if words[0] == "latexocr"} == {
        "data2csv", "synthesize", "csv2json", "doctor", "preview", "plan", "train", "evaluate", "score", "predict",
        "merge", "build", "info", "upload",
    }  # fmt: skip
    for language in ("python", "yaml"):
        assert blocks(READMES[0], language) == blocks(READMES[1], language)


def test_every_latexocr_command_parses(monkeypatch):
    import importlib

    from latexocr.cli import VERBS, parser_for

    seen = []
    for _, verb, *argv in (words for words in commands(READMES[0]) if words[0] == "latexocr"):
        module, function, _ = VERBS[verb]
        if verb in ("train", "plan"):
            train_options(argv, monkeypatch)
        else:
            parser_for(verb, getattr(importlib.import_module(module), function)).parse_args(argv)
        seen.append(verb)
    assert len(seen) == 30


def test_every_flag_in_the_text_exists():
    """`--swanlab_mode`, `predict --stream` and the like in running text belong to some command."""
    import importlib
    from dataclasses import fields

    from latexocr.cli import VERBS, parser_for
    from latexocr.train import TrainConfig

    known = {item.name for item in fields(TrainConfig)} | {"config", "help", "debug", "option"}
    for verb, (module, function, _) in VERBS.items():
        if function:
            parser = parser_for(verb, getattr(importlib.import_module(module), function))
            known |= {name.lstrip("-") for action in parser._actions for name in action.option_strings}
    launcher = {"host", "port", "config_file", "num_processes", "machine_rank", "main_process_ip"}
    benchmarks = {"batches", "size"}
    for readme in READMES:
        found = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text_of(readme)))
        assert len(found) > 20
        assert found - known - launcher - benchmarks == set(), readme


def recipes() -> list[tuple[str, str]]:
    """What a row of the table of recipes is about, and each of its code spans that holds flags."""
    section = text_of(READMES[0]).partition("\n## Recipes\n")[2].partition("\n## ")[0]
    rows = [line.removeprefix("| ").split(" | ")[:2] for line in section.splitlines() if line.startswith("| ")]
    return [(what, flags) for what, how in rows for flags in re.findall(r"`(--[^`]+)`", how)]


def test_the_table_of_recipes_is_found():
    assert len(recipes()) >= 15


@pytest.mark.parametrize(("what", "flags"), recipes())
def test_recipes_are_accepted_as_printed(what, flags, tiny_models, records, tmp_path):
    """Up to the loaded model, on a tiny base of the family."""
    from latexocr.config import parse_train_arguments
    from latexocr.train import TrainConfig, load_data, load_model

    if "load_in" in flags:
        pytest.importorskip("bitsandbytes")
    folder = tiny_models["ernie4_5_vl_moe" if "ERNIE" in what else "qwen2_vl"]
    base = str(untied(folder, tmp_path / "untied") if "untied" in what else folder)
    (tmp_path / "words.txt").write_text("\\\\frac\n")
    stands_for = {"REGEX": r".*\.q_proj", "FOLDER": base, "words.txt": str(tmp_path / "words.txt")}
    argv = ["--model_name_or_path", base, "--train_json", str(records["train"]), "--use_cpu", "--output_dir",
            str(tmp_path / "run"), *(stands_for.get(word, word) for word in shlex.split(flags))]  # fmt: skip
    on_cpu = pytest.raises(InputError, match="saves memory of a GPU") if "offload" in flags else nullcontext()
    with on_cpu:
        config = TrainConfig.from_dict(parse_train_arguments(argv))
        load_model(config, load_data(config))


def test_launch_commands_name_files_that_exist(monkeypatch):
    launched = [words for words in commands(READMES[0]) if words[0] in ("accelerate", "sbatch", "bash")]
    assert [words[0] for words in launched].count("accelerate") == 4
    for words in launched:
        for word in words:
            if word.startswith("scripts/"):
                assert (ROOT / word).is_file(), word
        if words[0] == "accelerate":
            train_options(words[words.index("scripts/train.py") + 1 :], monkeypatch)


def test_the_yaml_block_is_a_configuration():
    from latexocr.config import typed_values
    from latexocr.train import TrainConfig

    (block,) = blocks(READMES[0], "yaml")
    assert typed_values(TrainConfig, yaml.safe_load(block))["gradient_accumulation_steps"] == 1


def test_python_trains_and_reads(tiny, tmp_path, monkeypatch, capsys):
    (code,) = blocks(READMES[0], "python")
    lines = (SAMPLE / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [(str(SAMPLE / row["file_name"]), row["text"]) for row in map(json.loads, lines[:3])]
    (tmp_path / "formula.png").write_bytes((SAMPLE / "images/000002.png").read_bytes())
    (tmp_path / "tiny model").symlink_to(tiny)
    write_records(tmp_path / "train.json", rows[:2])
    write_records(tmp_path / "val.json", rows[2:])
    for name, stand_in in STANDS_FOR.items():
        assert code.count(f'"{name}"') == 1, name
        code = code.replace(f'"{name}"', repr(str(tmp_path / stand_in)))
    monkeypatch.setenv("SWANLAB_MODE", "disabled")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = re.escape(str(tmp_path / "run/adapter")) + r" ([01]\.\d+)\n"  # then what the model read: anything
    assert 0 <= float(re.search(printed, capsys.readouterr().out).group(1)) <= 1
    assert (tmp_path / "run/metrics.jsonl").is_file()


@pytest.mark.parametrize("readme", READMES)
def test_the_options_table_is_current(readme):
    script = options_script()
    assert text_of(readme) == script.with_table(readme, text_of(readme)), "run: python scripts/readme_options.py"
    assert script.table(readme).count("\n") > 30


def test_translations_are_of_texts_that_exist():
    from latexocr.config import option_table

    script = options_script()
    meanings = {meaning for _, _, meaning in option_table()}
    assert set(script.CHINESE) <= meanings, "these help texts are gone: translate the new ones"


def tree_paths(readme: str) -> list[str]:
    """The paths of the annotated tree: two spaces of indentation a level, a name, spaces, a remark."""
    paths, parents = [], []
    for line in blocks(readme, "text")[0].splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        parents = [*parents[: len(indent) // 2], name]
        paths.append("".join(parents))
    return paths


@pytest.mark.parametrize("readme", READMES)
def test_the_tree_is_the_repository(readme):
    paths = tree_paths(readme)
    assert len(paths) > 35 and len(set(paths)) == len(paths)
    for path in paths:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    package = ROOT / "latexocr"
    modules = {f"latexocr/{file.name}" for file in package.glob("*.py") if not file.name.startswith("__")}
    modules |= {f"latexocr/{file.parent.name}/" for file in package.glob("*/__init__.py")}
    assert modules <= set(paths), "modules that the tree lacks"


@pytest.mark.parametrize("readme", READMES)
def test_internal_links_lead_somewhere(readme):
    text = text_of(readme)
    anchors = {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
               for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}  # fmt: skip
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert len(links) > 8
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (ROOT / link).is_file(), link


def test_both_readmes_have_the_same_sections():
    levels = [re.findall(r"^(#+) ", text_of(readme), re.MULTILINE) for readme in READMES]
    assert levels[0] == levels[1]
    for mark in ("```", "](", "\n| ", "\n- "):
        assert text_of(READMES[0]).count(mark) == text_of(READMES[1]).count(mark), mark
