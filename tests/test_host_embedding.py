"""Embeddings that stay in the host's memory: what is refused, and that the table stays where and as it is."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import MODEL_TYPES, requires, untied

from latexocr.adapters import add_lora
from latexocr.decoding import KeyValues
from latexocr.errors import InputError
from latexocr.host_embedding import HostEmbedding, host_tables, keep_on_host
from latexocr.metrics_file import read_metrics
from latexocr.modeling import check_untied, family_in, fresh_base, load_base
from latexocr.quantization import Quantization, is_rounded
from latexocr.train import train

requires_bitsandbytes = requires("bitsandbytes")
IDS = torch.tensor([[5, 1, 5, 9]])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_table_stays_as_it_is(model_type, tiny_models):
    """Out of the parameters, in the same place under the same name, the same answers."""
    model = fresh_base(tiny_models[model_type]).eval()
    wanted = model(input_ids=IDS).logits
    names, table = sorted(model.state_dict()), model.get_input_embeddings().weight.detach().clone()
    keep_on_host(model)
    assert torch.equal(model(input_ids=IDS).logits, wanted)
    assert sorted(model.state_dict()) == names

    model.to("meta", torch.bfloat16)  # a device without memory
    (kept,) = host_tables(model)
    assert kept is model.get_input_embeddings().weight and torch.equal(kept, table)
    assert kept.device.type == "cpu" and kept.dtype == torch.float32 and not kept.requires_grad
    assert model.device.type == "meta" and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert type(model.get_input_embeddings()) is HostEmbedding


def test_it_is_saved_and_read_like_any_other(tiny, tmp_path):
    model = load_base(untied(tiny, tmp_path / "base"), dtype=torch.float32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    keep_on_host(model)
    address = host_tables(model)[0].data_ptr()
    host_tables(model)[0].zero_()
    assert not model.load_state_dict(state).missing_keys
    assert torch.equal(host_tables(model)[0], state["model.language_model.embed_tokens.weight"])
    assert host_tables(model)[0].data_ptr() == address  # CUDA graphs read there


def test_a_head_that_is_tied_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r"offload_embeddings: the table of embeddings in .* is its head, too; leave"):
        check_untied(tiny, "offload_embeddings")
    check_untied(untied(tiny, tmp_path / "base"), "offload_embeddings")


def test_what_it_does_not_go_with(config, monkeypatch):
    for more, message in (
        ({"finetuning": "full"}, "offload_embeddings freezes embeddings, which finetuning full trains: leave one out"),
        ({"new_tokens": [r"\frac"]}, "offload_embeddings freezes embeddings, which new_tokens trains: leave one out"),
        ({"fsdp": "full_shard"}, "offload_embeddings needs weights that are not sharded"),
        ({"use_cpu": True}, "offload_embeddings saves memory of a GPU"),
    ):
        with pytest.raises(InputError, match=message):
            config(offload_embeddings=True, **more)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="offload_embeddings serves one GPU, not several ranks"):
        config(offload_embeddings=True)


@requires_bitsandbytes
def test_as_many_layers_are_rounded(tiny, tmp_path):
    """`device` may be a word, too. Three layers of seven projections."""
    base, options = untied(tiny, tmp_path / "base"), {"device": "cpu", "quantization": Quantization()}
    for host in (False, True):
        model = load_base(base, dtype=torch.float32, offload_embeddings=host, **options)
        assert sum(map(is_rounded, model.parameters())) == 21 and len(host_tables(model)) == host


@requires_bitsandbytes
def test_answers_of_rounded_weights_are_kept_in_16_bits(tiny_models, tmp_path):
    """ERNIE's decoder comes before its tower: without the table, its first weights that are whole are adapters."""
    base = untied(tiny_models["ernie4_5_vl_moe"], tmp_path / "base")
    model = load_base(base, dtype=torch.bfloat16, device="cpu", quantization=Quantization())
    keep_on_host(model)
    add_lora(model, family_in(base), components=["language"], r=4, alpha=8, dropout=0.0)
    assert model.dtype == torch.float32 and KeyValues(model, rows=1, length=8)._store.dtype == torch.bfloat16


@pytest.mark.parametrize("rounded", [False, pytest.param(True, marks=requires_bitsandbytes)])
def test_training_is_the_same(rounded, tiny, config, records, tmp_path, capsys):
    """Losses and answers; a run may go on with or without it. Without a GPU the table is not pinned."""
    base, found = untied(tiny, tmp_path / "base"), {}
    options = dict(model_name_or_path=str(base), val_json=str(records["val"]), eval_strategy="steps", eval_steps=1,
                   load_best_model_at_end=False, load_in_4bit=rounded)  # fmt: skip
    for name, host, resume in (("gpu", False, None), ("host", True, None), ("host", False, "checkpoint-2")):
        again = str(tmp_path / name / resume) if resume else None
        made = config(**options, output_dir=str(tmp_path / name), resume_from_checkpoint=again)
        made.offload_embeddings = host  # refused by TrainConfig on a CPU
        train(made)
        announced = capsys.readouterr().out
        assert ("on cpu, embeddings on the host" in announced) is host
        rows = [{key: row[key] for key in ("loss", "grad_norm", "eval_loss", "eval_edit_distance") if key in row}
                for row in read_metrics(tmp_path / name)]  # fmt: skip
        found[name, resume] = [*filter(None, rows), re.findall(r"[\d,]+ parameters|trainable .*", announced)]
    first, *others = found.values()
    assert len(first) == 3 + 3 + 1 and all(other == first for other in others)
