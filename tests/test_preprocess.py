"""The hand-written function: literal masks, image tokens as the processor expands them, exact counts, no cutting."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import MODEL_TYPES, SAMPLE, write_records
from PIL import Image

from latexocr.collate import FlattenedCollator, FormulaCollator
from latexocr.dataset import MASKED, FormulaDataset, measure, select
from latexocr.errors import InputError
from latexocr.images import ImagePolicy, load_image
from latexocr.modeling import family_in, load_base, load_processor
from latexocr.preprocess import Preprocessor, decode_sample
from latexocr.records import read_records


def make(folder, **policy) -> Preprocessor:
    processor = load_processor(folder)
    cell = processor.image_processor.patch_size * processor.image_processor.merge_size
    return Preprocessor(processor, family_in(folder), ImagePolicy(cell=cell, **policy), "Read.")


@pytest.fixture(params=MODEL_TYPES)
def preprocessor(request, tiny_models) -> Preprocessor:
    return make(tiny_models[request.param])


def test_only_answer_and_end_token_are_supervised(tiny):
    preprocessor = make(tiny, min_visual_tokens=1)
    sample = preprocessor.sample(Image.new("L", (56, 28), 255), "x ^ 2")
    tokenizer = preprocessor.processor.tokenizer
    assert decode_sample(sample, preprocessor) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|>x2<|vision_end|>Read.<|im_end|>\n<|im_start|>assistant\n⟦x ^ 2<|im_end|>⟧"
    )
    supervised = sample["labels"][sample["labels"] != -100]
    assert tokenizer.decode(supervised) == "x ^ 2<|im_end|>"
    assert supervised[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (sample["input_ids"][-len(supervised) :] == supervised).all()
    assert sample["mm_token_type_ids"].sum() == 2
    assert sample["pixel_values"].shape == (8, 3 * 2 * 14 * 14) and sample["image_grid_thw"].tolist() == [[1, 2, 4]]


def test_image_tokens_are_expanded_as_the_processor_does(preprocessor):
    picture = preprocessor.policy.apply(load_image(SAMPLE / "images/000003.png"))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read."}]}]
    text = preprocessor.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    theirs = preprocessor.processor(text=[text], images=[picture], do_resize=False, return_tensors="pt")
    ours = preprocessor.prompt_features(SAMPLE / "images/000003.png")
    assert ours.keys() == theirs.keys()
    for key in theirs:
        expected = theirs[key] if key in ("pixel_values", "image_grid_thw") else theirs[key][0]
        assert torch.equal(ours[key], expected.to(ours[key].dtype)), key


def test_counts_from_headers_are_exact(preprocessor, records):
    rows = read_records(records["train"])
    for record in rows:
        sample, counts = preprocessor(record), preprocessor.count_tokens(record)
        assert counts.total == len(sample["input_ids"])
        assert counts.image == int(sample["mm_token_type_ids"].sum())
        assert counts.answer == int((sample["labels"] != -100).sum())


def test_answers_are_tokenised_as_in_the_whole_conversation(preprocessor):
    """Only a part of it is tokenised: the ids must not show that."""
    texts = [
        "x ^ 2",
        "  x",
        " ",
        "",
        "im_end|>",
        "assistant",
        "中 文",
        "a\nb",
        "user\n<|im_star",
        "\\frac { 1 } { 2 }",
    ]
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read."}]}]
    processor = preprocessor.processor
    start = processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    begun = start.removesuffix(preprocessor.family.empty_reasoning)
    start_ids = processor.tokenizer(start)["input_ids"]
    for text, answer in zip(texts, preprocessor.answers(texts, texts), strict=True):
        conversation = [*prompt, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        whole = start + processor.apply_chat_template(conversation, tokenize=False).removesuffix("\n")[len(begun) :]
        assert start_ids + answer == processor.tokenizer(whole)["input_ids"], text


def test_an_answer_that_merges_with_the_prompt_is_refused(tiny):
    preprocessor = make(tiny)
    tokenizer = preprocessor.processor.tokenizer
    tokenizer.add_tokens(["assistant\nx"])  # stands for a tokenizer that joins the prompt's last line with a letter
    with pytest.raises(InputError, match="here: the tokenizer merges the end of the prompt with the answer"):
        preprocessor.sample(Image.new("L", (56, 28)), "x", "here")


def test_bytes_and_arrays_are_the_same_picture(preprocessor, records):
    rows = read_records(records["train"])[:4]
    dataset = FormulaDataset(rows, preprocessor, as_bytes=True)
    for index, record in enumerate(rows):
        small, full = dataset[index], preprocessor(record)
        assert small["pixel_values"].dtype == torch.uint8 and full["pixel_values"].dtype == torch.float32
        small["pixel_values"] = preprocessor.normalise(small["pixel_values"])
        assert small.keys() == full.keys() and all(torch.equal(small[key], full[key]) for key in full)
        assert torch.equal(preprocessor.normalise(full["pixel_values"]), full["pixel_values"])


def test_without_an_equal_patcher_the_image_processor_makes_the_patches(tiny):
    preprocessor, picture = make(tiny), Image.new("L", (56, 28), 128)
    preprocessor.processor.image_processor.do_rescale = False
    theirs = preprocessor.processor.image_processor(
        [preprocessor.policy.apply(picture)], do_resize=False, return_tensors="pt"
    )
    found = preprocessor.sample(picture, "x", as_bytes=True)
    assert torch.equal(found["pixel_values"], theirs["pixel_values"])


def test_grey_and_coloured_pictures_share_a_batch(tiny):
    preprocessor = make(tiny, min_visual_tokens=1)
    pictures = [Image.new("L", (56, 28), 100), Image.new("RGB", (28, 28), (255, 0, 0))]
    options = {"tokenizer": preprocessor.processor.tokenizer, "family": preprocessor.family}
    for collate in (FormulaCollator(**options), FlattenedCollator(**options)):
        small, full = (
            collate([preprocessor.sample(picture, "x", as_bytes=as_bytes) for picture in pictures])
            for as_bytes in (True, False)
        )
        assert small["pixel_values"].shape == (8 + 4, 3, 14 * 14)
        assert torch.equal(preprocessor.normalise(small["pixel_values"]), full["pixel_values"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_measuring_many_records(tiny, records, tmp_path, num_workers):
    rows = [(str(record.image_path), record.text) for record in read_records(records["train"])]
    many = read_records(write_records(tmp_path / "many.json", rows * 50))  # 1,200: three runs of at most 512
    preprocessor = make(tiny)
    table = measure(many, preprocessor, num_workers=num_workers)
    assert len(table) == 1200 and table.total.dtype == "int32"
    for index in (0, 23, 511, 512, 1199):
        counts = preprocessor.count_tokens(many[index])
        assert table[index] == counts and table.total[index] == counts.total
    broken = write_records(tmp_path / "broken.json", [*rows * 40, (str(tmp_path / "none.png"), "x"), rows[0]])
    with pytest.raises(
        InputError,
        match=r"^\S+broken\.json record 960 \(none\.png\): no such image file \S+none\.png;",
    ):
        measure(read_records(broken), preprocessor, num_workers=num_workers)


def test_odd_answers_survive(tiny):
    preprocessor = make(tiny)
    for text in ("nan", "\\\\", "  leading and trailing  ", "中文 公式", "a\nb", "im_end|>", "", "{{ x }}"):
        sample = preprocessor.sample(Image.new("L", (56, 28)), text)
        decoded = preprocessor.processor.tokenizer.decode(sample["labels"][sample["labels"] != -100])
        assert decoded == text + "<|im_end|>"


def test_an_answer_with_a_special_token_is_refused(tiny):
    """It would be an image token without an image, or an end in the middle."""
    for token in ("<|image_pad|>", "<|im_end|>"):
        with pytest.raises(InputError, match="contains the special token"):
            make(tiny).sample(Image.new("L", (56, 28)), f"a {token} b")


def test_a_template_that_changes_the_answer_is_refused(tiny):
    preprocessor = make(tiny)
    preprocessor.processor.chat_template = preprocessor.processor.chat_template.replace("part.text", "part.text|trim")
    with pytest.raises(InputError, match="the chat template changes the answer"):
        preprocessor.sample(Image.new("L", (56, 28)), " x ")


@pytest.mark.parametrize(("filter_", "text"), [("trim", "x "), ("replace('q', 'Q')", "a q b")])
def test_a_template_that_changes_one_of_many_answers_is_refused(tiny, tmp_path, filter_, text):
    preprocessor = make(tiny)
    template = preprocessor.processor.chat_template
    preprocessor.processor.chat_template = template.replace("part.text", f"part.text|{filter_}")
    image = str(SAMPLE / "images/000000.png")
    rows = read_records(write_records(tmp_path / "t.json", [(image, "x")] * 30 + [(image, text), (image, "y")]))
    with pytest.raises(InputError, match=r"t\.json record 30 .*: the chat template changes the answer"):
        measure(rows, preprocessor)


def test_overlong_records_are_dropped_and_counted_or_refused(tiny, tmp_path):
    preprocessor = make(tiny)
    image = str(SAMPLE / "images/000000.png")
    rows = read_records(write_records(tmp_path / "t.json", [(image, "x"), (image, "x + " * 400), (image, "y")]))
    chosen = select(rows, preprocessor, max_length=300)
    assert [record.text for record in chosen.records] == ["x", "y"]
    assert [record.text for record in chosen.dropped] == ["x + " * 400]
    assert max(chosen.counts.total) <= 300 and len(chosen.counts) == 2
    with pytest.raises(InputError, match=r"1 of 3 records are longer than max_length 300, first: \S+t\.json record 1"):
        select(rows, preprocessor, max_length=300, overlong="error")
    with pytest.raises(InputError, match="nothing is left to use"):
        select(rows, preprocessor, max_length=10)


def test_the_masked_sample_carries_no_label(tiny, records):
    dataset = FormulaDataset(read_records(records["train"]), make(tiny))
    assert (dataset[MASKED]["labels"] == -100).all()
    assert torch.equal(dataset[MASKED]["input_ids"], dataset[0]["input_ids"])


def test_collator_pads_left_and_keeps_every_supervised_column(tiny):
    preprocessor = make(tiny, min_visual_tokens=1)
    short = preprocessor.sample(Image.new("L", (28, 28)), "x")
    long = preprocessor.sample(Image.new("L", (84, 28)), "x + y")
    batch = FormulaCollator(tokenizer=preprocessor.processor.tokenizer, family=preprocessor.family)([short, long])
    length = len(long["input_ids"])
    pad = length - len(short["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["mm_token_type_ids"].shape == (2, length)
    assert batch["attention_mask"][0].tolist() == [0] * pad + [1] * (length - pad)
    assert batch["labels"][0].tolist() == [-100] * pad + short["labels"].tolist()
    assert batch["mm_token_type_ids"][0].tolist() == [0] * pad + short["mm_token_type_ids"].tolist()
    assert batch["pixel_values"].shape[0] == 4 + 12
    columns = batch["logits_to_keep"]
    supervised = {index for row in batch["labels"].tolist() for index, label in enumerate(row) if label != -100}
    assert columns.tolist() == sorted(index - 1 for index in supervised)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_padded_equals_one_by_one(model_type, tiny_models, records):
    """Logits at every supervised position, in float32, within 1e-5."""
    preprocessor = make(tiny_models[model_type])
    model = load_base(tiny_models[model_type], dtype=torch.float32).eval()
    collate = FormulaCollator(tokenizer=preprocessor.processor.tokenizer, family=preprocessor.family)
    samples = [preprocessor(record) for record in read_records(records["train"])[:4]]
    assert len({len(sample["input_ids"]) for sample in samples}) > 1

    def losses(chosen) -> list[float]:
        batch = collate(chosen)
        labels = batch.pop("labels")
        targets = labels[:, batch["logits_to_keep"] + 1]
        with torch.no_grad():
            logits = model(**batch).logits
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return each.sum(1).tolist()

    together = losses(samples)
    alone = [losses([sample])[0] for sample in samples]
    assert together == pytest.approx(alone, abs=1e-4, rel=1e-5)


def test_records_of_the_bundled_sample_are_json(records):
    assert len(json.loads(records["train"].read_text())) == 24
