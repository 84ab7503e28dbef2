"""report.html: what stands in it, that nothing a model writes can act in it, and what it does in a browser."""

from __future__ import annotations

import json
import random
import re
import time

import pytest
from conftest import SAMPLE
from PIL import Image

from latexocr.evaluation import Evaluation
from latexocr.metrics.slices import describe, members
from latexocr.metrics.tokens import tokenize
from latexocr.report import difference, most_confused, write_report

HOSTILE = r'</script><script>alert(1)</script><img src=x onerror="alert(2)"> <!-- ${alert(3)} ]]> \u003c'


def evaluation(pairs, *, engine=None, **options) -> Evaluation:
    """An evaluation of (prediction, reference) pairs, with values that a reader can check by hand."""
    rows = []
    for number, (prediction, reference) in enumerate(pairs, 1):
        errors = len(difference(prediction or "", reference).confused)
        values = {"exact_match": int(not errors), "token_errors": errors, "edit_distance": errors / 10, "runaway": 0}
        texts = {"id": f"identity_{number}", "prediction": prediction, "reference": reference}
        rows.append({**texts, **values, **describe(tokenize(reference))})
    slices = [
        {"by": by, "slice": name, "metric": metric, "value": value, "low": low, "high": high, "num_rows": len(numbers)}
        for (by, name), numbers in members(rows).items()
        for metric, value, low, high in (("exact_match", 0.5, 0.25, 0.75), ("bleu", 80.0, 60.0, 90.0))
    ]
    metrics = {
        "exact_match": 0.5,
        "exact_match_low": 0.25,
        "exact_match_high": 0.75,
        "bleu": 81.25,
        "num_rows": len(rows),
    }
    return Evaluation(metrics, rows, slices, engine, **options)


def data_of(path) -> dict:
    (found,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8")
    )
    return json.loads(found)


def test_difference_is_of_canonical_tokens():
    assert difference(r"x^2_i", r"x _ { i } ^ { 2 }").pieces == [
        (True, *[["x", "_", "{", "i", "}", "^", "{", "2", "}"]] * 2)
    ]
    found = difference("a + b", "a - b + c")
    assert found.pieces == [
        (True, ["a"], ["a"]),
        (False, [], ["-", "b"]),
        (True, ["+"], ["+"]),
        (False, ["b"], ["c"]),
    ]
    assert found.confused == [("-", ""), ("b", ""), ("c", "b")]


def test_confusions_count_rows_and_leave_braces_out():
    runaway = [("", "3")] * 1000
    assert most_confused([runaway, [("x", "y")], [("x", "y"), ("{", ""), ("x", "}")]]) == [
        (("x", "y"), 2),
        (("", "3"), 1),
    ]


def test_rows_stand_worst_first_with_their_slices_and_confusions(tmp_path):
    pairs = [("x", "x"), ("y", "x"), (r"\phi + 1", r"\frac { 1 } { 2 }"), (None, "z")]
    write_report(evaluation(pairs), tmp_path / "report.html")
    data = data_of(tmp_path / "report.html")
    rows = data["rows"]
    assert rows["id"] == ["identity_3", "identity_2", "identity_4", "identity_1"]
    assert rows["prediction"][2] == "" and rows["pieces"][2] == [[0, "", "z"]]
    assert rows["pieces"][3] == [[1, "x"]]
    assert data["errors"]["without"] == 1 and data["errors"]["buckets"][0] == {
        "name": "1",
        "from": 1,
        "to": 1,
        "num_rows": 2,
    }
    assert ["x", "y", 1] in data["confusions"]
    assert [data["confusions"][number] for number in rows["confusions"][1]] == [["x", "y", 1]]
    (fraction,) = [number for number, entry in enumerate(data["slices"]) if entry["slice"] == "fraction"]
    assert [fraction in places for places in rows["slices"]] == [True, False, False, False]
    assert data["headline"][0]["value"] == 0.5 and data["headline"][0]["from"] == 0.25
    assert data["headline"][1]["from"] is None  # BLEU came without an interval
    assert "picture" not in rows and "prediction_drawn" not in rows


