"""The local dashboard in a real browser: what a researcher sees equals metrics.jsonl.

Needs `swanlab[dashboard]`, playwright and a Chromium (`apt-get install chromium`, or CHROMIUM=/path/to/it).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import CHROMIUM_FLAGS, chromium
from PIL import Image, ImageDraw
from test_tracking import tiny_trainer
from transformers import TrainerCallback

from latexocr.metrics_file import MetricsFile, read_metrics
from latexocr.tracking import Sample, dashboard_command, track

pytestmark = pytest.mark.slow

PARTS = {"swanlab[dashboard]": "swanboard", "playwright": "playwright"}  # pip name: module
FORMULAS = {"identity_1": r"\frac{a}{b}", "identity_2": "x^{2}"}
CHARTS = ["train/loss", "train/grad_norm", "train/learning_rate", "eval/loss", "summary/loss"]
# Canvases on which at least 200 pixels are not transparent.
COUNT_INKED = """() => [...document.querySelectorAll('canvas')].filter(canvas => {
    const context = canvas.getContext('2d')
    if (!context || !canvas.width) return false
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data
    let inked = 0
    for (let i = 3; i < pixels.length; i += 4) if (pixels[i]) inked++
    return inked > 200
}).length"""


class Board(TrainerCallback):
    """Two pictures at every validation; the second prediction is wrong and names its step."""

    def __init__(self, tracker) -> None:
        self.tracker = tracker

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        samples = []
        for sample_id, latex in FORMULAS.items():
            picture = Image.new("RGB", (200, 50), "white")
            ImageDraw.Draw(picture).text((10, 15), latex, fill="black")
            prediction = latex if sample_id == "identity_1" else f"x^{{{state.global_step}}}"
            samples.append(Sample(picture, prediction, latex, sample_id))
        self.tracker.log_samples(samples, state.global_step)


def train(output_dir: Path, log_dir: Path, end=None) -> None:
    config = {"model": {"name": "line", "targets": ["linear"]}, "learning_rate": 0.1, "seed": None}
    with track(name=output_dir.name, log_dir=log_dir, config=config, mode="local") as tracker:
        tiny_trainer(output_dir, callbacks=[MetricsFile(), tracker.callback(), Board(tracker)], max_steps=12).train()
        if end:
            end(tracker)


def crash(tracker) -> None:
    raise RuntimeError("CUDA out of memory")


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """Three trainings in one log folder: finished, stopped by a signal, crashed."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "finished", folder / "swanlog")
    train(folder / "stopped", folder / "swanlog", lambda tracker: tracker.finish_as("aborted", "SIGTERM at step 12"))
    with pytest.raises(RuntimeError):
        train(folder / "crashed", folder / "swanlog", crash)
    return folder


