"""Variants of LoRA, what is trained, and how fast: the recipes of the tutorials, each alone and together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SAMPLE, untied
from safetensors.torch import load_file

from latexocr.adapters import add_lora, load_adapter, trainable_parameters
from latexocr.config import OUR_NAMES, TrainOptions, parse_train_arguments, typed_values
from latexocr.contract import Contract
from latexocr.errors import InputError
from latexocr.graphs import GradientBuffer
from latexocr.initialisation import pissa, write_difference
from latexocr.merge import merge
from latexocr.metrics_file import read_metrics
from latexocr.modeling import family_in, load_base, load_processor
from latexocr.new_tokens import make_room, read_words, token_indices, train_rows
from latexocr.optimizers import flatten, learning_rates, parameter_groups
from latexocr.predict import LatexOCR
from latexocr.train import load_data, load_model, train
from latexocr.trainer import FormulaTrainer

VARIANTS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"lora_init": "pissa"},
    "loraplus": {"loraplus_lr_ratio": 16},
    "together": {"lora_init": "pissa", "use_dora": True, "use_rslora": True, "loraplus_lr_ratio": 4,
                 "lora_components": ["attention", "merger"], "learning_rates": {"vision": 1e-4}},
}  # fmt: skip


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_is_uninterrupted_and_merged_is_the_adapter(name, config, tmp_path):
    """Four steps at once and two after two; the adapter fits the original base, and merged it answers the same."""
    options = dict(save_strategy="steps", save_steps=2, max_steps=4, lora_dropout=0.1, learning_rate=1e-2,
                   **VARIANTS[name])  # fmt: skip
    whole = train(config(**options))
    before = losses(tmp_path / "run")
    weights = (whole.adapter_dir / "adapter_model.safetensors").read_bytes()
    resumed = train(config(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"), **options))
    assert len(before) == 4 and losses(tmp_path / "run") == before
    assert (resumed.adapter_dir / "adapter_model.safetensors").read_bytes() == weights
    result = merge(whole.adapter_dir, tmp_path / "merged")
    assert result.merged.mean < 1e-4 and result.stored.mean < 1e-4


@pytest.mark.parametrize("variant", [{}, {"use_dora": True, "use_rslora": True}], ids=("plain", "dora"))
def test_pissa_begins_as_the_base_and_its_file_fits_the_base(variant, tiny, tmp_path):
    """The base's outputs before training, and after it those of a stock adapter of twice the rank."""
    family, example = family_in(tiny), {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    base = load_base(tiny, dtype=torch.float32)
    wanted = base(**example).logits
    model = add_lora(base, family, components=["language"], r=32, alpha=8, dropout=0.0, **variant)
    start = pissa(model)
    assert len(start) == 2 * 21 and model(**example).logits.sub(wanted).abs().max() < 1e-4
    layer = base.get_submodule("model.language_model.layers.0.self_attn.q_proj")
    stock = load_base(tiny, dtype=torch.float32).get_submodule("model.language_model.layers.0.self_attn.q_proj")
    values = torch.linalg.svdvals(stock.weight)
    rest = torch.linalg.svdvals(layer.base_layer.weight)[: len(values) - 32]
    torch.testing.assert_close(rest, values[32:], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    trained = model(**example).logits
    assert trained.sub(wanted).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    write_difference(tmp_path, start)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 64 and config["init_lora_weights"] is True
    loaded = load_adapter(load_base(tiny, dtype=torch.float32), tmp_path, tiny)
    assert loaded.eval()(**example).logits.sub(trained).abs().max() < 1e-4


def test_pissa_needs_as_many_singular_values(config):
    with pytest.raises(InputError, match=r"lora_r 4096 is above the \d+ singular values of .*q_proj; take a smaller"):
        train(config(lora_init="pissa", lora_r=4096))


def test_rates_of_parts_and_of_b(tiny):
    """4 rates: language and vision, each with B sixteen times faster."""
    model = add_lora(load_base(tiny, dtype=torch.float32), family_in(tiny), components=["language", "vision"],
                     r=2, alpha=2, dropout=0.0)  # fmt: skip
    options = TrainOptions(learning_rate=1e-4, learning_rates={"vision": 1e-5}, loraplus_lr_ratio=16)
    rates = learning_rates(model, family_in(tiny), options)
    names = "language_model.layers.0.self_attn.q_proj", "visual.blocks.0.attn.qkv"
    found = [rates[f"base_model.model.model.{name}.lora_{matrix}.default.weight"] for name in names for matrix in "AB"]
    assert found == pytest.approx([1e-4, 16e-4, 1e-5, 16e-5])
    groups = parameter_groups(model, family_in(tiny), options, decaying=set(rates), weight_decay=0.1)
    sizes = {round(group["lr"], 7): (len(group["params"]), group["weight_decay"]) for group in groups}
    assert sizes == {1e-4: (21, 0.1), 16e-4: (21, 0.1), 1e-5: (8, 0.1), 16e-5: (8, 0.1)}


def test_a_rate_of_zero_trains_nothing_there(config, tiny, tmp_path):
    """Embeddings at 0, the merger slower than the rest: seen in the weights after one step of Adam."""
    result = train(config(finetuning="full", max_steps=1, weight_decay=0.0, lr_scheduler_type="constant",
                          learning_rate=1e-3, learning_rates={"embeddings": 0.0, "merger": 1e-4},
                          save_strategy="steps", save_steps=1))  # fmt: skip
    before = load_base(tiny, dtype=torch.float32).state_dict()
    after = load_base(result.trained_dir.parent / "checkpoint-1", dtype=torch.float32).state_dict()
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert moved["model.language_model.embed_tokens.weight"] == 0
    assert moved["model.visual.merger.mlp.0.weight"] == pytest.approx(1e-4, rel=0.02)
    assert moved["model.language_model.layers.0.mlp.up_proj.weight"] == pytest.approx(1e-3, rel=0.02)


def test_frozen_parts_are_not_differentiated(config, tmp_path, monkeypatch):
    """Vision, embeddings and the first decoder layer frozen: the same to the last bit; the tower keeps no graph."""
    seen = []
    loss = FormulaTrainer._loss

    def watched(self, model, inputs, num_items):
        (tower,) = [part for name, part in self.model.named_modules() if name.endswith(".visual.blocks.0")]
        hook = tower.register_forward_hook(lambda module, given, output: seen.append(output.requires_grad))
        found = loss(self, model, inputs, num_items)
        hook.remove()
        return found

    monkeypatch.setattr(FormulaTrainer, "_loss", watched)
    options = config(finetuning="full", max_steps=1, save_strategy="steps", save_steps=1, gradient_checkpointing=True,
                     freeze=["vision", "embeddings", r"language_model\.layers\.0\."])  # fmt: skip
    result = train(options)
    before = load_base(Path(options.model_name_or_path), dtype=torch.float32).state_dict()
    after = load_base(result.trained_dir.parent / "checkpoint-1", dtype=torch.float32).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert seen and not any(seen)
    assert not any(".blocks." in name or "embed" in name or ".layers.0." in name for name in moved)
    assert any(".layers.1." in name for name in moved) and any(".merger." in name for name in moved)


def test_a_frozen_tower_is_computed_once(config, tmp_path):
    """Full training with everything of vision frozen takes cached features: the same losses."""
    options = {"finetuning": "full", "freeze": ["vision", "merger"]}
    train(config(output_dir=str(tmp_path / "usual"), **options))
    train(config(output_dir=str(tmp_path / "cached"), cache_vision_features=True, **options))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "usual"), rel=1e-5)


