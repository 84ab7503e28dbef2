"""Defaults < YAML < command line, and what a wrong name or type is answered with."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from latexocr.config import TrainOptions, option_table, parse_train_arguments, train_help, typed_values
from latexocr.errors import InputError


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    from latexocr.train import TrainConfig

    (tmp_path / "c.yaml").write_text("lora_r: 8\nlearning_rate: 2e-4\nnum_train_epochs: 3\n")
    values = parse_train_arguments(["--config", str(tmp_path / "c.yaml"), "--lora-r", "16", "--use_cpu"])
    config = TrainConfig.from_dict(values)
    assert (config.lora_r, config.learning_rate, config.num_train_epochs) == (16, 2e-4, 3.0)
    assert (config.lora_alpha, config.max_length, config.use_cpu) == (16, 2048, True)


def test_the_recipe_is_the_tutorials():
    options = TrainOptions()
    assert (options.lora_r, options.lora_alpha, options.lora_dropout) == (64, 16, 0.05)
    assert (options.learning_rate, options.num_train_epochs) == (1e-4, 2.0)
    assert (options.per_device_train_batch_size, options.gradient_accumulation_steps) == (4, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_rank": 8}, "unknown option 'lora_rank'; did you mean 'lora_r'?"),
        ({"lora_r": "many"}, "option 'lora_r' is 'many', needs a whole number"),
        ({"lora_r": 8.5}, "option 'lora_r' is 8.5, needs a whole number"),
        ({"lora_dropout": True}, "option 'lora_dropout' is True, needs a number"),
        ({"overlong": "cut"}, "option 'overlong' is 'cut', needs 'drop' or 'error'"),
        ({"lora_components": 3}, "option 'lora_components' is 3, needs a list"),
    ],
)
def test_wrong_options(values, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        typed_values(TrainOptions, values)


def test_text_becomes_what_the_field_needs():
    typed = typed_values(
        TrainOptions,
        {"lora_r": "8", "learning_rate": "1e-4", "logging_first_step": "false", "save_total_limit": "none",
         "lora_components": "language,vision", "resume_from_checkpoint": "True"},
    )  # fmt: skip
    assert typed == {
        "lora_r": 8, "learning_rate": 1e-4, "logging_first_step": False, "save_total_limit": None,
        "lora_components": ["language", "vision"], "resume_from_checkpoint": "True",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a\n- b\n", "needs lines of the form 'name: value'"), ("a: [", "not a YAML file"), (None, "no such config")],
)
def test_bad_yaml(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        parse_train_arguments(["--config", str(path)])


def test_a_word_that_is_no_flag():
    with pytest.raises(InputError, match=r"unexpected argument 'data.json'"):
        parse_train_arguments(["data.json"])


def test_options_that_do_not_go_together():
    from latexocr.train import TrainConfig

    with pytest.raises(InputError, match="eval_strategy is 'steps', but there is no val_json"):
        TrainConfig.from_dict({"eval_strategy": "steps", "use_cpu": True})
    with pytest.raises(InputError, match="early_stopping_patience needs a val_json"):
        TrainConfig.from_dict({"early_stopping_patience": 2, "use_cpu": True})
    with pytest.raises(InputError, match="per_device_train_batch_size is 0, needs at least 1"):
        TrainConfig.from_dict({"per_device_train_batch_size": 0, "use_cpu": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dataloader_num_workers -1", "dataloader_num_workers is -1, needs at least 0"),
        ("--dataloader_persistent_workers true --dataloader_num_workers 0", "dataloader_num_workers 0 starts none"),
        ("--learning_rate -1", "learning_rate is -1, needs at least 0"),
        ("--logging_steps 0", "logging_steps is 0, needs more than 0"),
        ("--save_strategy steps --save_steps 0", "save_steps is 0, needs more than 0"),
        ("--lora_dropout 1", "lora_dropout is 1, needs a share from 0 to below 1"),
        ("--lora_r 0", "lora_r is 0, needs at least 1"),
        ("--report_to tensorbord", "report_to is 'tensorbord'; did you mean 'tensorboard'? (one of none,"),
        ("--report_to swanlab", "report_to swanlab: SwanLab follows a run by itself (--swanlab_mode); name others"),
        ("--report_to clearml", "report_to clearml: its package is not installed"),
        ("--fsdp full_shard", "fsdp shards over several processes, and this is one: start with accelerate launch"),
        ("--deepspeed no.json", "deepspeed is not installed: pip install deepspeed"),
        ("--lr_scheduler_type foo", "option 'lr_scheduler_type': foo is not a valid SchedulerType"),
        ("--optim foo", "option 'optim': foo is not a valid OptimizerNames"),
        ("--save_strategy foo", "option 'save_strategy': foo is not a valid SaveStrategy"),
        ("--val_json v --eval_strategy steps --load_best_model_at_end true --save_strategy epoch",
         "found - Evaluation strategy: steps - Save strategy: epoch"),
        ("--load_best_model_at_end true", "load_best_model_at_end needs a validation to judge by: add --val_json"),
        ("--save_strategy best", "save_strategy best keeps what validation finds best, and there is none: add"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_used(options, message):
    """Each is refused with its name before anything is loaded, not by Trainer in a traceback."""
    from latexocr.train import TrainConfig

    for package in ("deepspeed", "clearml"):
        if package in options and find_spec(package):
            pytest.skip(f"{package} is installed")
    with pytest.raises(InputError, match=re.escape(message)):
        TrainConfig.from_dict(parse_train_arguments(f"{options} --use_cpu".split()))


def test_numbers_that_nothing_reads_may_be_anything(config):
    """Also a configuration that an earlier version saved when everything that is installed was reported to."""
    made = config(save_strategy="no", save_steps=0, logging_strategy="no", logging_steps=0, eval_steps=0,
                  num_train_epochs=0, max_steps=3, report_to=["none", "swanlab"])  # fmt: skip
    assert "swanlab" not in (made.report_to or [])
    for name, value in {"lora_r": "8", "learning_rate": "1e-4"}.items():
        with pytest.raises(InputError, match=f"{name} is '{value}', needs a number|cannot be used"):
            config(**{name: value})


def test_a_keyword_that_is_no_option():
    from latexocr.train import TrainConfig

    with pytest.raises(InputError, match="unknown option 'max_lenght'; did you mean 'max_length'"):
        TrainConfig(max_lenght=3)


def test_options_that_would_be_ignored_are_refused():
    from latexocr.train import TrainConfig

    for name, value in (
        ("label_smoothing_factor", 0.1), ("train_sampling_strategy", "group_by_length"), ("push_to_hub", True),
        ("hub_model_id", "me/mine"), ("remove_unused_columns", True),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"{name} is set to .* has no effect here"):
            TrainConfig.from_dict({name: value, "use_cpu": True})
    with pytest.raises(InputError, match=r"hub_token is set, but .* leave it out; latexocr upload sends"):
        TrainConfig.from_dict({"hub_token": "secret", "use_cpu": True})
    with pytest.raises(InputError, match="needs eval_generate_samples above 0"):
        TrainConfig(metric_for_best_model="eval_bleu", eval_generate_samples=0, val_json="v.json", use_cpu=True)
    with pytest.raises(InputError, match="early_stopping_patience needs evaluations"):
        TrainConfig(early_stopping_patience=1, eval_strategy="no", val_json="v.json", use_cpu=True)


def test_what_picks_the_best_checkpoint():
    from latexocr.train import TrainConfig

    def picks(name: str | None):
        found = TrainConfig(metric_for_best_model=name, val_json="v.json", use_cpu=True)
        return found.greater_is_better, found.picks_by_pictures

    assert picks(None) == picks("eval_loss") == picks("runaway_rate") == (False, False)
    assert picks("exprate_1") == picks("eval_bleu") == (True, False)
    assert picks("eval_render_rate") == picks("glyph_f1") == (True, True)
    message = r"'eval_blue' is not measured; did you mean 'bleu'\? \(one of loss, exact_match, .*exprate_1"
    with pytest.raises(InputError, match=message):
        picks("eval_blue")


def test_yaml_no_and_none(tmp_path):
    from latexocr.train import TrainConfig

    (tmp_path / "c.yaml").write_text("eval_strategy: no\nsave_strategy: no\nreport_to: none\nuse_cpu: true\n")
    config = TrainConfig.from_dict(
        parse_train_arguments(["--config", str(tmp_path / "c.yaml"), "--report_to", "none"])
    )
    assert (config.eval_strategy.value, config.save_strategy.value) == ("no", "no")
    assert config.report_to in ("none", [], ["none"])


def test_checkpoints_follow_the_evaluations():
    from latexocr.train import TrainConfig

    config = TrainConfig(eval_strategy="steps", eval_steps=7, val_json="v.json", use_cpu=True)
    assert (config.save_strategy.value, config.save_steps, config.load_best_model_at_end) == ("steps", 7, True)


def test_every_option_has_help():
    table = option_table()
    assert len(table) == len(TrainOptions.__dataclass_fields__) > 30
    assert all(text for _, _, text in table)
    assert "--lora_r  " in train_help()


def test_resolved_configuration_can_be_loaded_again(tmp_path):
    import yaml

    from latexocr.train import TrainConfig

    config = TrainConfig(lora_r=8, warmup_steps=5, use_cpu=True, train_json=tmp_path / "t.json",
                         overwrite_output_dir=True,
                         lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-6})  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.resolved()))
    again = TrainConfig.from_dict(parse_train_arguments(["--config", str(tmp_path / "c.yaml")]))
    assert (again.lora_r, again.warmup_steps, again.train_json) == (8, 5, str(tmp_path / "t.json"))
    assert again.lr_scheduler_kwargs == {"min_lr": 1e-6} and not again.overwrite_output_dir
    assert again.resolved() == config.resolved()


def test_help_answers_at_once():
    """Half a second is promised; the best of three, because the machine may be busy."""
    verbs = ("data2csv", "csv2json", "preview", "plan", "train", "evaluate", "score", "predict", "merge", "build")
    for verb in verbs:
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "latexocr", verb, "--help"], capture_output=True, text=True)
            seconds.append(time.perf_counter() - started)
        assert done.returncode == 0 and "--" in done.stdout, done.stderr
        assert min(seconds) < 0.5, (verb, seconds)
