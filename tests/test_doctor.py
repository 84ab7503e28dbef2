"""The data doctor: every check on rows that a person can see are wrong, and the reports."""

from __future__ import annotations

import io
import json
import re

import pytest
from conftest import SAMPLE, write_records
from PIL import Image, ImageDraw

from latexocr.cli import main
from latexocr.doctor import doctor, histogram
from latexocr.errors import InputError
from latexocr.likeness import alike, look, near_pairs
from latexocr.pictures import flatten
from latexocr.render import engine_available

ROWS = [json.loads(line) for line in (SAMPLE / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def picture(number: int) -> Image.Image:
    return flatten(Image.open(SAMPLE / ROWS[number]["file_name"]))


def as_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return flatten(Image.open(buffer))


def shifted(image: Image.Image) -> Image.Image:
    paper = Image.new("L", (image.width + 20, image.height + 15), 255)
    paper.paste(image, (11, 5))
    return paper


def larger(image: Image.Image) -> Image.Image:
    return image.resize((round(image.width * 1.4), round(image.height * 1.4)), Image.Resampling.BICUBIC)


def pale(image: Image.Image) -> Image.Image:
    return image.point(lambda level: 60 + level * 180 // 255)


def found(diagnosis, name: str) -> list[list[str]]:
    """The rows of each case, as they are named before the bracket."""
    return [
        [diagnosis.rows[row].where.split(" (")[0] for row in case.rows] for case in diagnosis.findings.get(name, [])
    ]


# --- likeness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [as_jpeg, shifted, larger, pale])
def test_a_changed_copy_is_nearly_the_same_picture(change):
    originals = [picture(number) for number in range(40)]
    copies = [change(image) for image in originals]
    looks = [look(image) for image in originals + copies]
    proposed = set(near_pairs(looks))
    confirmed = [
        (number, number + 40) in proposed and alike(originals[number], copies[number]) for number in range(40)
    ]
    assert sum(confirmed) >= 37


def test_other_formulas_are_other_pictures():
    pictures = [picture(number) for number in range(200)]
    pairs = near_pairs([look(image) for image in pictures])
    assert [(a, b) for a, b in pairs if alike(pictures[a], pictures[b])] == []


def test_equal_pixels_are_equal_in_any_format(tmp_path):
    image = picture(0)
    image.save(tmp_path / "copy.bmp")
    assert look(flatten(Image.open(tmp_path / "copy.bmp"))) == look(image)
    assert look(Image.new("L", (50, 20), 255)).box is None


# --- findings ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    """Training and validation data with one case of everything, around forty sound rows."""
    folder = tmp_path_factory.mktemp("sick")
    images = {
        "blank.png": Image.new("L", (60, 30), 255),
        "huge.png": larger(larger(larger(larger(picture(41))))).resize((3000, 2400)),
        "two.png": picture(42),
        "two_again.png": picture(42),
        "near.png": shifted(picture(2)),
        "leaked.png": picture(3),
        "shape.png": picture(44).resize((600, 20)),
    }
    for name, image in images.items():
        image.save(folder / name)
    (folder / "corrupt.png").write_bytes((SAMPLE / ROWS[0]["file_name"]).read_bytes()[:60])
    sound = [(str(SAMPLE / row["file_name"]), row["text"]) for row in ROWS[:40]]
    sick = [
        ("blank.png", "a"), ("corrupt.png", "b"), ("absent.png", "c"), ("two.png", "x + 1"),
        ("two_again.png", "x + 2"),
        (sound[5][0], r"\frac { 1"), ("near.png", sound[2][1]), ("shape.png", r"\frac { \frac { a } { b } } { c }"),
        ("huge.png", r"\alphaa"),
    ]  # fmt: skip
    spellings = [(str(SAMPLE / ROWS[number]["file_name"]), text) for number, text in
                 ((50, "q ^ { 2 } _ { k }"), (51, "q _ k ^ 2"), (52, r"q _ k ^ 2 \,"), (53, "q _ k ^ 2"))]  # fmt: skip
    write_records(folder / "train.json", [*sound, *sick, *spellings])
    write_records(
        folder / "val.json", [("leaked.png", ROWS[3]["text"]), (str(SAMPLE / ROWS[60]["file_name"]), "q_{k}^2")]
    )
    return folder


@pytest.fixture(scope="module")
def diagnosis(sick):
    return doctor(
        sick / "train.json", val_data=sick / "val.json", html=sick / "doctor.html", json=sick / "doctor.json"
    )


def test_pictures(diagnosis):
    assert found(diagnosis, "blank_pictures") == [["train.json record 40"]]
    assert found(diagnosis, "unreadable_pictures") == [["train.json record 41"], ["train.json record 42"]]
    whys = [case.why for case in diagnosis.findings["unreadable_pictures"]]
    assert whys[0].startswith("undecodable image") and whys[1].startswith("no such file")
    assert found(diagnosis, "shrunk") == [["train.json record 48"]]
    assert found(diagnosis, "odd_sizes")[0] == ["train.json record 48"]


def test_pairs_of_pictures_and_texts(diagnosis):
    contradictions = found(diagnosis, "two_texts")
    assert ["train.json record 43", "train.json record 44"] in contradictions
    assert ["train.json record 5", "train.json record 45"] in contradictions
    assert len(contradictions) == 2
    assert found(diagnosis, "near_duplicates") == [["train.json record 2", "train.json record 46"]]


def test_leakage(diagnosis):
    assert found(diagnosis, "leaked_pictures") == [["val.json record 0", "train.json record 3"]]
    leaked = found(diagnosis, "leaked_texts")
    assert ["val.json record 0", "train.json record 3"] in leaked and [
        "val.json record 1",
        "train.json record 49",
    ] in leaked
    assert len(leaked) == 2 == diagnosis.num_rows("leaked_texts")  # validation rows are counted


def test_texts(diagnosis):
    assert found(diagnosis, "unparsed_texts") == [["train.json record 45"]]
    # one formula: q ^ { 2 } _ { k } once, q _ k ^ 2 twice, q_{k}^2 once; the thin space stands apart
    (spelled,) = found(diagnosis, "spellings")
    assert spelled[0] == "train.json record 50" and len(spelled) == 4 and "train.json record 51" not in spelled
    (spaced,) = found(diagnosis, "spacings")
    assert len(spaced) == 5


@pytest.mark.skipif(engine_available() != "latex", reason="needs the programs latex and dvipng")
def test_what_needs_latex(diagnosis):
    refused = diagnosis.findings["refused_texts"]
    assert found(diagnosis, "refused_texts") == [["train.json record 48"]]
    assert r"\alphaa" in refused[0].why
    assert ["train.json record 47"] in found(diagnosis, "misshapen")


def test_reports(sick, diagnosis):
    text = str(diagnosis)
    assert "problem: one picture, two texts: 4 rows" in text and "1 x x + 1" in text
    assert re.search(r"largest +3000x2400 -> \d+x\d+", text)
    written = json.loads((sick / "doctor.json").read_text(encoding="utf-8"))
    assert written["num_rows"] == 55
    leaks = next(finding for finding in written["findings"] if finding["name"] == "leaked_pictures")
    assert [row["where"].split(" (")[0] for row in leaks["cases"][0]["rows"]] == [
        "val.json record 0",
        "train.json record 3",
    ]
    assert (sick / "doctor.html").stat().st_size < 300_000


def test_the_page_shows_the_findings(sick, diagnosis, browser):
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.goto((sick / "doctor.html").as_uri())
    assert page.locator("details.finding").count() == len(diagnosis.findings)
    page.get_by_text("One picture, two texts").click()
    cards = page.locator("details[open] .sample")
    assert cards.count() == 4
    page.wait_for_timeout(200)
    assert (
        page.evaluate("[...document.querySelectorAll('details[open] .photo')].map(i => i.naturalWidth > 10)")
        == [True] * 4
    )
    assert page.locator("section[aria-label=Sizes] svg").count() == 4
    assert problems == []


def test_a_sound_data_set_has_no_problems():
    diagnosis = doctor(SAMPLE)
    assert len(diagnosis.rows) == diagnosis.num_formulas == 400
    # the price of finding scaled copies: \Psi ^ { 2 } and \Psi ^ { 3 } differ in a few pixels
    assert found(diagnosis, "nearly_two_texts") == [["sample row 30", "sample row 353"]]
    assert set(diagnosis.findings) <= {"nearly_two_texts", "enlarged"}
    assert diagnosis.sizes()["LaTeX tokens"] == {"least": 1, "5%": 2, "half": 9, "95%": 22, "99%": 25, "most": 25}


def test_parquet_is_read_as_it_is(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = [(SAMPLE / row["file_name"]).read_bytes() for row in ROWS[:3]]
    images = [
        {"bytes": each, "path": f"{number}.png"} for number, each in enumerate([data[0], data[0], b"no picture"])
    ]
    pq.write_table(pa.table({"image": images, "text": ["x", "y", None]}), tmp_path / "rows.parquet")
    diagnosis = doctor(tmp_path / "rows.parquet")
    assert found(diagnosis, "two_texts") == [["rows.parquet row 0", "rows.parquet row 1"]]
    assert found(diagnosis, "unreadable_pictures") == found(diagnosis, "blank_texts") == [["rows.parquet row 2"]]


def test_a_model_gives_tokenizer_and_image_options(tiny, records):
    diagnosis = doctor(records["val"], model=str(tiny))
    assert len(diagnosis.lengths["model's tokens"]) == 7


def test_many_copies_of_a_picture_are_not_compared_each_with_each(tmp_path, monkeypatch):
    copies = []
    for number in range(60):
        copy = picture(0).convert("L")
        copy.putpixel((0, 0), 200 + number // 2)
        copy.putpixel((1, 0), 200 + number % 2)
        copy.save(tmp_path / f"{number}.png")
        copies.append((f"{number}.png", "x"))
    calls = []
    monkeypatch.setattr("latexocr.findings.alike", lambda *pair: calls.append(pair) or alike(*pair))
    (case,) = doctor(write_records(tmp_path / "train.json", copies)).findings["near_duplicates"]
    assert len(case.rows) == 60 and len(calls) == 59


@pytest.mark.parametrize(("name", "status"), [("a.png", 0), ("gone.png", 1)])
def test_problems_are_the_exit_status(tmp_path, capsys, name, status):
    picture(0).save(tmp_path / "a.png")
    assert main(["doctor", "--data", str(write_records(tmp_path / "train.json", [(name, "x")]))]) == status
    assert ("problem: pictures that cannot be read" in capsys.readouterr().out) == bool(status)


def test_texts_cannot_steer_the_terminal(tmp_path):
    picture(0).save(tmp_path / "a.png")
    report = str(doctor(write_records(tmp_path / "train.json", [("a.png", "{ \x1b[2J\u202e\nx")])))
    assert "      { \ufffd[2J\ufffd x" in report.split("\n") and "\x1b" not in report


def test_histogram_keeps_every_row():
    assert histogram([1, 1, 2, 5]) == [(1, 1, 2), (2, 2, 1), (3, 3, 0), (4, 4, 0), (5, 5, 1)]
    bars = histogram([*range(100)] * 10 + [10_000])
    assert sum(number for _, _, number in bars) == 1001 and len(bars) <= 25 and bars[-1][1] == 10_000


def test_bad_input_is_one_line(tmp_path, capsys):
    assert main(["doctor", "--data", str(tmp_path / "no.json")]) == 2
    assert "no.json: no such file or folder" in capsys.readouterr().err
    with pytest.raises(InputError, match="no folder"):
        doctor(SAMPLE, html=tmp_path / "no" / "doctor.html")


def test_ink_is_found_on_grey_and_dark_paper():
    paper = Image.new("L", (80, 40), 30)
    ImageDraw.Draw(paper).rectangle((10, 12, 29, 21), fill=220)
    assert look(paper).box == (10, 12, 30, 22)


def test_noise_on_paper_is_no_ink():
    noise = Image.frombytes("L", (50, 20), bytes(235 + number % 20 for number in range(1000)))
    assert look(noise).box is None


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (("<image><image>Which?", "x"), "shows 2 and has the turns user, assistant;"),
        (("<image>A?", "x", "B?", "y"), "shows 1 and has the turns user, assistant, user, assistant;"),
    ],
)
def test_conversations_of_one_picture_and_one_answer_are_looked_at(tmp_path, turns, message):
    """Whatever they ask; two pictures or two answers are no pair of picture and LaTeX."""
    files = ["a.png", "b.png"]
    for name in files:
        picture(0).save(tmp_path / name)

    def write(*rows: tuple[list[str], tuple[str, ...]]) -> None:
        roles = ["user", "assistant"] * 2
        messages = [
            [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)] for _, texts in rows
        ]
        content = [{"messages": said, "images": images} for said, (images, _) in zip(messages, rows, strict=True)]
        (tmp_path / "t.json").write_text(json.dumps(content))

    write((files[:1], ("<image>Read.", "x")), (files[1:], ("<image>Read.", "y")))
    assert found(doctor(tmp_path / "t.json"), "two_texts") == [["t.json record 0", "t.json record 1"]]
    write((files[: turns[0].count("<image>")], turns))
    with pytest.raises(InputError, match=f"record 0.*{message}.*`latexocr preview` shows it"):
        doctor(tmp_path / "t.json")