@pytest.mark.filterwarnings("error::FutureWarning")  # names that peft and transformers have between them
def test_layers_by_an_expression(tiny):
    model = add_lora(load_base(tiny, dtype=torch.float32), family_in(tiny), components=[], r=2, alpha=2, dropout=0.0,
                     pattern=r".*layers\.[01]\..*[qv]_proj|.*merger\.mlp\.0")  # fmt: skip
    found = {part: modules for part, (_, modules) in trainable_parameters(model).items()}
    assert found == {"language": 4, "merger": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_pattern": r".*\.self_atn\.q_proj"}, r"matches no layer of Qwen2-VL; did you mean 'model\.language"),
        ({"lora_pattern": "("}, r"lora_pattern: '\(' is no regular expression"),
        ({"lora_pattern": r".*\.merger.*"}, r"also matches model\.visual\.merger, no linear layer"),
        ({"lora_pattern": "x", "lora_components": ["vision"]}, "lora_pattern takes the place of lora_components"),
        ({"finetuning": "full", "freeze": ["visoin"]}, "freeze: 'visoin' matches no .*did you mean 'vision'"),
        ({"finetuning": "full", "freeze": ["."]}, r"freeze: \. leave nothing to train"),
        ({"freeze": ["vision"]}, "freeze is for --finetuning full"),
        ({"finetuning": "full", "use_dora": True}, "use_dora is for --finetuning lora"),
        ({"finetuning": "full", "lora_components": ["vision"]}, "lora_components is for --finetuning lora"),
        ({"learning_rates": {"visoin": 1e-5}}, "learning_rates: 'visoin' is none of .*did you mean 'vision'"),
        (
            {"learning_rates": {"vision": 1e-5}},
            r"learning_rates: vision is not trained here \(language\); leave it out, "
            "or train it: --lora_components language vision, or --finetuning full",
        ),
        (
            {"learning_rates": {"embeddings": 1e-5}},
            "embeddings is not .* leave it out, or train it: --finetuning full",
        ),
        ({"learning_rates": {"new_tokens": 1e-5}}, "new_tokens is not .* or name them: --new_tokens"),
        ({"learning_rates": {"vision": 1e-5}, "finetuning": "full", "freeze": ["vision"]}, "take it out of --freeze"),
        ({"learning_rates": {"language": -1.0}}, "learning_rates: language is -1.0, needs a number from 0"),
        ({"loraplus_lr_ratio": 0.5}, "loraplus_lr_ratio is 0.5, needs a number from 1"),
        ({"lora_init": "loftq"}, "lora_init loftq begins with what 4 bits lose: add --load_in_4bit true"),
        ({"lora_init": "pissa", "load_in_4bit": True}, "lora_init pissa changes weights, .* --lora_init loftq"),
        ({"fp16": True}, "fp16 needs a GPU"),
        ({"fp16": True, "bf16": True}, "bf16 and fp16 exclude each other"),
        ({"use_dora": True, "fused_lora": True}, "fused_lora computes no DoRA"),
    ],
)
def test_what_is_refused_before_training(options, message, config, tmp_path):
    with pytest.raises(InputError, match=message):
        train(config(**options))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_goes_on_with_the_same_recipe(config, tmp_path):
    options = dict(save_strategy="steps", save_steps=1, max_steps=2)
    train(config(lora_init="pissa", **options))
    with pytest.raises(InputError, match="trained with another lora_init, learning_rates; resume with the same"):
        train(config(resume_from_checkpoint="true", learning_rates={"language": 1e-4}, **options))


