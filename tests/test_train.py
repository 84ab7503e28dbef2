"""Training on the CPU with real tiny models: invariants of the loss, checkpoints, resuming, bad input."""

from __future__ import annotations

import json
from multiprocessing.process import BaseProcess

import pytest
import torch
from conftest import MODEL_TYPES, SAMPLE, write_records

from latexocr.adapters import add_lora, trainable_parameters
from latexocr.errors import InputError
from latexocr.loss import supervised_loss, supervised_targets
from latexocr.metrics import METRICS
from latexocr.metrics_file import read_metrics
from latexocr.modeling import family_in, load_base
from latexocr.records import read_records
from latexocr.sampling import EpochSampler
from latexocr.train import load_preprocessor, train
from latexocr.trainer import share_of, spread


def losses(result, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(result.trained_dir.parent / "metrics.jsonl") if key in row]


def test_loss_is_the_mean_over_supervised_tokens():
    """Two rows, three supervised tokens: (0.5 + 1.0 + 1.5) / 3, whatever the micro-batch."""
    vocabulary = 4
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
    logits = torch.zeros(2, 2, vocabulary)
    wanted = {(0, 0): (1, 0.5), (0, 1): (2, 1.0), (1, 1): (3, 1.5)}
    for (row, column), (target, nll) in wanted.items():
        # with one logit x and three zeros, -log softmax = nll gives x = log(3 / (exp(nll) - 1))
        logits[row, column, target] = torch.log(3 / (torch.exp(torch.tensor(nll)) - 1))
    assert supervised_loss(logits, supervised_targets(labels, torch.tensor([0, 1])), 3).item() == pytest.approx(1.0)


def test_image_workers_live_on_over_epochs(config, tmp_path, monkeypatch):
    """Starting them anew at every epoch left two GPUs waiting; the losses are those without workers."""
    started = []
    start = BaseProcess.start
    monkeypatch.setattr(BaseProcess, "start", lambda self: (started.append(self), start(self)))
    options = {"max_steps": -1, "num_train_epochs": 3, "logging_first_step": False}
    alone = losses(train(config(output_dir=str(tmp_path / "0"), **options)))
    assert started == []
    shared = losses(train(config(output_dir=str(tmp_path / "2"), dataloader_num_workers=2, **options)))
    assert len(started) == 2
    assert shared == alone
    assert not any(worker.is_alive() for worker in started)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_8x1_equals_1x8(model_type, tiny_models, config, tmp_path):
    """Micro-batches of one accumulated eight times give the losses and gradients of one batch of eight."""
    model = str(tiny_models[model_type])
    shapes = {"8x1": (8, 1), "1x8": (1, 8), "2x4": (2, 4)}
    results = {
        name: train(
            config(model_name_or_path=model, output_dir=str(tmp_path / name), per_device_train_batch_size=batch,
                   gradient_accumulation_steps=accumulation)
        )
        for name, (batch, accumulation) in shapes.items()
    }  # fmt: skip
    for name in ("1x8", "2x4"):
        assert losses(results[name]) == pytest.approx(losses(results["8x1"]), rel=1e-5)
        assert losses(results[name], "grad_norm") == pytest.approx(losses(results["8x1"], "grad_norm"), rel=1e-4)