@pytest.fixture(scope="module")
def dashboard(output) -> Iterator[str]:
    """The address of a dashboard started with the very line that `dashboard_command` prints."""
    line = dashboard_command(output / "swanlog")
    program = Path(sys.executable).with_name("swanlab")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SWANLAB_")}
    process = subprocess.Popen(
        [str(program), *line.split()[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
    )
    try:
        address = None
        for printed in process.stdout:  # another port when 5092 is taken: read it
            found = re.search(r"http://127\.0\.0\.1:\d+", printed)
            if found:
                address = found.group(0)
                break
        assert address, "swanlab watch printed no address"
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/v1/project", timeout=2).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def page(dashboard):
    """A page of headless Chromium that notes script errors, failed requests and requests to other hosts."""
    from playwright.sync_api import sync_playwright

    problems: list[str] = []

    def check_response(response) -> None:
        if response.status >= 400:
            problems.append(f"{response.status} {response.url}")

    def check_request(request) -> None:
        if not request.url.startswith((dashboard, "data:", "blob:")):
            problems.append(f"request to another host: {request.url}")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": 2200})
        page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
        page.on("response", check_response)
        page.on("request", check_request)
        yield page
        browser.close()
    assert not problems, problems


@pytest.fixture(scope="module", autouse=True)
def everything_is_there() -> None:
    """Skip where a part is missing; on CI a missing part is a failure, so that nobody loses this test unseen."""
    missing = [f"pip install {name!r}" for name, module in PARTS.items() if find_spec(module) is None]
    if not chromium():
        missing.append("apt-get install chromium")
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs: {'; '.join(missing)}")


def api(dashboard: str, path: str) -> dict:
    with urllib.request.urlopen(f"{dashboard}/api/v1/{path}", timeout=10) as response:
        answer = json.load(response)
    assert answer["code"] == 0, answer
    return answer["data"]


def run_ids(dashboard: str) -> dict[str, int]:
    return {run["name"]: run["id"] for run in api(dashboard, "project")["experiments"]}


def series(rows: list[dict], name: str) -> dict[int, float]:
    return {int(row["step"]): row[name] for row in rows if name in row}


def test_every_number_equals_metrics_jsonl(output, dashboard):
    ids = run_ids(dashboard)
    assert set(ids) == {"finished", "stopped", "crashed"}
    num_compared = 0
    for run, run_id in ids.items():
        rows = read_metrics(output / run)
        for chart in ("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"):
            group, _, name = chart.partition("/")
            expected = series(rows, name if group == "train" else f"{group}_{name}")
            shown = api(dashboard, f"experiment/{run_id}/tag/{quote(chart, safe='')}")["list"]
            # The protocol between SwanLab and its dashboard may hold 32-bit floats; no more may be lost.
            assert {point["index"]: point["data"] for point in shown} == pytest.approx(expected, rel=1e-6)
            num_compared += len(expected)
    assert num_compared == 3 * (12 + 12 + 12 + 4)


def test_the_tables_page_shows_states_settings_and_last_values_in_their_columns(output, dashboard, page):
    page.goto(f"{dashboard}/")
    page.get_by_text("Experiment Lists").wait_for()
    page.get_by_text("samples/text", exact=True).wait_for()
    page.wait_for_timeout(1000)
    text = page.inner_text("body")
    assert "[object Object]" not in text and "TypeError" not in text
    for name in ("model.name", "model.targets", "learning_rate", '["linear"]', "None"):
        assert name in text
    # The last value of each metric stands under its own name (shifted by one without our fix).
    for run, row in table_rows(text, runs=run_ids(dashboard)).items():
        rows = read_metrics(output / run)
        assert row["State"] == ("Finished" if run == "finished" else "Crashed")
        for column, expected in {"train/loss": rows[-3]["loss"], "eval/loss": rows[-2]["eval_loss"]}.items():
            assert float(row[column]) == pytest.approx(expected, rel=1e-3), column
        assert row["model.targets"] == '["linear"]'
    screenshot(page, "tables")


def test_charts_pictures_and_text_are_on_the_page(output, dashboard, page):
    page.goto(f"{dashboard}/experiment/{run_ids(dashboard)['finished']}/chart")
    page.get_by_text("samples/text", exact=True).wait_for()
    for chart in CHARTS:
        assert page.get_by_text(chart, exact=True).count() == 1, chart
    page.wait_for_function(f"({COUNT_INKED})() >= {len(CHARTS)}", timeout=20_000)
    page.wait_for_function("[...document.images].filter(i => i.naturalWidth == 200).length == 2", timeout=20_000)
    text = page.inner_text("body")
    assert r"prediction \frac{a}{b} | reference \frac{a}{b}" in text
    assert "prediction x^{12} | reference x^{2}" in text
    assert r"identity_1: \frac{a}{b}" in text and "identity_2: x^{2}\nx^{12}" in text
    screenshot(page, "charts")


@pytest.mark.parametrize(
    ("run", "state", "reason"),
    [
        ("finished", "Finished", None),
        # The local dashboard has no word for "aborted"; the reason is in its logs.
        ("stopped", "Crashed", "aborted: SIGTERM at step 12"),
        ("crashed", "Crashed", "RuntimeError: CUDA out of memory"),
    ],
)
def test_the_state_of_a_run_and_its_reason(dashboard, page, run, state, reason):
    run_id = run_ids(dashboard)[run]
    page.goto(f"{dashboard}/experiment/{run_id}/chart")
    page.get_by_text("samples/text", exact=True).wait_for()
    assert page.get_by_text(state, exact=True).count() == 1
    assert page.get_by_text("Running", exact=True).count() == 0
    if reason:
        page.goto(f"{dashboard}/experiment/{run_id}/log")
        page.get_by_text(reason).wait_for()
    screenshot(page, f"state-{run}")


def table_rows(text: str, runs: dict[str, int]) -> dict[str, dict[str, str]]:
    """Run -> column -> cell of the table, from the page's visible text: headers, then a line a cell."""
    lines = [line for line in text[text.index("Export to CSV") :].splitlines()[1:] if line.strip()]
    width = next(i for i, line in enumerate(lines) if line in runs)
    headers, cells = lines[:width], lines[width:]
    rows = [dict(zip(headers, cells[i : i + width], strict=True)) for i in range(0, len(cells), width)]
    assert [row["Name"] for row in rows] == sorted(runs, key=runs.get, reverse=True)
    return {row["Name"]: row for row in rows}


def screenshot(page, name: str) -> None:
    """A picture for people, where SCREENSHOTS names a folder for it."""
    if os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / f"{name}.png")