def test_rates_from_the_command_line_and_from_yaml(config, tmp_path):
    wanted = {"vision": 1e-5, "new_tokens": 1e-3}
    for value in (
        "vision=1e-5,new_tokens=1e-3",
        ["vision=1e-5", "new_tokens=1e-3"],
        {"vision": "1e-5", "new_tokens": 0.001},
    ):
        assert typed_values(TrainOptions, {"learning_rates": value})["learning_rates"] == wanted
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config(learning_rates=wanted, freeze=[r"\.0\."], finetuning="full").resolved()))
    values = typed_values(TrainOptions, {name: value for name, value in parse_train_arguments(
        ["--config", str(file)]).items() if name in OUR_NAMES})  # fmt: skip
    assert (values["learning_rates"], values["freeze"], values["lora_pattern"]) == (wanted, [r"\.0\."], None)
    for value in ("vision", {"vision": "fast"}, 3):
        with pytest.raises(InputError, match=r"option 'learning_rates' is .*, needs names with numbers \(name=0.1"):
            typed_values(TrainOptions, {"learning_rates": value})


WORDS = [r"\frac", r"\alpha_{new}", "~~never~~"]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=("tied", "untied"))
def test_new_tokens_are_trained_saved_loaded_and_merged(tied, tiny, config, tmp_path):
    """Resumed as uninterrupted; adapter and merged model read the same; the other rows stay as they are."""
    tiny = tiny if tied else untied(tiny, tmp_path / "base")
    words = tmp_path / "words.txt"
    words.write_text("\n".join(WORDS) + "\n")
    options = dict(model_name_or_path=str(tiny), new_tokens=[str(words)], learning_rates={"new_tokens": 1e-2},
                   save_strategy="steps", save_steps=2, max_steps=4)  # fmt: skip
    whole = train(config(**options))
    before = losses(tmp_path / "run")
    weights = load_file(whole.adapter_dir / "adapter_model.safetensors")
    train(config(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"), **options))
    assert len(before) == 4 and losses(tmp_path / "run") == before

    name, *heads = [name for name in sorted(weights) if "lora" not in name][::-1]
    assert len(heads) == (0 if tied else 1) and ".embed_tokens." in name
    base = load_base(tiny, dtype=torch.float32).get_input_embeddings().weight
    tokenizer = load_processor(whole.adapter_dir).tokenizer
    assert weights[name].shape == (3, base.shape[1]) and len(tokenizer) == 521
    assert tokenizer.convert_ids_to_tokens([518, 519, 520]) == WORDS
    start = torch.stack([base[load_processor(tiny).tokenizer(word)["input_ids"]].mean(0) for word in WORDS])
    moved = (weights[name] - start).abs().amax(1)
    assert moved[0] > 1e-3
    assert (moved[1:] > 1e-3 if tied else moved[1:] == 0).all()  # they are in no answer, but tied to what is asked for

    result = merge(whole.adapter_dir, tmp_path / "merged")
    assert result.merged.mean < 1e-4 and result.stored.mean < 1e-4
    merged = load_base(tmp_path / "merged", dtype=torch.float32).get_input_embeddings().weight
    assert len(merged) == 521 and torch.equal(merged[518:521], weights[name]) and torch.equal(merged[:518], base)
    picture = SAMPLE / "images/000000.png"
    answers = [LatexOCR.from_pretrained(**source)(picture, max_new_tokens=6) for source in
               ({"path": tiny, "adapter": whole.adapter_dir}, {"path": tmp_path / "merged"})]  # fmt: skip
    assert answers[0] == answers[1]


def test_a_run_that_goes_on_trains_the_same(config, tmp_path):
    """Other answers, other thoughts or other words are refused; a file of words is known by the words."""
    words = tmp_path / "words.txt"
    words.write_text("\\iiint\n\\oiint\n")
    train(config(new_tokens=[str(words)], supervised_turns="last", max_steps=1))
    contract = Contract.load(tmp_path / "run/checkpoint-1")
    assert contract.training["recipe"]["new_tokens"] == [f"{tmp_path.name}/words.txt"]

    def go_on(**options):
        train(config(**{"new_tokens": ["\\iiint", "\\oiint"], "supervised_turns": "last", "max_steps": 2, **options},
                     resume_from_checkpoint=str(tmp_path / "run/checkpoint-1")))  # fmt: skip

    for options in ({"supervised_turns": "all"}, {"empty_thinking": True}, {"new_tokens": ["\\oiint", "\\iiint"]}):
        with pytest.raises(InputError, match=f"trained with another {next(iter(options))}; resume with the same"):
            go_on(**options)
    words.write_text("\\iiint\n\\oiiint\n")
    with pytest.raises(InputError, match="trained with another new_tokens; resume with the same"):
        go_on(new_tokens=[str(words)])
    go_on()
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize("tied", [True, False], ids=("tied", "untied"))
def test_rows_of_new_tokens_equal_stock_peft(tied, tiny):
    """Logits and all gradients are those of peft's layer, which copies the whole matrix."""
    found = []
    for fast in (True, False):
        base = load_base(tiny, dtype=torch.float32)
        if not tied:
            base.config.tie_word_embeddings = base.config.text_config.tie_word_embeddings = False
            base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
        make_room(base, {518: [7, 8], 519: [9]})
        torch.manual_seed(0)
        model = add_lora(base, family_in(tiny), components=["language"], r=2, alpha=2, dropout=0.0,
                         trainable_token_indices=token_indices(base, [518, 519]))  # fmt: skip
        if fast:
            train_rows(model)
        logits = model(input_ids=torch.tensor([[518, 5, 519, 518]])).logits
        logits.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append({"logits": logits.detach(), **gradients})
    assert len(found[0]) == 1 + 2 * 21 + (1 if tied else 2)
    for name, values in found[1].items():
        torch.testing.assert_close(found[0][name], values, msg=name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "a"], "new_tokens: 'a' is blank or comes twice"),
        (["  "], "new_tokens: '  ' is blank or comes twice"),
        (["a", "b"], "new_tokens: 'a' and all others are tokens already; leave them out"),
    ],
)
def test_words_that_cannot_become_tokens(words, message, config):
    with pytest.raises(InputError, match=message):
        train(config(new_tokens=words))


