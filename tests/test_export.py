"""What `merge` writes: the hub's tensors as we know them and no others, in shards, in 4 bits; how it decodes."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch
from conftest import MODEL_TYPES, SAMPLE
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from latexocr.checkpoint import tensor_headers
from latexocr.errors import InputError
from latexocr.info import inspect
from latexocr.merge import merge
from latexocr.predict import LatexOCR
from latexocr.train import train

PICTURE = SAMPLE / "images/000000.png"
LAYER = "{input,post_attention}_layernorm.weight self_attn.o_proj.weight mlp.{gate,up,down}_proj.weight "
QWEN2 = LAYER + "self_attn.{q,k,v}_proj.{weight,bias}"
PLAIN = LAYER + "self_attn.{q,k,v}_proj.weight"
# Tensor names of the published checkpoints, for tied embeddings: numbers of layers and experts are N, braces as in a
# shell. (prefix of the names that follow, names), ... No hub could be reached. Qwen's names were compared with copies
# of index files (COPIES), the others with what a loader reads: vllm-project/vllm, in vllm/model_executor/models/
# ernie45_vl.py, ernie45_vl_moe.py (experts of text come before those of pictures) and paddleocr_vl.py.
EXPECTED = {
    "qwen2_vl": (  # Qwen/Qwen2-VL-2B-Instruct
        ("model.", "embed_tokens.weight norm.weight"),
        ("model.layers.N.", QWEN2),
        ("visual.", "patch_embed.proj.weight merger.{ln_q,mlp.0,mlp.2}.{weight,bias}"),
        ("visual.blocks.N.", "{norm1,norm2,attn.qkv,attn.proj,mlp.fc1,mlp.fc2}.{weight,bias}"),
    ),
    "qwen2_5_vl": (  # Qwen/Qwen2.5-VL-3B-Instruct
        ("model.", "embed_tokens.weight norm.weight"),
        ("model.layers.N.", QWEN2),
        ("visual.", "patch_embed.proj.weight merger.ln_q.weight merger.mlp.{0,2}.{weight,bias}"),
        ("visual.blocks.N.", "{attn.qkv,attn.proj,mlp.gate_proj,mlp.up_proj,mlp.down_proj}.{weight,bias}"),
        ("visual.blocks.N.", "{norm1,norm2}.weight"),
    ),
    "qwen3_vl": (  # Qwen/Qwen3-VL-2B-Instruct
        ("model.language_model.", "embed_tokens.weight norm.weight"),
        ("model.language_model.layers.N.", PLAIN + " self_attn.{q,k}_norm.weight"),
        ("model.visual.", "patch_embed.proj.{weight,bias} pos_embed.weight"),
        ("model.visual.{merger,deepstack_merger_list.N}.", "{norm,linear_fc1,linear_fc2}.{weight,bias}"),
        ("model.visual.blocks.N.", "{norm1,norm2,attn.qkv,attn.proj,mlp.linear_fc1,mlp.linear_fc2}.{weight,bias}"),
    ),
    "ernie4_5_vl_moe": (  # baidu/ERNIE-4.5-VL-28B-A3B-PT
        ("model.", "embed_tokens.weight norm.weight"),
        ("model.layers.N.", PLAIN + " mlp.gate.{weight,weight_1} mlp.moe_statics.e_score_correction_bias"),
        ("model.layers.N.mlp.{experts.N,shared_experts}.", "{gate,up,down}_proj.weight"),
        ("model.resampler_model.", "{spatial,temporal}_linear.{0,2,3}.{weight,bias} mlp.{weight,bias}"),
        ("model.resampler_model.", "after_norm.weight"),
        ("vision_model.", "patch_embed.proj.weight ln.{weight,bias}"),
        ("vision_model.blocks.N.", "{norm1,norm2,attn.qkv,attn.proj,mlp.fc1,mlp.fc2}.{weight,bias}"),
    ),
    "paddleocr_vl": (  # PaddlePaddle/PaddleOCR-VL
        ("model.", "embed_tokens.weight norm.weight"),
        ("model.layers.N.", PLAIN),
        ("mlp_AR.", "{pre_norm,linear_1,linear_2}.{weight,bias}"),
        ("visual.vision_model.", "embeddings.patch_embedding.{weight,bias} embeddings.position_embedding.weight"),
        ("visual.vision_model.", "post_layernorm.{weight,bias}"),
        ("visual.vision_model.encoder.layers.N.", "{layer_norm1,layer_norm2,mlp.fc1,mlp.fc2}.{weight,bias}"),
        ("visual.vision_model.encoder.layers.N.", "self_attn.{q_proj,k_proj,v_proj,out_proj}.{weight,bias}"),
    ),
}


def expanded(text: str) -> list[str]:
    """
    >>> expanded("a.{b,c}.{d,e}")
    ['a.b.d', 'a.b.e', 'a.c.d', 'a.c.e']
    """
    parts = [part.split(",") if at % 2 else [part] for at, part in enumerate(re.split(r"[{}]", text))]
    return ["".join(pieces) for pieces in itertools.product(*parts)]


def expected_names(model_type: str) -> set[str]:
    words = (prefix + word for prefix, names in EXPECTED[model_type] for word in names.split())
    return {name for word in words for name in expanded(word)}


def names_in(folder) -> set[str]:
    """Of all weights files, with N for the numbers of layers and experts."""
    names = [tensor.name for path in folder.glob("*.safetensors") for tensor in tensor_headers(path)]
    numbered = r"\b(layers|blocks|experts|deepstack_merger_list)\.\d+\."
    return {re.sub(numbered, r"\1.N.", name) for name in names}


# What model.safetensors.index.json lists in public copies of checkpoints of this architecture and size.
# model type -> (times that a name with N stands for, separate heads, tensors)
COPIES = {
    # BrianYAU-NTEC/olmOCR, fine-tuned Qwen2-VL-7B: 28 x 12 + 32 x 12 + 7 + 2 + 1
    "qwen2_vl": ({"model.layers.": 28, "visual.blocks.": 32}, 1, 730),
    # zhanggaojian/Qwen2.5-VL-3B-LLMQ_Samples, models/Qwen2.5-VL-3B-Instruct: 36 x 12 + 32 x 12 + 6 + 2, no head
    "qwen2_5_vl": ({"model.layers.": 36, "visual.blocks.": 32}, 0, 824),
    # sarcascoder/nvidia-reason2, Cosmos-Reason2-8B made of Qwen3-VL-8B: 36 x 11 + 27 x 12 + (1 + 3) x 6 + 3 + 2 + 1
    "qwen3_vl": ({"language_model.layers.": 36, "visual.blocks.": 27, "deepstack_merger_list.": 3}, 1, 750),
}


@pytest.mark.parametrize("model_type", COPIES)
def test_names_are_as_many_as_published(model_type):
    repeated, heads, number = COPIES[model_type]
    names = expected_names(model_type)
    times = [next((n for part, n in repeated.items() if f"{part}N." in name), 1) for name in names]
    assert sum(times) + heads == number


@pytest.fixture(scope="module")
def adapters(tiny_models, records, tmp_path_factory):
    """One step for each family, large enough to matter."""
    from latexocr.train import TrainConfig

    folders = {}
    for model_type in MODEL_TYPES:
        output = tmp_path_factory.mktemp("trained")
        options = dict(max_steps=1, learning_rate=1e-2, lora_alpha=64, dataloader_num_workers=0, save_strategy="no")
        folders[model_type] = train(
            TrainConfig(model_name_or_path=str(tiny_models[model_type]), train_json=str(records["train"]),
                        output_dir=str(output), use_cpu=True, swanlab_mode="disabled", disable_tqdm=True, **options)
        ).adapter_dir  # fmt: skip
    return folders


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_merged_tensors_have_the_hubs_names(model_type, adapters, tiny_models, tmp_path):
    """Names of the published index, names and shapes of the base; in shards; plain greedy decoding."""
    merged = tmp_path / "merged"
    result = merge(adapters[model_type], merged, device="cpu", max_shard_size="1MB")
    assert result.dtype == "float32" and result.stored.largest < 1e-4
    assert names_in(merged) == expected_names(model_type)
    shards = sorted(merged.glob("model-*.safetensors"))
    found = [tensor for path in shards for tensor in tensor_headers(path)]
    base = list(tensor_headers(tiny_models[model_type] / "model.safetensors"))
    assert sorted((tensor.name, tensor.shape) for tensor in found) == [(tensor.name, tensor.shape) for tensor in base]
    index = json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(shards) > 1 and set(index.values()) == {path.name for path in shards} and len(index) == len(found)
    generation = json.loads((merged / "generation_config.json").read_text())
    assert generation.get("do_sample", False) is False and generation.get("repetition_penalty", 1.0) == 1.0
    ocr = LatexOCR.from_pretrained(merged, device="cpu")
    tokenizer = ocr.preprocessor.processor.tokenizer
    end = tokenizer.convert_tokens_to_ids(ocr.preprocessor.family.end_token)
    # ERNIE's template ends an answer with another token than the tokenizer does
    assert generation["eos_token_id"] == (end if end == tokenizer.eos_token_id else [end, tokenizer.eos_token_id])
    assert inspect(merged).parameters == inspect(tiny_models[model_type]).parameters


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about CPUs
def test_four_bits(adapters, tiny, tmp_path):
    """The decoder's layers in 4 bits under the hub's names, the rest as the base; stock transformers reads it too."""
    pytest.importorskip("bitsandbytes")
    whole = merge(adapters["qwen2_vl"], tmp_path / "whole", device="cpu")
    result = merge(adapters["qwen2_vl"], tmp_path / "merged", device="cpu", dtype="4bit")
    assert whole.stored.mean < 1e-4 < result.stored.mean and result.dtype == "4-bit and float32"
    tensors = load_file(tmp_path / "merged/model.safetensors")
    names = {re.sub(r"\.weight\..*", ".weight", name) for name in tensors}
    assert names == set(load_file(tiny / "model.safetensors"))
    rounded = {name for name, tensor in tensors.items() if tensor.dtype == torch.uint8 and name.endswith(".weight")}
    assert len(rounded) == 3 * 7 and all(".layers." in name for name in rounded)
    found = inspect(tmp_path / "merged")
    assert found.parameters == inspect(tiny).parameters and found.quantised
    assert "with 4-bit weights" in (tmp_path / "merged/README.md").read_text()
    assert {path.suffix for path in (tmp_path / "merged").iterdir()} <= {".json", ".safetensors", ".jinja", ".md"}
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert type(stock.model.language_model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(stock.model.visual.blocks[0].attn.qkv) is torch.nn.Linear
    assert isinstance(LatexOCR.from_pretrained(tmp_path / "merged", device="cpu")(PICTURE, max_new_tokens=2), str)


def test_what_cannot_be_merged_is_refused(adapters, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="merge --dtype 4bit needs bitsandbytes, which is not installed"):
        merge(adapters["qwen2_vl"], tmp_path / "merged", dtype="4bit")
    with pytest.raises(InputError, match="max_shard_size is '5 gigs', needs a size such as 5GB or 500MB"):
        merge(adapters["qwen2_vl"], tmp_path / "merged", max_shard_size="5 gigs")
    assert not (tmp_path / "merged").exists()
