"""What each family's file says, held against the models: the same tests for all of them.

Others go through all families where they are about something else: image tokens, counts and masks (test_preprocess),
positions, flattened = padded (test_flatten), fused = stock, checkpointed = not (test_fused), any split of a batch
(test_train), cached features (test_vision_cache), generation (test_decoding), merging (test_inference).
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import MODEL_TYPES
from PIL import Image
from safetensors import safe_open

from latexocr.adapters import add_lora, freeze, load_adapter, trainable_parameters
from latexocr.build import build_config, build_tokenizer
from latexocr.collate import FlattenedCollator, FormulaCollator
from latexocr.dialects import DIALECTS
from latexocr.errors import InputError
from latexocr.families import families, family_of
from latexocr.layers import _turns_halves
from latexocr.merge import merge
from latexocr.metrics_file import read_metrics
from latexocr.modeling import family_in, load_base
from latexocr.preprocess import decode_sample
from latexocr.shapes import SHAPES
from latexocr.train import load_preprocessor, train
from latexocr.trainer import FormulaTrainer

# Parameters of the published checkpoints, as others give them; halved: a size in bytes. In the order below: of
# vdr-2b-multi-v1, made of it (embeddings-benchmark/mteb, vdr_models.py); `total_size` in the index of olmOCR, too
# (BrianYAU-NTEC/olmOCR); `total_size` in a copied index (zhanggaojian/Qwen2.5-VL-3B-LLMQ_Samples); as text encoder of
# Qwen-Image (exo-explore/exo, model_cards.py); 32b, 8b and 0.9b (of version 1.6): what others' code expects.
# ERNIE's is what its shape gives, nobody counted it for us.
PUBLISHED = {
    ("qwen2_vl", "2b"): 2_208_985_600,
    ("qwen2_vl", "7b"): 16_582_751_232 // 2,
    ("qwen2_5_vl", "3b"): 7_509_245_952 // 2,
    ("qwen2_5_vl", "7b"): 16_584_333_312 // 2,
    ("qwen2_5_vl", "32b"): 33_452_718_336,
    ("qwen3_vl", "8b"): 8_767_123_696,
    ("ernie4_5_vl_moe", "28b-a3b"): 29_399_294_336,
    # without positions of packed pictures (32768 x 1152) and a pooling head, which the model does not have
    ("paddleocr_vl", "0.9b"): 958_588_736 - 37_748_736 - 15_238_352,
}
# Layers of the tiny models that adapters land on. Language: three layers of 4 + 3 (ERNIE: one has an MLP, two have
# shared experts). Vision: two layers. Merger: Qwen3-VL has a second one for deepstack, ERNIE works in space and time.
LAYERS = {
    "qwen2_vl": {"language": 21, "vision": 2 * (2 + 2), "merger": 2},
    "qwen2_5_vl": {"language": 21, "vision": 2 * (2 + 3), "merger": 2},
    "qwen3_vl": {"language": 21, "vision": 2 * (2 + 2), "merger": 2 + 2},
    "ernie4_5_vl_moe": {"language": 21, "vision": 2 * (2 + 2), "merger": 2 + 2 + 1},
    "paddleocr_vl": {"language": 21, "vision": 2 * (4 + 2), "merger": 2},
}
EVERYTHING = ["language", "vision", "merger"]
# Names in the published checkpoints: one of each part.
HUB_NAMES = {
    "qwen2_vl": {"model.layers.0.mlp.up_proj.weight", "visual.blocks.0.mlp.fc1.weight", "visual.merger.mlp.0.weight"},
    "qwen2_5_vl": {
        "model.layers.0.mlp.up_proj.weight",
        "visual.blocks.0.mlp.up_proj.weight",
        "visual.merger.mlp.0.weight",
    },
    "qwen3_vl": {
        "model.language_model.layers.0.mlp.up_proj.weight",
        "model.visual.blocks.0.mlp.linear_fc1.weight",
        "model.visual.deepstack_merger_list.0.linear_fc1.weight",
    },
    "ernie4_5_vl_moe": {
        "model.layers.1.mlp.experts.0.up_proj.weight",  # of text
        "model.layers.1.mlp.experts.7.up_proj.weight",  # of images
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.weight_1",
        "model.layers.1.mlp.moe_statics.e_score_correction_bias",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "vision_model.blocks.0.mlp.fc1.weight",
        "model.resampler_model.spatial_linear.0.weight",
    },
    "paddleocr_vl": {
        "model.layers.0.mlp.up_proj.weight",
        "visual.vision_model.encoder.layers.0.mlp.fc1.weight",
        "mlp_AR.linear_1.weight",
    },
}
# The prompt with a picture of two tokens, and the supervised span.
CONVERSATIONS = {
    "qwen2_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    "<|image_pad|>x2<|vision_end|>Read.<|im_end|>\n<|im_start|>assistant\n⟦x ^ 2<|im_end|>⟧",
    "qwen3_vl": "<|im_start|>user\n<|vision_start|><|image_pad|>x2<|vision_end|>Read.<|im_end|>\n"
    "<|im_start|>assistant\n⟦x ^ 2<|im_end|>⟧",  # no system turn of its own
    "ernie4_5_vl_moe": "<|begin_of_sentence|>User: Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|>x2<|IMAGE_END|>Read."
    "\nAssistant: <think>\n\n</think>\n\n⟦x ^ 2<|end_of_sentence|>⟧",
    "paddleocr_vl": "<|begin_of_sentence|>User: <|IMAGE_START|><|IMAGE_PLACEHOLDER|>x2<|IMAGE_END|>Read."
    "\nAssistant:\n⟦x ^ 2</s>⟧",
}
ERNIE = "ernie4_5_vl_moe"
# Behind the last attention nobody looks at image tokens any more.
UNREACHED = r"layers\.2\.mlp\.vision_moe"


def test_every_family_is_tested():
    known = {kind for family in families() for kind in family.model_types}
    assert set(MODEL_TYPES) == known == set(LAYERS) == set(HUB_NAMES) == set(SHAPES) == set(DIALECTS)
    assert {(kind, size) for kind in SHAPES for size in SHAPES[kind]} - set(PUBLISHED) == {
        *((kind, "tiny") for kind in SHAPES), ("qwen2_vl", "base")}  # fmt: skip


@pytest.mark.parametrize(("model_type", "size"), PUBLISHED)
def test_sizes_are_those_of_the_published_checkpoints(model_type, size):
    from transformers import AutoModelForImageTextToText

    config = build_config(model_type, size, build_tokenizer(["x"], DIALECTS[model_type]))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[model_type, size]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_checkpoints_have_the_hubs_names(model_type, tiny_models):
    with safe_open(tiny_models[model_type] / "model.safetensors", framework="pt") as file:
        assert HUB_NAMES[model_type] < set(file.keys())
    load_base(tiny_models[model_type], dtype=torch.float32)  # nothing is missing


@pytest.mark.parametrize("model_type", CONVERSATIONS)
def test_what_is_supervised(model_type, tiny_models, config):
    options = {"prompt": "Read.", "min_visual_tokens": 1}
    _, preprocessor = load_preprocessor(config(model_name_or_path=str(tiny_models[model_type]), **options))
    sample = preprocessor.sample(Image.new("L", (56, 28), 255), "x ^ 2")
    assert decode_sample(sample, preprocessor) == CONVERSATIONS[model_type]


def adapted(folder, components, **options):
    """The tiny model with adapters that do something."""
    options = {"r": 2, "alpha": 2, "dropout": 0.0, **options}
    model = add_lora(load_base(folder, dtype=torch.float32), family_in(folder), components=components, **options)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def learns(parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_lora_lands_on_the_layers_that_are_meant(model_type, tiny_models):
    """Counted: never the patch embedding, never the head, never a router or an expert."""
    for components in (["language"], EVERYTHING):
        found = trainable_parameters(adapted(tiny_models[model_type], components))
        assert {part: layers for part, (_, layers) in found.items()} == {
            part: LAYERS[model_type][part] for part in components
        }


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_ranks_that_get_their_weights_from_rank_0(model_type, tiny_models, monkeypatch):
    """FSDP2 on several GPUs: the same parameters, of the same types, tied alike, and buffers that are filled."""
    loaded = load_base(tiny_models[model_type], dtype=torch.bfloat16)
    monkeypatch.setattr("latexocr.modeling._sent_by_rank_0", lambda: True)
    monkeypatch.setattr("latexocr.modeling.AutoModelForImageTextToText.from_pretrained", None)  # nothing is read
    waiting = load_base(tiny_models[model_type], dtype=torch.bfloat16, for_sharding=True)
    for one, other in ((loaded, waiting), (waiting, loaded)):
        names = dict(other.named_parameters())
        for name, parameter in one.named_parameters():
            for fact in ("shape", "dtype", "requires_grad"):
                assert getattr(parameter, fact) == getattr(names[name], fact), (name, fact)
    assert {parameter.device.type for parameter in waiting.parameters()} == {"cpu"}
    buffers = dict(loaded.named_buffers())
    assert buffers and all(torch.equal(value, buffers[name]) for name, value in waiting.named_buffers())
    monkeypatch.undo()  # whoever reads a model in such a process, to use it, gets its weights
    monkeypatch.setattr("latexocr.modeling._sent_by_rank_0", lambda: True)
    again = load_base(tiny_models[model_type], dtype=torch.bfloat16)
    assert torch.equal(again.lm_head.weight, loaded.lm_head.weight)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_are_where_they_should_be(model_type, tiny_models, batch_of):
    """Adapters on all parts: each has one, nothing else; trained whole: each weight that can have one."""
    batch = batch_of(model_type)
    whole = load_base(tiny_models[model_type], dtype=torch.float32)
    freeze(whole, family_of(model_type), [])
    for model in (adapted(tiny_models[model_type], EVERYTHING), whole):
        model(**{key: value for key, value in batch.items() if key != "logits_to_keep"}).loss.backward()
        assert {name for name, parameter in model.named_parameters() if learns(parameter)} == {
            name for name, parameter in model.named_parameters()
            if parameter.requires_grad and not re.search(UNREACHED, name)
        }  # fmt: skip


@pytest.mark.slow
def test_two_ranks(launch, tiny_models, config, tmp_path):
    """2 ranks of 2 records = one process of 4, adapters everywhere; ERNIE with experts and router loss. The families
    that test_distributed does not know."""
    runs = []
    for model_type in MODEL_TYPES[2:]:
        options = {"router_aux_loss_coef": 1.0} if model_type == ERNIE else {}
        components = [*EVERYTHING, "experts"] if model_type == ERNIE else EVERYTHING
        made = config(model_name_or_path=str(tiny_models[model_type]), max_steps=2, lora_components=components,
                      per_device_train_batch_size=4, gradient_accumulation_steps=1, save_strategy="no",
                      output_dir=str(tmp_path / "one" / model_type), **options)  # fmt: skip
        train(made)
        two = {"per_device_train_batch_size": 2, "output_dir": str(tmp_path / "two" / model_type)}
        runs.append({**made.resolved(), **two})
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    code = "import json, sys; from latexocr.train import TrainConfig, train\n" \
           "for run in json.load(open(sys.argv[1])): train(TrainConfig(**run))"  # fmt: skip
    (tmp_path / "two.py").write_text(code)
    launch(tmp_path / "two.py", tmp_path / "runs.json", ranks=2)
    for model_type in MODEL_TYPES[2:]:
        # the router loss is a product of means over a micro-batch: not the same for every split
        tolerance = 0.02 if model_type == ERNIE else 2e-5
        one, two = (read_metrics(tmp_path / name / model_type / "metrics.jsonl") for name in ("one", "two"))
        for key in ("loss", "grad_norm"):
            found = [[row[key] for row in rows if key in row] for rows in (one, two)]
            assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], rel=tolerance), (model_type, key)


# ERNIE: experts


def routed_to(model, batch) -> dict[str, int]:
    """How many tokens the text experts and the image experts of a sparse layer get, and the logits."""
    found, layer = {}, model.model.language_model.layers[1].mlp
    hooks = [
        getattr(layer, kind).gate.register_forward_pre_hook(
            lambda router, given, kind=kind: found.update({kind: len(given[0])})
        )
        for kind in ("text_moe", "vision_moe")
    ]
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "num_samples", "num_tokens")}
    inputs["image_grid_thw"] = torch.as_tensor(inputs["image_grid_thw"])
    with torch.no_grad():
        found["logits"] = model(**inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("collator", [FormulaCollator, FlattenedCollator])
def test_image_tokens_go_to_the_image_experts(collator, tiny_models, batch_of):
    """Theirs are the placeholders and the two tokens around them; without the token types all would be text."""
    from latexocr.attention import VARLEN, set_attention

    model = load_base(tiny_models[ERNIE], dtype=torch.float32).eval()
    if collator is FlattenedCollator:
        set_attention(model, VARLEN)
    batch = batch_of(ERNIE, collator)
    ids, types = batch["input_ids"], batch["moe_mm_token_type_ids"]
    num_images = 2 * 2 + int((ids == model.config.image_token_id).sum())
    with_types = routed_to(model, batch)
    assert int(types.sum()) == num_images == with_types["vision_moe"]
    assert with_types["text_moe"] == ids.numel() - num_images
    without = routed_to(model, {key: value for key, value in batch.items() if key != "moe_mm_token_type_ids"})
    assert without["text_moe"] == ids.numel() and "vision_moe" not in without
    assert (with_types["logits"] - without["logits"]).abs().max() > 0.1


def test_adapters_on_stacked_experts(tiny_models, batch_of):
    """Named alone or beside others; two sparse layers, experts of text and images, two stacked parameters each."""
    for components, expected in (
        (["experts"], {"experts": 8}),
        (["language", "experts"], {"language": 21, "experts": 8}),
    ):
        model = adapted(tiny_models[ERNIE], components)
        assert {part: layers for part, (_, layers) in trainable_parameters(model).items()} == expected
        batch = {key: value for key, value in batch_of(ERNIE).items() if key != "logits_to_keep"}
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            assert learns(parameter) == ("lora_" in name and not re.search(UNREACHED, name)), name
    with pytest.raises(InputError, match="neither dropout nor DoRA is possible: --lora_dropout 0"):
        adapted(tiny_models[ERNIE], ["experts"], dropout=0.1)
    with pytest.raises(InputError, match="lora_components: 'experts' is none of"):
        adapted(tiny_models["qwen2_vl"], ["experts"])


def test_an_adapter_on_experts_is_saved_loaded_and_merged(tiny_models, config, tmp_path):
    folder = tiny_models[ERNIE]
    result = train(config(model_name_or_path=str(folder), lora_components=["language", "experts"], max_steps=2))
    load_adapter(load_base(folder, dtype=torch.float32), result.adapter_dir, folder)  # every tensor fits
    merged = merge(result.adapter_dir, tmp_path / "merged", device="cpu")
    assert merged.merged.largest < 1e-4 and merged.stored.largest < 1e-4
    merge(result.adapter_dir, tmp_path / "rounded", device="cpu", dtype="bfloat16")
    with safe_open(tmp_path / "rounded/model.safetensors", framework="pt") as file:
        assert HUB_NAMES[ERNIE] < set(file.keys())
        exact = {name for name in file.keys() if file.get_tensor(name).dtype == torch.float32}  # noqa: SIM118
    routers = {"gate.weight", "gate.weight_1", "moe_statics.e_score_correction_bias"}
    assert exact == {f"model.layers.{layer}.mlp.{name}" for layer in (1, 2) for name in routers}


def test_router_loss_is_the_models_own(tiny_models, config, tmp_path, monkeypatch):
    """That of transformers, which adds it to the mean over tokens, for every way to compute a step; a micro-batch
    counts by its supervised tokens."""
    whole, seen = FormulaTrainer._loss, []

    def watched(self, model, inputs, num_items):
        seen.append((inputs, int(num_items)))
        return whole(self, model, inputs, num_items)

    losses = {}
    variants = ({"flatten": False}, {}, {"fused_loss": False}, {"gradient_checkpointing": True})
    for number, options in enumerate(variants):
        with monkeypatch.context() as patch:
            if number == 0:
                patch.setattr(FormulaTrainer, "_loss", watched)
            train(config(model_name_or_path=str(tiny_models[ERNIE]), output_dir=str(tmp_path / str(number)),
                         max_steps=1, router_aux_loss_coef=0.5, gradient_accumulation_steps=2, **options))  # fmt: skip
        rows = read_metrics(tmp_path / str(number) / "metrics.jsonl")
        (losses[number],) = [row["loss"] for row in rows if "loss" in row]
    stock = load_base(tiny_models[ERNIE], dtype=torch.float32)
    stock.config.text_config.output_router_logits, stock.router_aux_loss_coef = True, 0.5
    expected = 0.0
    for inputs, num_items in seen:
        share = int((inputs["labels"] != -100).sum()) / num_items
        inputs = {key: value for key, value in inputs.items() if key != "logits_to_keep"}
        expected += share * stock(**inputs).loss.item()
    assert len(seen) == 2 and losses == pytest.approx(dict.fromkeys(range(4), expected), rel=1e-5)


def test_router_loss_needs_experts(config):
    with pytest.raises(InputError, match="needs a mixture of experts"):
        train(config(router_aux_loss_coef=0.1))


def test_neighbours_are_not_halves():
    """The fused rotary positions turn pairs half a head apart; ERNIE's decoder turns neighbours."""
    from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as ernie
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen

    stock = [getattr(function, "replaced", function) for function in (
        qwen.apply_rotary_pos_emb, ernie.apply_rotary_pos_emb_vision, ernie.apply_rotary_pos_emb)]  # fmt: skip
    assert [_turns_halves(function) for function in stock] == [True, True, False]


def test_parts_of_names():
    for model_type, name, part in (
        ("qwen3_vl", "model.visual.deepstack_merger_list.0.linear_fc1.weight", "merger"),
        ("qwen2_5_vl", "model.visual.blocks.0.attn.qkv.weight", "vision"),
        (ERNIE, "model.vision_tower.blocks.0.attn.qkv.weight", "vision"),
        (ERNIE, "model.resampler_model.mlp.weight", "merger"),
        (ERNIE, "model.language_model.layers.1.mlp.text_moe.experts.gate_up_proj", "experts"),
        (ERNIE, "model.language_model.layers.1.mlp.shared_experts.up_proj.weight", "language"),
        ("paddleocr_vl", "model.projector.linear_1.weight", "merger"),
        ("paddleocr_vl", "lm_head.weight", "embeddings"),
    ):
        assert family_of(model_type).part_of(name) == part
