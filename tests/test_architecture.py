"""The shape of the house: imports point one way, importing does nothing, versions are where they should be."""

from __future__ import annotations

import ast
import subprocess
import sys

from conftest import ROOT

# From the ground up: a module imports only from rows above its own.
LAYERS = (
    {"latexocr", "errors", "nf4"},
    {"checkpoint", "sandbox", "dvi", "tracking_worker", "evaluation", "styles", "workers", "quantization", "sharding"},
    {"pictures", "likeness", "sources", "formats", "config", "console", "stopping", "shapes"},
    {"averaging", "metrics", "metrics_file", "kernels", "graphs", "memory", "augment"},
    {"images", "mathtext", "records", "data2csv", "csv2json", "tracking", "families", "vary", "grammar", "video"},
    {"render", "contract", "attention", "lora", "dialects", "optimizers", "new_tokens", "host_embedding"},
    {"experts"},
    {"layers", "page", "rasterize", "tower"},
    {"modeling", "preprocess", "findings", "synthesize", "info"},
    {"card", "adapters", "placeholders", "dataset"},
    {"upload", "collate", "streaming", "train_config", "build", "loss", "sampling", "vision_cache", "report"},
    {"decoding", "run_folder", "initialisation"},
    {"generate"},
    {"predict"},
    {"evaluate", "merge"},
    {"trainer"},
    {"announcement"},
    {"train"},
    {"preview", "plan", "doctor"},
    {"cli"},
    {"__main__"},
)


def layer_of(module: str) -> int:
    (found,) = [number for number, layer in enumerate(LAYERS) if module in layer]
    return found


def imported(path) -> set[str]:
    """First-level modules of this package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "latexocr":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("latexocr.")}
    return names - {"__version__"}


def test_imports_point_one_way():
    files = sorted((ROOT / "latexocr").rglob("*.py"))
    assert len(files) > 25
    for path in files:
        parts = path.relative_to(ROOT / "latexocr").with_suffix("").parts
        module = "latexocr" if parts == ("__init__",) else parts[0]
        for other in imported(path) - {module}:
            assert layer_of(other) < layer_of(module), f"{path.name} imports {other}"


def test_nothing_imports_scripts():
    for path in (ROOT / "latexocr").rglob("*.py"):
        assert "scripts" not in {name.split(".")[0] for name in imported(path)}, path
        assert "import scripts" not in path.read_text(encoding="utf-8")


def test_importing_is_light_and_does_nothing():
    """`latexocr` and the stages that need no model import neither torch nor transformers, and say nothing."""
    code = (
        "import sys, latexocr.cli, latexocr.config, latexocr.data2csv, latexocr.csv2json, latexocr.evaluate, "
        "latexocr.predict, latexocr.merge, latexocr.preview, latexocr.build, latexocr.metrics, latexocr.synthesize, "
        "latexocr.info, latexocr.card, latexocr.upload\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'pyarrow', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n" and done.stderr == ""


def test_no_file_is_large():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    sizes = {name: (ROOT / name).stat().st_size for name in tracked if name and (ROOT / name).is_file()}
    assert sizes and max(sizes.values()) < 25e6
