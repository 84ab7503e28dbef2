"""Our decoding gives the token ids that transformers' own generate gives."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from conftest import MODEL_TYPES, SAMPLE

from latexocr import decoding
from latexocr.adapters import add_lora
from latexocr.decoding import Answer, Decoder, decoder_for
from latexocr.generate import _stock, generate
from latexocr.metrics_file import read_metrics
from latexocr.predict import LatexOCR
from latexocr.train import train

IMAGES = [str(SAMPLE / f"images/{number:06}.png") for number in (1, 7, 20, 33, 45, 12)]


def reader(folder, *, lora: bool, device: str = "cpu") -> LatexOCR:
    """A tiny model that says something else for every image; with `lora`, under adapters that change it."""
    ocr = LatexOCR.from_pretrained(folder, device=device, dtype="float32")
    torch.manual_seed(1)
    head = torch.nn.Linear(ocr.model.lm_head.in_features, ocr.model.lm_head.out_features, bias=False, device=device)
    ocr.model.lm_head = head  # tied to the embeddings, a random head repeats its input
    for name, weight in ocr.model.model.language_model.named_parameters():
        weight.data *= 6 if "down_proj" in name else 1
    if lora:
        components = ["language", "vision"]
        ocr.model = add_lora(ocr.model, ocr.preprocessor.family, components=components, r=4, alpha=8, dropout=0.1)
        for name, parameter in ocr.model.eval().named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return ocr


def prompts(ocr: LatexOCR, images: list) -> dict[str, torch.Tensor]:
    return ocr.collate([ocr.preprocessor.prompt_features(image) for image in images])


def stock(ocr: LatexOCR, batch: dict[str, torch.Tensor], config) -> list[list[int]]:
    """What transformers generates, up to and with the end token."""
    length = batch["input_ids"].shape[1]
    inputs = {name: value.to(ocr.model.device) for name, value in batch.items()}
    with torch.no_grad():
        return cut(ocr.model.generate(**inputs, generation_config=config)[:, length:].tolist(), config)


def cut(output: list[list[int]], config) -> list[list[int]]:
    """Rows up to and with the end token."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    first = [next((at for at, token in enumerate(row) if token in ends), len(row)) for row in output]
    return [row[: at + 1] for row, at in zip(output, first, strict=True)]


def ids(answers: list[Answer]) -> list[list[int]]:
    return [answer.ids for answer in answers]


def losses(ocr: LatexOCR, batch: dict[str, torch.Tensor], config) -> list[float]:
    """-ln p of what transformers generates, from all the logits of all steps."""
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        found = ocr.model.generate(**batch, generation_config=config, output_logits=True, return_dict_in_generate=True)
    steps = torch.stack(found.logits, dim=1).log_softmax(-1)  # (rows, tokens, vocabulary)
    taken = steps.gather(-1, found.sequences[:, length:, None])[..., 0]
    lengths = [len(row) for row in cut(found.sequences[:, length:].tolist(), config)]
    return [-row[:end].sum().item() for row, end in zip(taken, lengths, strict=True)]


def settings(ocr: LatexOCR, batch: dict[str, torch.Tensor], max_new_tokens: int):
    """Greedy settings whose end token is the one that ends the rows at the most different times."""
    config = ocr._generation(max_new_tokens, None, None, None)
    config.eos_token_id = [len(ocr.preprocessor.processor.tokenizer) - 1]  # as good as none
    rows = stock(ocr, batch, config)
    firsts = {token: {row.index(token) if token in row else -1 for row in rows} for row in rows for token in row}
    config.eos_token_id = [max(firsts, key=lambda token: len(firsts[token]))]
    return config


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_ids_equal_stock_generate(model_type, lora, tiny_models, monkeypatch):
    """Images of many sizes, so prompts of many lengths; rows end at different times and are dropped."""
    monkeypatch.setattr(decoding, "CHECK_EVERY", 2)
    ocr = reader(tiny_models[model_type], lora=lora)
    batch = prompts(ocr, IMAGES)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 2
    config = settings(ocr, batch, 40)
    wanted = stock(ocr, batch, config)
    assert len({len(row) for row in wanted}) > 3
    with decoder_for(ocr.model, config) as decoder:
        assert ids(decoder([batch])) == wanted
        assert decoder._cache.rows < 6
        parts = [prompts(ocr, IMAGES[:2]), prompts(ocr, IMAGES[2:])]
        assert ids(decoder(parts)) == wanted  # joined, memory used again
        assert ids(decoder([prompts(ocr, IMAGES[3:4])])) == wanted[3:4]
        as_bytes = ocr.collate([ocr.preprocessor.prompt_features(image, as_bytes=True) for image in IMAGES])
        assert as_bytes["pixel_values"].dtype == torch.uint8
        assert ids(decoder([as_bytes], ocr.preprocessor.normalise)) == wanted
        together = [answer.loss for answer in decoder([batch])]
        assert together == pytest.approx(losses(ocr, batch, config), rel=1e-4)
        assert decoder([prompts(ocr, IMAGES[3:4])])[0].loss == pytest.approx(together[3], rel=1e-4)


@pytest.fixture(scope="module")
def adapted(tiny):
    return reader(tiny, lora=True)