def test_rows_of_rare_sources_are_in_the_slice_of_all_others(tmp_path):
    rows = [{**row, "source": f"{number:02}"} for number, row in enumerate(evaluation([("x", "y")] * 22).rows)]
    rows += rows[:20]
    slices = [
        {
            "by": by,
            "slice": name,
            "metric": "exact_match",
            "value": 0.0,
            "low": 0.0,
            "high": 0.0,
            "num_rows": len(found),
        }
        for (by, name), found in members(rows).items()
    ]
    write_report(Evaluation({"num_rows": 42}, rows, slices, None), tmp_path / "report.html")
    found = data_of(tmp_path / "report.html")
    (place,) = (number for number, one in enumerate(found["slices"]) if one["slice"] == "all others")
    assert found["slices"][place]["num_rows"] == 2
    assert sum(place in of_row for of_row in found["rows"]["slices"]) == 2


def test_a_page_is_one_file_without_addresses_and_with_one_script(tmp_path):
    write_report(evaluation([(HOSTILE, HOSTILE), ("\ud800", "x")]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2 and page.count("</script>") == 2  # data and ours
    assert "<img" not in page and "alert(1)</script>" not in page
    assert set(re.findall(r"https?://[^\"'\s]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert "default-src 'none'" in page
    assert data_of(tmp_path / "report.html")["rows"]["prediction"].count(HOSTILE) == 1


def test_photographs_share_a_budget_and_equal_ones_are_kept_once(tmp_path):
    random.seed(0)
    noise = Image.frombytes("RGB", (1200, 800), random.randbytes(1200 * 800 * 3))
    noise.save(tmp_path / "noise.png")
    found = evaluation([("x", "x"), ("y", "x"), ("z", "x"), ("a", "x")])
    files = [tmp_path / "noise.png", SAMPLE / "images/000000.png", SAMPLE / "images/000000.png", tmp_path / "gone.png"]
    rows = [{**row, "image_path": str(file)} for row, file in zip(found.rows, files, strict=True)]
    write_report(Evaluation(found.metrics, rows, []), tmp_path / "report.html")
    places = data_of(tmp_path / "report.html")["rows"]
    by_id = dict(zip(places["id"], places["picture"], strict=True))
    assert by_id["identity_4"] is None and by_id["identity_2"] == by_id["identity_3"] != by_id["identity_1"]
    assert (tmp_path / "noise.png").stat().st_size > 2e6 > 0.4e6 > (tmp_path / "report.html").stat().st_size


def test_each_formula_is_drawn_once_and_cut_where_it_never_ends(tmp_path):
    pairs = [("x", "x"), ("x", "y"), (r"\frac {", "y"), ("3" * 5000, "y")]
    write_report(evaluation(pairs, engine="latex"), tmp_path / "report.html")
    rows = data_of(tmp_path / "report.html")["rows"]
    drawn = {(row, side): rows[f"{side}_drawn"][rows["id"].index(f"identity_{row}")] for row in (1, 2, 3, 4)
             for side in ("prediction", "reference")}  # fmt: skip
    assert drawn[1, "prediction"] == drawn[1, "reference"] == drawn[2, "prediction"] != drawn[2, "reference"]
    assert drawn[3, "prediction"] is None
    assert (tmp_path / "report.html").stat().st_size < 200_000


# --- in a browser -----------------------------------------------------------------------------------------

FORMULAS = [r"\frac { a } { b }", r"x ^ { 2 }", r"\sqrt { y + 1 }", r"\alpha + \beta", r"\int x d x"]


@pytest.fixture(scope="module")
def page(browser):
    """A page that notes script errors and requests; `file:` of the report itself is the only one allowed."""
    problems: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on(
        "request", lambda r: None if r.url.startswith(("file:", "data:")) else problems.append(f"request: {r.url}")
    )
    yield page
    assert not problems, problems


def shown_ids(page) -> list[str]:
    return page.locator(".row > header > b").all_inner_texts()


def expect_rows(page, number: int) -> None:
    """Searching waits for a pause in typing. (`wait_for_function` evaluates text, which the page's policy forbids.)"""
    from playwright.sync_api import expect

    expect(page.locator(".row")).to_have_count(number)


def open_report(page, path, pairs, **options) -> None:
    write_report(evaluation(pairs, **options), path)
    page.goto("about:blank")
    page.goto(path.as_uri())


def test_filters_search_and_sort(tmp_path, page):
    pairs = [(text.replace("+", "-"), text) for text in FORMULAS]
    open_report(page, tmp_path / "report.html", pairs)
    assert shown_ids(page) == [f"identity_{number}" for number in (3, 4, 1, 2, 5)]
    page.select_option("#choose-show", "wrong")
    assert shown_ids(page) == ["identity_3", "identity_4"]
    page.get_by_role("button", name="+ read as - 2").click()
    page.get_by_role("searchbox").fill(r"\alpha+")  # blanks do not count
    expect_rows(page, 1)
    assert shown_ids(page) == ["identity_4"]
    assert "search=" in page.url and "show=wrong" in page.url
    page.reload()
    assert shown_ids(page) == ["identity_4"]
    page.keyboard.press("Escape")
    assert len(shown_ids(page)) == 5
    page.get_by_role("button", name=re.compile("Structure fraction: exact match 50.0%, 25.0% to 75.0%, 1 row")).click()
    assert shown_ids(page) == ["identity_1"]
    page.keyboard.press("Escape")
    page.select_option("#choose-sort", "best")
    assert shown_ids(page)[-1] == "identity_3"
    page.select_option("#choose-metric", "bleu")
    assert page.get_by_text("BLEU by length in tokens").count() == 1


def test_everything_is_done_by_keys(tmp_path, page):
    open_report(page, tmp_path / "report.html", [("x", "y"), *[("x", "x")] * 45])
    focused = "document.activeElement.dataset.row"
    page.keyboard.press("j")
    assert page.evaluate(focused) == "0"
    page.keyboard.press("Enter")
    assert page.locator(".more pre").all_inner_texts() == ["x", "y"]
    page.keyboard.press("Enter")
    assert page.locator(".more").count() == 0
    page.keyboard.press("j")
    assert page.evaluate(focused) == "1"
    page.keyboard.press("n")
    assert "21–40 of 46" in page.inner_text(".pager")
    page.keyboard.press("j")
    page.keyboard.press("k")  # over the edge of the page
    assert page.evaluate(focused) == "19" and "1–20 of 46" in page.inner_text(".pager")
    page.keyboard.press("/")
    page.keyboard.type("identity_1")
    expect_rows(page, 11)
    page.keyboard.press("Escape")
    expect_rows(page, 20)
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_what_a_model_wrote_is_text_and_nothing_else(tmp_path, page):
    open_report(page, tmp_path / "report.html", [(HOSTILE, "x"), ("y", HOSTILE)])
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    assert page.locator(".more pre").first.inner_text().strip() in (HOSTILE, "y")
    assert page.locator("main script, main img").count() == 0
    page.wait_for_timeout(100)  # an alert would be noted by now


def test_pictures_are_seen(tmp_path, page):
    found = evaluation([("x", "x"), (r"\frac {", "y")], engine="latex", output_dir=tmp_path / "my run")
    rows = [{**row, "image_path": str(SAMPLE / "images/000000.png")} for row in found.rows]
    path = tmp_path / "report.html"
    write_report(Evaluation(found.metrics, rows, found.slices, "latex", None, tmp_path / "my run"), path)
    page.goto(path.as_uri())
    expect_rows(page, 2)
    page.wait_for_timeout(200)
    assert page.evaluate("[...document.images].map(image => image.naturalWidth > 4)") == [True] * 5
    assert page.get_by_text("does not render", exact=True).count() == 1
    assert page.inner_text("h1") == page.title() == "my run"


def test_a_comparison_is_shown(tmp_path, page):
    entry = {
        "metric": "exact_match",
        "a": 0.5,
        "b": 0.25,
        "difference": 0.25,
        "low": 0.125,
        "high": 0.375,
        "won": 3,
        "lost": 1,
    }
    open_report(page, tmp_path / "report.html", [("x", "x")], comparison=[entry])
    cells = page.locator("section[aria-label=Comparison] td").all_inner_texts()
    assert cells == ["Exact match", "0.5000", "0.2500", "+0.2500", "+0.1250", "+0.3750", "", "3", "1"]


def test_confidence_is_shown(tmp_path, page):
    bins = [{"num_rows": 3, "low": 0.1, "high": 0.5, "confidence": 0.25, "right": 0.5},
            {"num_rows": 2, "low": 0.75, "high": 1.0, "confidence": 0.9, "right": 1.0}]  # fmt: skip
    found = evaluation([("x", "x"), ("y", "x")], reliability=bins)
    found.metrics.update(calibration_error=0.19, min_confidence=0.3, wrong_found=0.8)
    for row, confidence in zip(found.rows, (0.9, 0.25), strict=True):
        row["confidence"] = confidence
    write_report(found, tmp_path / "report.html")
    page.goto((tmp_path / "report.html").as_uri())
    section = page.locator("section[aria-label=Confidence]")
    assert section.locator("td").all_inner_texts() == [
        "3", "10.0%", "50.0%", "25.0%", "50.0%", "2", "75.0%", "100%", "90.0%", "100%",
    ]  # fmt: skip
    assert "the mean distance is 19.0%. A warning below 30.0% strikes 5% of the right" in section.inner_text()
    assert "and finds 80.0% of the wrong ones" in section.inner_text()
    page.select_option("#choose-sort", "sure")
    assert shown_ids(page) == ["identity_1", "identity_2"]
    assert "confidence 25.0%" in page.locator(".row").last.inner_text()


def test_rows_that_a_comparison_won_and_lost(tmp_path, page):
    found = evaluation([("x", "x"), ("y", "x"), ("z", "z")], engine="latex")
    for row, answer, gain in zip(found.rows, (r"\alpha", "x", "z"), (1.0, -1.0, 0.0), strict=True):
        row.update(baseline_prediction=answer, gain=gain)
    write_report(found, tmp_path / "report.html")
    page.goto((tmp_path / "report.html").as_uri())
    page.select_option("#choose-show", "won")
    assert shown_ids(page) == ["identity_1"]
    assert "better than the baseline by 100%" in page.locator(".row").inner_text()
    assert page.locator(".row figcaption").all_inner_texts() == ["Prediction", "Reference", "Baseline"]
    page.select_option("#choose-show", "lost")
    assert shown_ids(page) == ["identity_2"]
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    assert page.locator(".more pre").all_inner_texts() == ["y", "x", "x"]
    page.select_option("#choose-show", "all")
    page.select_option("#choose-sort", "loss")
    assert shown_ids(page) == ["identity_2", "identity_3", "identity_1"]


@pytest.mark.slow
def test_ten_thousand_rows_open_at_once(tmp_path, page):
    random.seed(0)
    tokens = [*"xyzabc123+-=", r"\alpha", r"\beta", r"\sum"]
    texts = [" ".join(random.choices(tokens, k=40)) for _ in range(10_001)]
    pairs = [(text.replace("1", "2"), text) for text in texts]
    write_report(evaluation(pairs), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 15e6
    started = time.monotonic()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator(".row").count() == 20
    assert time.monotonic() - started < 5
    assert "The worst 10,000 of 10,001 rows are here." in page.inner_text("#rows")
    milliseconds = page.evaluate(
        "() => { const t = performance.now(); change({show: 'wrong', search: 'x'}); return performance.now() - t }"
    )
    assert milliseconds < 1000