def test_first_loss_equals_one_by_one_arithmetic(config, tmp_path):
    """The logged loss of step one, from forward passes over single records and plain addition."""
    options = config(max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    logged = losses(train(options))[0]
    folder, preprocessor = load_preprocessor(options)
    model = load_base(folder, dtype=torch.float32).eval()
    records = read_records(options.train_json)
    order = list(EpochSampler([1] * len(records), seed=options.seed))[:8]
    total, tokens = 0.0, 0
    for index in order:
        sample = preprocessor(records[index])
        batch = {key: value[None] for key, value in sample.items() if value.dim() == 1 and key != "labels"}
        with torch.no_grad():
            logits = model(
                **batch, pixel_values=sample["pixel_values"], image_grid_thw=sample["image_grid_thw"]
            ).logits[0]
        for position, label in enumerate(sample["labels"].tolist()):
            if label != -100:
                total -= float(logits[position - 1].log_softmax(-1)[label])
                tokens += 1
    assert logged == pytest.approx(total / tokens, rel=1e-5)


def test_resumed_equals_uninterrupted(config, records, tmp_path):
    """Dropout on, evaluations on the way, a log line that spans the checkpoint: the same numbers to the last bit."""
    options = dict(max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
                   val_json=str(records["val"]), lora_dropout=0.1, save_total_limit=None, logging_steps=3,
                   logging_first_step=False, max_new_tokens=2)  # fmt: skip
    whole = train(config(output_dir=str(tmp_path / "whole"), **options))
    for step in (2, 4):
        resumed = train(
            config(
                output_dir=str(tmp_path / "whole"),
                resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"),
                **options,
            )
        )
        assert losses(resumed) == losses(whole)
        assert losses(resumed, "eval_loss") == losses(whole, "eval_loss")
        assert [row["step"] for row in read_metrics(tmp_path / "whole/metrics.jsonl") if "loss" in row] == [3, 6]


def test_every_checkpoint_holds_everything(config, records, tmp_path):
    result = train(config(val_json=str(records["val"]), save_strategy="steps", save_steps=1, eval_strategy="steps",
                          eval_steps=1, save_total_limit=None, eval_generate_samples=3))  # fmt: skip
    run = tmp_path / "run"
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3", "adapter"):
        found = {path.name for path in (run / name).iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "tokenizer.json",
                "chat_template.jinja", "latexocr.json"} <= found, name  # fmt: skip
    contract = json.loads((run / "checkpoint-2/latexocr.json").read_text())
    assert contract["training"]["step"] == 2 and contract["training"]["train_records"] == 24
    assert contract["prompt"].startswith("Write the LaTeX")
    assert {"eval_loss", "eval_exact_match", "eval_edit_distance", "eval_bleu"} <= set(result.metrics)
    assert (run / "config.yaml").is_file()
    evaluations = [row for row in read_metrics(run / "metrics.jsonl") if "eval_loss" in row]
    assert result.metrics["eval_edit_distance"] == min(row["eval_edit_distance"] for row in evaluations)


def test_loss_falls(config):
    found = losses(train(config(max_steps=15, learning_rate=1e-2, lora_alpha=64)))
    assert sum(found[-3:]) / 3 < 0.8 * found[0]


def test_early_stopping(config, records):
    """With a learning rate of zero nothing improves: two evaluations without progress end the run."""
    result = train(config(val_json=str(records["val"]), eval_strategy="steps", eval_steps=1, save_strategy="steps",
                          save_steps=1, max_steps=9, learning_rate=0.0, early_stopping_patience=2,
                          eval_generate_samples=2))  # fmt: skip
    assert len(losses(result)) == 3


def test_the_end_is_a_full_evaluation_of_the_kept_weights(config, records, tmp_path):
    """Every validation has the cheap metrics, its answers are kept, and the best one's are scored with pictures."""
    result = train(config(val_json=str(records["val"]), eval_strategy="steps", eval_steps=1, save_strategy="steps",
                          save_steps=1, learning_rate=1e-2, eval_generate_samples=5))  # fmt: skip
    run = tmp_path / "run"
    assert {path.name for path in (run / "validation").iterdir()} == {f"step-{step}.jsonl" for step in (1, 2, 3)}
    lines = [row for row in read_metrics(run / "metrics.jsonl") if "eval_loss" in row]
    cheap = {f"eval_{name}" for name, metric in METRICS.items() if not metric.needs_pictures}
    assert all(cheap <= line.keys() and "eval_glyph_f1" not in line for line in lines)
    found = json.loads((run / "evaluation/metrics.json").read_text())
    best = min(lines, key=lambda line: line["eval_edit_distance"])
    assert {name: found[name.removeprefix("eval_")] for name in cheap} == pytest.approx({n: best[n] for n in cheap})
    assert {"glyph_f1", "picture_match", "bleu_low", "bleu_high"} <= found.keys() and found["num_rows"] == 5
    assert result.metrics | {f"eval_{name}": value for name, value in found.items()} == result.metrics


def test_the_best_checkpoint_by_pictures(config, records, tmp_path):
    train(config(val_json=str(records["val"]), eval_strategy="steps", eval_steps=1, save_strategy="steps",
                 save_steps=1, learning_rate=1e-2, eval_generate_samples=5, metric_for_best_model="render_rate",
                 max_steps=2))  # fmt: skip
    lines = [row for row in read_metrics(tmp_path / "run") if "eval_loss" in row]
    assert len(lines) == 2 and all("eval_render_rate" in line for line in lines)
    best = max(lines, key=lambda line: line["eval_render_rate"])["step"]
    assert json.loads((tmp_path / "run/adapter/latexocr.json").read_text())["training"]["step"] == best


def test_announcement(config, records, capsys):
    train(config(val_json=str(records["val"]), max_steps=1))
    printed = capsys.readouterr().out
    assert "trainable   49,152 (" in printed  # see test_lora_lands_on_the_language_model
    assert "language 49,152 in 21 layers" in printed
    assert "train       24 records, 0 dropped" in printed and "validation  7 records" in printed
    assert "steps       1 of 8 records (2 a device x 4 accumulated x 1 ranks), 3 an epoch" in printed
    assert "<|im_start|>assistant\n⟦" in printed


def test_lora_lands_on_the_language_model(tiny):
    """3 layers x 7 linear layers; r 8 x (inputs + outputs) of each: q, o 128+128, k, v 128+64, MLP 128+256."""
    model = add_lora(
        load_base(tiny, dtype=torch.float32), family_in(tiny), components=["language"], r=8, alpha=16, dropout=0.0
    )
    assert trainable_parameters(model) == {"language": (8 * 3 * (2 * 256 + 2 * 192 + 3 * 384), 21)}


@pytest.mark.parametrize(
    ("components", "found"),
    [
        (["attention"], {"vision": 4, "language": 12}),
        (["language.mlp"], {"language": 9}),
        (["merger", "vision.attention"], {"vision": 4, "merger": 2}),
        (["vision", "mlp"], {"vision": 8, "language": 9}),
    ],
)
def test_lora_on_a_part_a_kind_or_one_of_one(components, found, tiny_models):
    """Qwen2-VL: three decoder layers (4 + 3 linear layers each), two vision blocks (2 + 2), a merger of 2."""
    folder = tiny_models["qwen2_vl"]
    model = add_lora(load_base(folder, dtype=torch.float32), family_in(folder), components=components,
                     r=2, alpha=2, dropout=0.0)  # fmt: skip
    assert {part: count for part, (_, count) in trainable_parameters(model).items()} == found


def test_epoch_sampler_covers_each_sample_once_and_pads_with_masked():
    sampler = EpochSampler([7] * 5, batch_size=2, ranks=2, seed=0)
    first = list(sampler)
    assert len(sampler) == len(first) == 8 and sorted(first) == [-1, -1, -1, 0, 1, 2, 3, 4]
    assert set(first[:4]) == set(list(EpochSampler([7] * 5, seed=0))[:4])  # a step's samples on any number of ranks
    sampler.epoch = 1
    assert sorted(sampler) == sorted(first) and list(sampler) != first
    assert len(EpochSampler([7] * 5, seed=0)) == 5


def test_ranks_get_equally_many_tokens():
    """One step of two ranks with two samples each: 9 + 1 and 6 + 5 tokens."""
    lengths = [9, 6, 5, 1]
    dealt = list(EpochSampler(lengths, batch_size=2, ranks=2, seed=0))
    assert [[lengths[index] for index in dealt[at : at + 2]] for at in (0, 2)] == [[9, 1], [6, 5]]


def test_shares_cover_every_row_once():
    rows = spread(100, 7)
    assert rows == [0, 14, 28, 42, 57, 71, 85] and spread(3, 7) == [0, 1, 2] and spread(3, 0) == []
    shares = [share_of(rows, rank, 3) for rank in range(3)]
    assert shares == [[0, 42, 85], [14, 57, -1], [28, 71, -1]]


def test_tensorboard_by_option(config, tmp_path):
    train(config(report_to="tensorboard", max_steps=1))
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_fixed_images_are_an_option(config):
    result = train(config(image_mode="fixed", max_steps=1))
    assert json.loads((result.adapter_dir / "latexocr.json").read_text())["image_policy"]["mode"] == "fixed"


def test_bad_training_input(config, tmp_path):
    empty = write_records(tmp_path / "empty.json", [])
    with pytest.raises(InputError, match=r"empty\.json: holds no records"):
        train(config(train_json=str(empty)))
    with pytest.raises(InputError, match="train_json is not set"):
        train(config(train_json=None))
    with pytest.raises(InputError, match="nothing is left to use"):
        train(config(max_length=20))
    with pytest.raises(InputError, match=r"lora_components: 'langauge' is none of .*did you mean 'language'"):
        train(config(lora_components=["langauge"]))
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        train(config(resume_from_checkpoint="true", output_dir=str(tmp_path / "never")))
    broken = write_records(tmp_path / "broken.json", [(str(SAMPLE / "images/000000.png"), "x"), ("none.png", "y")])
    with pytest.raises(InputError, match=r"broken\.json record 1 \(none\.png\): no such image file"):
        train(config(train_json=str(broken)))
    assert not (tmp_path / "never").exists() and not (tmp_path / "run/metrics.jsonl").exists()


def test_two_runs_are_never_mixed(config, tmp_path):
    train(config(max_steps=1))
    with pytest.raises(InputError, match="holds an earlier run"):
        train(config(max_steps=1))
    train(config(max_steps=2, overwrite_output_dir=True))
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in row] == [1, 2]