def test_ids_do_not_depend_on_how_memory_is_cut(adapted, monkeypatch):
    """Attention over a cache that grows, prompts one by one, and no memory for more than four rows."""
    batch = prompts(adapted, IMAGES)
    config = settings(adapted, batch, 40)
    wanted = stock(adapted, batch, config)
    monkeypatch.setattr(decoding, "LENGTH_STEP", 7)
    monkeypatch.setattr(decoding, "PREFILL_PATCHES", 1)
    monkeypatch.setattr(decoding, "CHECK_EVERY", 3)
    monkeypatch.setattr(Decoder, "_rows_that_fit", lambda self, length: 4)
    with decoder_for(adapted.model, config) as decoder:
        assert ids(decoder([batch])) == wanted
        assert decoder._cache.max_rows == 4
        assert [decoder._capacity_for(length) for length in (6, 7, 111, 112)] == [7, 14, 112, 154]
        assert batch["input_ids"].shape[1] == 111
        shapes = set(decoder._graphs)
        assert {capacity for _, capacity in shapes} == {112, 154} and len({rows for rows, _ in shapes}) > 2


def test_everything_is_put_back(adapted):
    batch = prompts(adapted, IMAGES[:2])
    config = settings(adapted, batch, 8)
    before = stock(adapted, batch, config)
    with decoder_for(adapted.model, config) as decoder:
        decoder([batch])
        assert adapted.model.config.text_config._attn_implementation == "sdpa"
        assert not any("forward" in vars(layer) for layer in adapted.model.modules())
    assert decoder._cache is None
    assert stock(adapted, batch, config) == before


def test_an_answer_knows_whether_it_ended(adapted):
    batch = prompts(adapted, IMAGES)
    config = settings(adapted, batch, 40)
    (end,) = config.eos_token_id
    tokenizer, family = adapted.preprocessor.processor.tokenizer, adapted.preprocessor.family
    other = replace(adapted.preprocessor, family=replace(family, end_token=tokenizer.convert_ids_to_tokens(end)))
    with decoder_for(adapted.model, config) as decoder:
        answers = generate(adapted.model, [batch], other, config, decoder=decoder)
    stock_answers = generate(adapted.model, [batch], other, config)
    for ours, theirs in zip(answers, stock_answers, strict=True):
        assert replace(ours, confidence=0.0) == replace(theirs, confidence=0.0)
        assert ours.confidence == pytest.approx(theirs.confidence, rel=1e-4)
    assert {answer.finished for answer in answers} == {True, False}
    assert all((answer.confidence > 0) == answer.finished for answer in answers)


def test_confidence_is_the_models_own_when_sampling(adapted):
    """Not that of the tokens at the temperature at which they were drawn."""
    config = adapted._generation(6, 3.0, None, None)
    batch = prompts(adapted, IMAGES)
    torch.manual_seed(0)
    expected = losses(adapted, batch, config)
    torch.manual_seed(0)
    answers = _stock(adapted.model, batch, adapted.preprocessor.normalise, config, {})
    assert [answer.loss for answer in answers] == pytest.approx(expected, rel=1e-4)


def test_where_stock_generate_has_to_do_it(adapted, caplog):
    """Said once, however many batches there are."""
    decoding._say_once.cache_clear()
    sampling = adapted._generation(4, 1.5, None, None)
    with caplog.at_level(logging.INFO, "latexocr"):
        for _ in range(2):
            with decoder_for(adapted.model, sampling) as decoder:
                assert decoder is None
    (line,) = caplog.messages
    assert line == "do_sample, temperature, top_k set: answers come from transformers' own generate, which is slower"
    plain = adapted._generation(4, None, None, None)
    assert decoding.unsupported(adapted.model, plain) is None
    text_config = adapted.model.config.text_config
    kinds, text_config.layer_types = text_config.layer_types, ["full_attention", "sliding_attention", "full_attention"]
    assert decoding.unsupported(adapted.model, plain) == "sliding-window attention"
    text_config.layer_types = kinds


def test_validation_does_not_depend_on_how_rows_are_grouped(config, records, tmp_path):
    scores = []
    for size in (1, 4, 128):
        output = tmp_path / str(size)
        train(config(val_json=str(records["val"]), output_dir=str(output), max_steps=1, per_device_eval_batch_size=2,
                     generate_batch_size=size, eval_strategy="steps", eval_steps=1))  # fmt: skip
        (row,) = [row for row in read_metrics(output / "metrics.jsonl") if "eval_loss" in row]
        scores.append({name: value for name, value in row.items() if "runtime" not in name and name != "time"})
    assert scores[0]["eval_num_rows"] == 7 and scores[0] == scores[1] == scores[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_graphs_give_the_same_ids(model_type, tiny_models, monkeypatch):
    """Stock's, in float32. A mixture of experts waits for the GPU but in bfloat16: there, those without graphs."""
    monkeypatch.setattr(decoding, "FEW_ROWS", 1)
    ocr = reader(tiny_models[model_type], lora=True, device="cuda")
    batch = prompts(ocr, IMAGES)
    config = settings(ocr, batch, 40)
    wanted, routed = stock(ocr, batch, config), ocr.preprocessor.family.routed
    with decoder_for(ocr.model, config) as decoder:
        assert ids(decoder([batch])) == wanted
        assert ids(decoder([batch])) == wanted
        assert any(decoder._graphs.values()) is not routed
    if routed:
        ocr.model.bfloat16()
        with decoder_for(ocr.model, config) as decoder:
            decoder._captures = False
            wanted = ids(decoder([batch]))
            decoder._captures = True
            assert ids(decoder([batch])) == ids(decoder([batch])) == wanted
            assert any(decoder._graphs.values())
