"""Conversations of every shape: what is shown, what is supervised, and that batches of them train like any other."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import MODEL_TYPES, SAMPLE
from PIL import Image

from latexocr import formats
from latexocr.collate import FlattenedCollator, FormulaCollator
from latexocr.errors import InputError
from latexocr.formats import Access, Media, Turn
from latexocr.images import ImagePolicy
from latexocr.modeling import family_in, load_base, load_processor
from latexocr.preprocess import IGNORED, Preprocessor, decode_sample
from latexocr.records import read_records

PICTURE = Image.new("RGB", (56, 28), "white")  # two visual tokens with the policy below


def encoded(picture: Image.Image) -> bytes:
    picture.save(file := io.BytesIO(), format="PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in "abc":
        PICTURE.save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder: Path, *rows: dict) -> Path:
    path = folder / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*turns: tuple, **more) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def preprocessor_of(folder: Path, **options) -> Preprocessor:
    processor = load_processor(folder)
    cell = processor.image_processor.patch_size * processor.image_processor.merge_size
    return Preprocessor(processor, family_in(folder), ImagePolicy(cell, min_visual_tokens=1), "Read.", **options)


@pytest.fixture(scope="module")
def preprocessor(tiny) -> Preprocessor:
    return preprocessor_of(tiny)


def shown(preprocessor: Preprocessor, path: Path, number: int = 0) -> str:
    """A sample decoded, without the system turn that the template adds."""
    text = decode_sample(preprocessor(read_records(path)[number]), preprocessor)
    return text.removeprefix("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


SEEN = "<|vision_start|><|image_pad|>x2<|vision_end|>"

# one conversation in the shapes that people have it in
SHAPES = {
    "parts": chat(
        ("user", [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Which?"}]), ("assistant", "x")
    ),
    "markers": chat(("user", "<image>Which?"), ("assistant", "x"), images=["a.png"]),
    "column": chat(
        ("user", [{"type": "image"}, {"type": "text", "text": "Which?"}]), ("assistant", "x"), image="a.png"
    ),
    "image_url": chat(
        ("user", [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "Which?"}]),
        ("assistant", [{"type": "text", "text": "x"}]),
    ),
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "x"}],
        "images": ["a.png"],
    },
    "question": {"text": "<image_no_1>Which?", "answer": "x", "image_no_1": "a.png"},
    "inline": {
        "text": "<image_no_1>Which?", "answer": "x",
        "images": ["data:image/png;base64," + base64.b64encode((SAMPLE / "images/000000.png").read_bytes()).decode()],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_one_conversation(folder, preprocessor, name):
    seen = SEEN if name != "inline" else SEEN.replace("x2", "x9")
    text = shown(preprocessor, write(folder, SHAPES[name]))
    assert text == f"<|im_start|>user\n{seen}Which?<|im_end|>\n<|im_start|>assistant\n⟦x<|im_end|>⟧"


def test_a_picture_without_words_is_asked_the_prompt(folder, preprocessor):
    """So the tutorial's record, a table's row and a message with a picture alone are the same."""
    tutorial = {"conversations": [{"role": "user", "value": "a.png"}, {"role": "assistant", "value": "x"}]}
    rows = [
        tutorial,
        {"image": "a.png", "text": "x"},
        chat(("user", [{"type": "image", "image": "a.png"}]), ("assistant", "x")),
    ]
    records = read_records(write(folder, *rows))
    assert all(record.plain for record in records) and not records.kinds.talk
    samples = [preprocessor(record) for record in records]
    for sample in samples[1:]:
        assert {key: value.tolist() for key, value in sample.items()} == {
            key: value.tolist() for key, value in samples[0].items()
        }
    assert decode_sample(samples[0], preprocessor).endswith(
        f"<|im_start|>user\n{SEEN}Read.<|im_end|>\n<|im_start|>assistant\n⟦x<|im_end|>⟧"
    )


TALK = chat(
    ("system", "Be short."), ("user", "<image>Which?"), ("assistant", "x"), ("user", "<image>And this?"),
    ("assistant", "y"), images=["a.png", "b.png"],
)  # fmt: skip


def test_several_turns_and_pictures(folder, preprocessor, tiny):
    path = write(folder, TALK)
    turns = [
        "<|im_start|>system\nBe short.<|im_end|>\n",
        f"<|im_start|>user\n{SEEN}Which?<|im_end|>\n<|im_start|>assistant\n",
        "⟦x<|im_end|>⟧",
        f"\n<|im_start|>user\n{SEEN}And this?<|im_end|>\n<|im_start|>assistant\n",
        "⟦y<|im_end|>⟧",
    ]
    assert shown(preprocessor, path) == "".join(turns)
    last = preprocessor_of(tiny, supervised_turns="last")
    assert shown(last, path) == "".join(turns).replace("⟦x<|im_end|>⟧", "x<|im_end|>")
    record = read_records(path)[0]
    assert (record.text, [one.name for one in record.media]) == ("y", ["a.png", "b.png"])
    prompt = preprocessor.prompt_of(record)
    sample = preprocessor(record)
    assert torch.equal(sample["input_ids"][: len(prompt["input_ids"])], prompt["input_ids"])
    assert len(sample["input_ids"]) - len(prompt["input_ids"]) == 2  # y and the end token
    counts = preprocessor.count_tokens(record)
    assert (counts.image, counts.answer, counts.total) == (4, 4, len(sample["input_ids"]))
    assert last.count_tokens(record).answer == 2


def test_ids_are_the_processors_own(folder, preprocessor):
    sample = preprocessor(read_records(write(folder, TALK))[0])
    messages = [
        {"role": role, "content": [*([{"type": "image"}] if role == "user" else []), {"type": "text", "text": text}]}
        for role, text in (("system", "Be short."), ("user", "Which?"), ("assistant", "x"), ("user", "And this?"),
                           ("assistant", "y"))
    ]  # fmt: skip
    text = preprocessor.processor.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    theirs = preprocessor.processor(text=[text], images=[PICTURE, PICTURE], do_resize=False, return_tensors="pt")
    for key in ("input_ids", "mm_token_type_ids", "attention_mask"):
        assert sample[key].tolist() == theirs[key][0].tolist(), key
    assert torch.equal(sample["pixel_values"], theirs["pixel_values"])
    assert torch.equal(sample["image_grid_thw"], theirs["image_grid_thw"])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_talks(model_type, tiny_models, folder):
    """Two answers with their end tokens are supervised, and the last one's prompt is what stands before it."""
    processor = preprocessor_of(tiny_models[model_type])
    end = processor.processor.tokenizer.convert_tokens_to_ids(processor.family.end_token)
    answers = [processor.processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in "xy"]
    (record,) = read_records(write(folder, TALK))
    said = [*answers[0], end, *answers[1], end]
    if processor.family.empty_reasoning:  # written in a prompt, left out of turns that are over
        with pytest.raises(InputError, match="rewrites earlier turns; add --supervised_turns last"):
            processor(record)
        processor, said = replace(processor, supervised_turns="last"), [*answers[1], end]
    sample, prompt = processor(record), processor.prompt_of(record)
    labels = sample["labels"]
    assert labels[labels != IGNORED].tolist() == said
    assert prompt.keys() == sample.keys() - {"labels"} and len(sample["image_grid_thw"]) == 2
    length = len(sample["input_ids"]) - len(answers[1]) - 1
    assert prompt["input_ids"].tolist() == sample["input_ids"][:length].tolist()