def test_words_of_a_file_are_its_lines(tmp_path):
    (tmp_path / "words").write_text(" \\alpha\n\n\\beta\n", encoding="utf-8")
    assert read_words(["x", str(tmp_path / "words")]) == ["x", " \\alpha", "\\beta"]
    (tmp_path / "picture").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"picture: no word and no file of words in UTF-8"):
        read_words([str(tmp_path / "picture")])


def test_new_tokens_in_full_training(config, tmp_path):
    """In a row of the whole model's own matrix."""
    result = train(config(finetuning="full", new_tokens=[r"\frac"], max_steps=1))
    matrix = load_base(result.model_dir, dtype=torch.float32).get_input_embeddings().weight
    assert len(matrix) == 519 and load_processor(result.model_dir).tokenizer.convert_tokens_to_ids(r"\frac") == 518


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about CPUs
def test_loftq_begins_nearer_to_the_unrounded_base(config, tmp_path):
    """Rounding moves the logits, the adapter begins with what takes it back in part, and training goes on from it."""
    pytest.importorskip("bitsandbytes")
    example, found = {"input_ids": torch.tensor([[5, 6, 7, 8]])}, {}
    for name in ("exact", "default", "loftq"):
        options = {} if name == "exact" else {"load_in_4bit": True, "lora_init": name}
        options = config(lora_r=32, lora_components=["language", "vision"], **options)
        model, _ = load_model(options, load_data(options))
        found[name] = model.eval()(**example).logits.detach()
    assert (found["loftq"] - found["exact"]).norm() < 0.7 * (found["default"] - found["exact"]).norm()
    b = [p for name, p in model.named_parameters() if ".visual." in name and ".lora_B." in name]
    assert len(b) == 8 and not any(part.any() for part in b)  # the tower is not rounded: its adapters begin as usual
    result = train(config(lora_init="loftq", load_in_4bit=True, max_steps=1))
    merged = merge(result.adapter_dir, tmp_path / "merged", device="cpu")
    assert merged.merged.mean < 1e-4 and merged.stored.mean < 1e-4 and merged.rounded_base.mean < 1e-4