def test_an_output_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        train(config(output_dir=str(tmp_path / "file" / "run")))


def test_unknown_model_type(config, tiny, tmp_path):
    strange = tmp_path / "strange"
    strange.mkdir()
    values = json.loads((tiny / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**values, "model_type": "qwen2_vll"}))
    with pytest.raises(InputError, match=r"unknown model type 'qwen2_vll'; did you mean 'qwen2_vl'\?"):
        train(config(model_name_or_path=str(strange)))
    with pytest.raises(InputError, match="no such folder, and not a hub id"):
        train(config(model_name_or_path="nowhere"))


def test_the_adapter_says_which_step_it_is(config, records, tmp_path):
    """adapter/ holds the best checkpoint's weights, and its contract that checkpoint's step and scores."""
    result = train(config(val_json=str(records["val"]), eval_strategy="steps", eval_steps=1, save_strategy="steps",
                          save_steps=1, max_steps=3, metric_for_best_model="eval_loss", learning_rate=1e-2,
                          eval_generate_samples=0, save_total_limit=None))  # fmt: skip
    evaluations = {row["step"]: row["eval_loss"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row}
    best = min(evaluations, key=evaluations.get)
    training = json.loads((result.adapter_dir / "latexocr.json").read_text())["training"]
    assert training["step"] == best and training["evaluation"]["eval_loss"] == evaluations[best]
    assert result.metrics["eval_loss"] == evaluations[best]
    weights = [
        (tmp_path / f"run/{name}/adapter_model.safetensors").read_bytes() for name in ("adapter", f"checkpoint-{best}")
    ]
    assert weights[0] == weights[1]


def test_mean_loss_counts_the_whole_run_after_resuming(config, tmp_path):
    options = dict(
        save_strategy="steps", save_steps=1, logging_steps=2, logging_first_step=False, save_total_limit=None
    )
    whole = train(config(output_dir=str(tmp_path / "run"), **options))
    resumed = train(config(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"), **options))
    finished = train(config(resume_from_checkpoint="true", **options))
    assert 5 < whole.metrics["train_loss"] < 8
    for result in (resumed, finished):
        assert result.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=1e-6)


def test_a_wrong_swanlab_mode_is_refused_at_once(config, tmp_path):
    with pytest.raises(InputError, match="not one of online, local, offline, disabled"):
        train(config(swanlab_mode="onlin"))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_discarded_for_a_start_that_fails(config, tmp_path):
    train(config(max_steps=1))
    with pytest.raises(InputError, match="langauge"):
        train(config(max_steps=1, overwrite_output_dir=True, lora_components=["langauge"]))
    assert (tmp_path / "run/adapter/latexocr.json").is_file() and (tmp_path / "run/metrics.jsonl").is_file()


def test_resuming_passes_over_a_half_written_checkpoint(config, tmp_path):
    train(config(max_steps=2, save_strategy="steps", save_steps=1))
    (tmp_path / "run/checkpoint-7").mkdir()
    result = train(config(max_steps=3, save_strategy="steps", save_steps=1, resume_from_checkpoint="true"))
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [
        1,
        2,
        3,
    ] and result.stopped_by == 0


def test_resuming_with_other_options_is_refused(config, tiny_models, tmp_path):
    train(config(max_steps=1))
    with pytest.raises(InputError, match="trained with another lora_r; resume with the same options"):
        train(config(max_steps=2, lora_r=4, resume_from_checkpoint="true"))
    with pytest.raises(InputError, match="trained with another prompt"):
        train(config(max_steps=2, prompt="Read it.", resume_from_checkpoint="true"))
    other = str(tiny_models["qwen2_5_vl"])
    with pytest.raises(InputError, match="trained with another base model"):
        train(config(max_steps=2, model_name_or_path=other, resume_from_checkpoint="true"))


def test_pictures_cannot_choose_where_no_reference_renders(config, records, tmp_path):
    rows = json.loads(records["val"].read_text(encoding="utf-8"))
    for row in rows:
        row["conversations"][0]["value"] = str(records["val"].parent / row["conversations"][0]["value"])
        row["conversations"][1]["value"] = r"\undefinedthing"
    (tmp_path / "val.json").write_text(json.dumps(rows), encoding="utf-8")
    options = config(
        val_json=str(tmp_path / "val.json"), output_dir=str(tmp_path / "run"), eval_generate_samples=2,
        max_new_tokens=4, metric_for_best_model="glyph_f1",
    )  # fmt: skip
    with pytest.raises(InputError, match="glyph_f1, but no reference of the validation renders"):
        train(options)