def test_reasoning_where_the_template_writes_an_empty_one(tiny_models, folder):
    """An empty thought is the template's, once; another one would not be asked for in inference."""
    processor = preprocessor_of(tiny_models["ernie4_5_vl_moe"])
    seen = []
    for reasoning in (None, "\n"):
        turn = {"role": "assistant", "content": "x"} | ({"reasoning_content": reasoning} if reasoning else {})
        row = {"messages": [{"role": "user", "content": "What?"}, turn]}
        seen.append(decode_sample(processor(read_records(write(folder, row))[0]), processor))
    assert seen[0] == seen[1] and seen[0].count("<think>") == 1 and "⟦x" in seen[0]
    turn["reasoning_content"] = "hm"
    with pytest.raises(InputError, match="is asked to answer without reasoning; leave it out"):
        processor(read_records(write(folder, row))[0])


def test_a_document_is_learnt_whole(folder, preprocessor):
    path = write(folder, {"text": "Lorem<image_no_2>ipsum<image_no_1>", "images": ["a.png", "b.png"]})
    assert read_records(path)[0].turns == (
        Turn("document", ("Lorem", Media("image", folder / "b.png"), "ipsum", Media("image", folder / "a.png"))),
    )
    sample = preprocessor(read_records(path)[0])
    assert decode_sample(sample, preprocessor).replace("⟧⟦", "").endswith(f"{SEEN}⟦ipsum⟧{SEEN}⟦<|im_end|>⟧")
    assert sample["labels"][0] == IGNORED  # there is nothing before the first token to predict it from
    with pytest.raises(InputError, match=r"t\.jsonl record 0 \(b\.png\): a text with markers asks nothing"):
        preprocessor.prompt_of(read_records(path)[0])