def test_fused_adapters_compute_what_pissa_and_rslora_are(config, tmp_path):
    """Both are plain LoRA once they have begun, so the fast path takes them, new tokens beside them."""
    options = dict(lora_init="pissa", use_rslora=True, lora_r=16, new_tokens=WORDS[:1], learning_rate=1e-2)
    train(config(output_dir=str(tmp_path / "stock"), **options))
    train(config(output_dir=str(tmp_path / "fused"), fused_lora=True, **options))
    assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "stock"), rel=1e-4)


def test_flattened_groups_step_alike():
    """Three steps of AdamW, two groups with rates of their own: the numbers of stepping each parameter by itself."""
    found = []
    for together in (False, True):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((2, 3), (4,), (3, 2))]
        groups = [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.5}, {"params": []}]
        optimizer = torch.optim.AdamW(groups)
        flats = flatten(optimizer) if together else []
        buffer = GradientBuffer(parameters, [flat.whole for flat in flats])
        for step in range(3):
            buffer.attach()
            sum(((parameter - step) ** 2).sum() for parameter in parameters).backward()
            optimizer.step()
            for parameter in parameters:
                parameter.grad = None  # as model.zero_grad() does
        found.append([parameter.detach().clone() for parameter in parameters])
        assert [len(group["params"]) for group in optimizer.param_groups] == ([1, 1, 0] if together else [2, 1, 0])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