def test_thinking(folder, preprocessor, tiny):
    row = chat(("user", "Which?"), ("assistant", "x"))
    row["messages"][1]["reasoning_content"] = "\n"
    asked = "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    path = write(folder, row, chat(("user", "Which?"), ("assistant", "x")))
    block = "<think>\n\n</think>\n\n"
    assert [shown(preprocessor, path, number) for number in (0, 1)] == [
        f"{asked}⟦{block}x<|im_end|>⟧",
        f"{asked}⟦x<|im_end|>⟧",
    ]
    empty = preprocessor_of(tiny, empty_thinking=True)
    assert shown(empty, path, 1) == f"{asked}⟦{block}x<|im_end|>⟧"


@pytest.mark.parametrize(
    ("model_type", "first", "second"),
    [("ernie4_5_vl_moe", "Picture 1:", "Picture 2:"), ("qwen2_vl", "", ""), ("paddleocr_vl", "", "")],
)
def test_pictures_of_a_document_are_numbered_as_in_a_conversation(folder, tiny_models, model_type, first, second):
    """Where the chat template numbers them."""
    preprocessor = preprocessor_of(tiny_models[model_type])
    pictures = {"images": ["a.png", "b.png"]}
    rows = (
        {"text": "<image>and<image>", **pictures},
        chat(("user", "<image><image>"), ("assistant", "x"), **pictures),
    )
    document, talk = read_records(write(folder, *rows))
    document, talk = (decode_sample(preprocessor(record), preprocessor) for record in (document, talk))
    seen = re.search(r"<\|[^>]*(?:START|start)\|>.*?(?:END|end)\|>", talk)[0]
    assert document.startswith(f"{first}{seen}⟦and⟧{second}{seen}⟦")
    assert f"{first}{seen}{second}{seen}Read." in talk


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "text": r"a <row_no_1> b"},  # no marker where the image has a column of its own
        {"image": "a.png", "text": ""},  # a blank picture
        chat(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "x")),
    ],
)
def test_rows_that_look_wrong_and_are_not(folder, row):
    (record,) = read_records(write(folder, row))
    assert record.turns[-1].text in (row.get("text"), "x")


BAD = {
    "no assistant": (chat(("user", "Which?")), "no assistant turn, so nothing to learn"),
    "no answer": (chat(("user", "a"), ("assistant", "b"), ("user", "c")), "ends with a user turn that nobody answers"),
    "first": (chat(("assistant", "b")), "must begin with a user turn"),
    "role": (chat(("tool", "b"), ("assistant", "x")), "unknown role 'tool'"),
    "marker": (
        chat(("user", "<image><image>"), ("assistant", "x"), images=["a.png"]), "<image> has no image: .* names 1"
    ),
    "number": ({"text": "<video_no_3>", "answer": "x"}, "<video_no_3> has no video"),
    "file": (chat(("user", "a"), ("assistant", "x"), images=["a.png"]), r"image 1 \(a\.png\) has no marker"),
    "url": ({"image": "https://x.org/a.png", "text": "x"}, "is a URL, only local files are opened.*--allow_urls true"),
    "absolute": ({"image": "/etc/hostname", "text": "x"}, "/etc/hostname is not below .*--allow_outside_paths true"),
    "parent": ({"image": "b/../../a.png", "text": "x"}, r"b/\.\./\.\./a\.png is not below"),
    "inline": ({"image": "data:image/png;base64,!", "text": "x"}, "its data URI is damaged"),
    "part": (chat(("user", [{"type": "audio"}]), ("assistant", "x")), "needs type text, image or video"),
    "key": (
        chat(("user", [{"type": "image", "image": "a.png", "max_pixels": 9}]), ("assistant", "x")),
        "unknown key 'max_pixels'; sizes are set by",
    ),
    "answer": ({"text": "a", "answer": 3}, "an assistant turn must be text"),
    "empty answer": (chat(("user", "a"), ("assistant", " ")), "the last assistant turn is empty; write the answer"),
    "numbered key": (
        {"text": "a<image_no_1>b<image_no_3>", "image_no_1": "a.png", "image_no_2": "b.png"},
        "<image_no_3> has no image: the row names 2; add its path under 'image_no_3'",
    ),
    "unknown marker": ({"text": "a<img_no_1>b"}, "<img_no_1> is no marker; pictures are <image> or <image_no_1>"),
    "unknown medium": (chat(("user", "a<audio_no_1>b"), ("assistant", "x")), "<audio_no_1> is no marker"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(folder, name):
    row, message = BAD[name]
    with pytest.raises(InputError, match=rf"t\.jsonl record 1: .*{message}"):
        read_records(write(folder, SHAPES["parts"], row))


def test_what_is_only_found_in_the_file(folder, preprocessor):
    rows = [chat(("user", "<image>Which?"), ("assistant", "x"), images=["gone.png"]),
            chat(("user", "<image><image>"), ("assistant", "x"), images=["a.png", "gone.png"]),
            chat(("user", "Say <|im_end|>"), ("assistant", "x"))]  # fmt: skip
    gone = f"no such image file {folder / 'gone.png'}; relative paths begin at the data file's folder"
    messages = [f"record 0 (gone.png): {gone}", f"record 1 (a.png), gone.png: {gone}",
                "record 2: the user's text contains the special token <|im_end|>"]  # fmt: skip
    for record, message in zip(read_records(write(folder, *rows)), messages, strict=True):
        with pytest.raises(InputError) as error:
            preprocessor.count_tokens(record)
        assert message in str(error.value)


def test_access(folder):
    path = write(folder, {"image": "https://x.org/a.png", "text": "x"}, {"image": "../a.png", "text": "y"})
    url, outside = read_records(path, access=Access(urls=True, outside=True))
    assert url.media[0].content == "https://x.org/a.png" and url.where == f"{path} record 0 (https://x.org/a.png)"
    assert outside.image_path == folder / "../a.png"


class Pictures(BaseHTTPRequestHandler):
    """/a.png is a picture; /cut ends too early, /rude says no HTTP, /large is too large, nothing else is there."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path == "/rude":
            self.wfile.write(b"no HTTP at all\r\n\r\n")
            return
        content = {"/a.png": encoded(PICTURE), "/cut": encoded(PICTURE), "/large": b"x" * 2000}.get(self.path, b"")
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content) + 9 * (self.path == "/cut")))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(formats, "MAX_BYTES", 1000)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.url, server.asked = f"http://127.0.0.1:{server.server_port}", []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_url_is_fetched_once(folder, preprocessor, server):
    """Measured, read, and read again from a file of its own: one request, and what a local file gives."""
    path = write(folder, {"image": f"{server.url}/a.png", "text": "x"}, {"image": "a.png", "text": "x"})
    fetched, local = read_records(path, access=Access(urls=True))
    assert preprocessor.count_tokens(fetched) == preprocessor.count_tokens(local)
    assert torch.equal(preprocessor(fetched)["pixel_values"], preprocessor(local)["pixel_values"])
    (again,) = read_records(write(folder, {"image": f"{server.url}/a.png", "text": "y"}), access=Access(urls=True))
    assert preprocessor(again)["input_ids"].shape == preprocessor(local)["input_ids"].shape
    assert server.asked == ["/a.png"]
    (kept,) = (folder / "cache/latexocr/urls").iterdir()
    assert kept.read_bytes() == encoded(PICTURE)


@pytest.mark.parametrize(
    ("place", "message"),
    [("/none", "HTTPError: HTTP Error 404"), ("/rude", "BadStatusLine: no HTTP at all"), ("/cut", "IncompleteRead: "),
     ("/large", "holds more than 0 MB"), (":x/", "InvalidURL: nonnumeric port"), (":1/", "URLError: ")],
)  # fmt: skip
def test_what_no_url_gives(folder, preprocessor, server, place, message):
    """One line that names the row and the address, and nothing is kept."""
    url = (server.url if place.startswith("/") else "http://127.0.0.1") + place
    row = chat(("user", "<image><image>"), ("assistant", "x"), images=["a.png", url])
    (record,) = read_records(write(folder, row), access=Access(urls=True))
    with pytest.raises(InputError) as error:
        preprocessor.count_tokens(record)
    assert f"t.jsonl record 0 (a.png), {url}: " in str(error.value) and message in str(error.value)
    assert not (folder / "cache").exists()


MIXED = [
    SHAPES["markers"],
    TALK,
    chat(("user", "What is 1 + 1?"), ("assistant", "2")),
    {"text": "Lorem<image_no_1>ipsum", "image": "c.png"},
    chat(("user", "And 1 + 2?"), ("assistant", "3")),
]


def test_batches_equal_one_by_one(folder, preprocessor, tiny):
    """Padded, flattened and alone: the same losses, whatever a record shows."""
    model = load_base(tiny, dtype=torch.float32).eval()
    samples = [preprocessor(record) for record in read_records(write(folder, *MIXED))]
    options = {"tokenizer": preprocessor.processor.tokenizer, "family": preprocessor.family,
               "blank": preprocessor.blank}  # fmt: skip
    padded, flattened = FormulaCollator(**options), FlattenedCollator(**options)

    def loss(batch: dict) -> float:
        from latexocr.attention import VARLEN, set_attention
        from latexocr.trainer import STOCK

        batch, labels = dict(batch), batch["labels"]
        for name in ("labels", "num_samples", "num_tokens"):
            batch.pop(name, None)
        set_attention(model, VARLEN if "text_cu_seqlens" in batch else STOCK)
        batch["pixel_values"] = preprocessor.normalise(batch["pixel_values"])
        batch["image_grid_thw"] = torch.as_tensor(batch["image_grid_thw"])
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits
        targets = labels[:, batch["logits_to_keep"] + 1]
        return float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="sum"))

    alone = sum(loss(padded([sample])) for sample in samples)
    assert loss(padded(samples)) == pytest.approx(alone, rel=1e-5)
    assert loss(flattened(samples)) == pytest.approx(alone, rel=1e-5)
    text_only = samples[2:3] + samples[4:]
    batch = flattened(text_only)
    assert batch["num_samples"] == 2 and len(batch["pixel_values"]) == 4  # the blank picture: one visual token
    assert loss(batch) == pytest.approx(sum(loss(padded([sample])) for sample in text_only), rel=1e-5)


def test_preview_shows_conversations_and_doctor_refuses_them(folder, tiny):
    from latexocr.doctor import doctor
    from latexocr.preview import preview

    path = write(folder, *MIXED)
    text = preview(path, str(tiny), output_dir=folder / "seen")
    assert "t.jsonl record 2: " in text and "⟦y<|im_end|>⟧" in text
    assert sorted(file.name for file in (folder / "seen").iterdir()) == ["0.png", "1.png", "1_2.png", "3.png"]
    with pytest.raises(InputError, match=r"t\.jsonl record 1 .*: doctor compares pictures with their LaTeX"):
        doctor(path)


# training


def test_mixed_records_train_and_evaluate(folder, config, tiny):
    """Through `train` with validation, generation and the vision tower, and through `evaluate`."""
    from latexocr.evaluate import evaluate
    from latexocr.metrics_file import read_metrics
    from latexocr.train import train

    path = write(folder, *MIXED)
    questions = folder / "val.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in MIXED if "messages" in row))
    result = train(
        config(train_json=str(path), val_json=str(questions), max_steps=4, gradient_accumulation_steps=2,
               lora_components=["language", "vision", "merger"], prompt="Read.", min_visual_tokens=1)
    )  # fmt: skip
    first, second = [row["eval_loss"] for row in read_metrics(folder / "run/metrics.jsonl") if "eval_loss" in row]
    assert second < first and result.metrics["eval_num_rows"] == 4
    found = evaluate(str(result.adapter_dir), questions, folder / "out", pictures=False, max_new_tokens=4)
    assert [row["reference"] for row in found.rows] == ["x", "y", "2", "3"]
    assert ["image_path" in row for row in found.rows] == [True, True, False, False]


def test_json_answers_train(folder, config):
    from latexocr.evaluate import evaluate
    from latexocr.train import train

    path = write(folder, *({"image": f"{name}.png", "text": json.dumps({"plate": name})} for name in "abc"))
    options = {"train_json": str(path), "val_json": str(path), "answer_format": "json", "max_steps": 1}
    result = train(config(**options))
    assert result.metrics["eval_json_rate"] == 0 and result.metrics["eval_field_match.plate"] == 0
    found = evaluate(result.adapter_dir, path, folder / "found", max_new_tokens=4)  # it knows what its answers are
    assert found.metrics["json_rate"] == 0 and "bleu" not in found.metrics
    assert "images as JSON" in (result.adapter_dir / "README.md").read_text(encoding="utf-8")
    write(folder, {"image": "a.png", "text": "x"})
    with pytest.raises(InputError, match=r"t\.jsonl record 0 \(a\.png\): 'x' is no JSON object"):
        train(config(**options, output_dir=str(folder / "other")))


@pytest.mark.parametrize(("options", "message"), [
    ({"val_json": "t.jsonl"}, r"t\.jsonl record 0 \(.*\): a text with markers asks nothing to be answered"),
    ({"augment": "scan"}, "augment varies records of one picture and its answer, and not all are"),
    ({"cache_vision_features": True}, "cache_vision_features needs records of one picture and its answer"),
])  # fmt: skip
def test_what_documents_cannot_have(options, message, folder, config):
    from latexocr.train import train

    path = write(folder, {"text": "Lorem<image_no_1>ipsum", "image_no_1": "a.png"})
    options = {name: str(path) if name == "val_json" else value for name, value in options.items()}
    with pytest.raises(InputError, match=message):
        train(config(train_json=str(path), eval_generate_samples=1, **options))


@pytest.mark.slow
def test_a_rank_without_pictures_does_not_hang(launch, folder, tiny):
    """Two ranks, of which one or none has a picture, also with adapters in the vision tower: as one process."""
    from test_distributed import train_on

    from latexocr.metrics_file import read_metrics

    rows = [SHAPES["markers"], *(chat(("user", f"{n} + 1?"), ("assistant", str(n + 1))) for n in range(5))]
    path = write(folder, *rows)
    options = ["--gradient_accumulation_steps", "1", "--lora_components", "language", "vision", "merger"]
    for ranks in (1, 2):
        train_on(launch, ranks, 2 // ranks, tiny, {"train": path, "val": path}, folder / str(ranks), *options)
    one, two = (
        [row["loss"] for row in read_metrics(folder / ranks / "metrics.jsonl") if "loss" in row] for ranks in "12"
    )
    assert len(one) == 6 and two == pytest.approx(one, rel=2e-5)
