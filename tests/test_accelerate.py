"""The launcher's configuration files, Slurm's script with stand-ins for Slurm, FSDP2 and ZeRO-3 on two gloo ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils import launch as launch_utils
from conftest import ROOT, as_words, requires
from safetensors import safe_open
from safetensors.torch import load_file
from test_stop import run_until, words
from torch.distributed.fsdp import MixedPrecisionPolicy

from latexocr.errors import InputError
from latexocr.metrics_file import read_metrics
from latexocr.predict import LatexOCR
from latexocr.sharding import check_fsdp, round_as_one_process_does
from latexocr.train import train

FOLDER = ROOT / "scripts" / "accelerate"
KINDS = {"ddp": "MULTI_GPU", "multi_node": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}


def launch_arguments(name: str, *flags: str):
    """What `accelerate launch --config_file NAME.yaml FLAGS scripts/train.py` makes of its file and flags."""
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), *flags, "scripts/train.py", "--config", "my.yaml"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def launch_environment(name: str, *flags: str, monkeypatch) -> tuple[dict[str, str], object]:
    """The environment in which the ranks start, and the arguments of torch's launcher."""
    monkeypatch.setattr(launch_utils, "is_port_in_use", lambda port: False)
    arguments = launch_arguments(name, *flags)
    return launch_utils.prepare_multi_gpu_env(arguments), arguments


def test_each_file_is_read_by_accelerate():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)
    for name, kind in KINDS.items():
        config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
        assert config.distributed_type.value == kind
        assert (config.num_machines, config.num_processes) == ((2, 16) if name == "multi_node" else (1, 8))
        # a precision here would turn autocast on for a model that `dtype: float32` loads in float32
        assert config.mixed_precision == "no"


def test_ddp_takes_the_number_of_gpus_from_the_flag(monkeypatch):
    environment, arguments = launch_environment("ddp", "--num_processes", "4", monkeypatch=monkeypatch)
    assert arguments.nproc_per_node == "4" and int(arguments.master_port) > 0
    assert "ACCELERATE_USE_FSDP" not in environment


def test_nodes_meet_at_the_head_node(monkeypatch):
    flags = ("--machine_rank", "1", "--main_process_ip", "head", "--main_process_port", "20123")
    _, arguments = launch_environment("multi_node", *flags, monkeypatch=monkeypatch)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "head:20123")


def test_zero3_values():
    arguments = launch_arguments("zero3")
    assert arguments.use_deepspeed and arguments.zero_stage == 3
    assert arguments.zero3_init_flag and arguments.zero3_save_16bit_model
    assert arguments.gradient_accumulation_steps == arguments.gradient_clipping == "auto"


def fsdp_environment(monkeypatch) -> dict[str, str]:
    environment, _ = launch_environment("fsdp2", monkeypatch=monkeypatch)
    wanted = {key: value for key, value in environment.items() if key.startswith(("FSDP_", "ACCELERATE_"))}
    assert wanted["ACCELERATE_USE_FSDP"] == "true" and wanted["FSDP_VERSION"] == "2"
    assert wanted["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    return wanted


# accelerate shards on GPUs only; to run its FSDP2 path for real it is enough to tell it that two CPU ranks are GPUs.
ON_CPU = """
import sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType

initialise = PartialState.__init__

def initialise_as_gpus(self, *args, **kwargs):
    initialise(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

PartialState.__init__ = initialise_as_gpus
sys.path[0] = {root!r}
from latexocr.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


OPTIONS = {
    "max_steps": 3, "gradient_accumulation_steps": 1, "lora_r": 8, "lora_dropout": 0.0, "learning_rate": 1e-3,
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1,
    "per_device_eval_batch_size": 2, "max_new_tokens": 8, "dataloader_num_workers": 0, "swanlab_mode": "disabled",
    "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


def train_sharded(launch, tiny, records, output: Path, environment: dict[str, str], **more: object) -> None:
    script = output.parent / "train_on_cpu.py"
    script.write_text(ON_CPU.format(root=str(ROOT)), encoding="utf-8")
    options = {"model_name_or_path": tiny, "train_json": records["train"], "val_json": records["val"], **OPTIONS,
               "per_device_train_batch_size": 4, "output_dir": output, **more}  # fmt: skip
    launch(script, *as_words(options), ranks=2, **environment)


def logged(output: Path, key: str) -> list[float]:
    return [row[key] for row in read_metrics(output / "metrics.jsonl") if key in row]


@pytest.mark.slow
def test_fsdp2_equals_one_process(launch, config, tiny, records, tmp_path, monkeypatch):
    """Same losses, gradients and validation (7 rows on 2 ranks); an adapter that loads; a run that resumes."""
    one, two = tmp_path / "one", tmp_path / "two"
    sharded = fsdp_environment(monkeypatch)
    train_sharded(launch, tiny, records, two, sharded, gradient_checkpointing=True)
    train(config(**OPTIONS, per_device_train_batch_size=8, val_json=str(records["val"]), output_dir=str(one)))
    for key, count in {"loss": 3, "grad_norm": 3, "eval_loss": 2, "eval_edit_distance": 2}.items():
        assert len(logged(one, key)) == count, key
        assert logged(two, key) == pytest.approx(logged(one, key), rel=1e-5), key
    assert (two / "checkpoint-2/pytorch_model_fsdp.bin").is_file()  # it was FSDP, not DDP

    names = {}
    for output in (one, two):
        with safe_open(output / "adapter/adapter_model.safetensors", framework="pt") as file:
            names[output] = set(file.keys())
    assert names[two] == names[one] and len(names[one]) == 42  # 3 layers of 7 projections, A and B
    picture = json.loads(records["val"].read_text())[0]["conversations"][0]["value"]
    assert isinstance(LatexOCR.from_pretrained(two / "adapter")(picture), str)

    shutil.rmtree(two / "checkpoint-3")
    train_sharded(launch, tiny, records, two, sharded, resume_from_checkpoint="true")
    assert logged(two, "loss")[-1] == pytest.approx(logged(one, "loss")[-1], rel=1e-5)
    assert (two / "checkpoint-3").is_dir()


@pytest.mark.slow
def test_fsdp2_rounds_what_one_process_rounds(launch, config, tiny_models, records, tmp_path, monkeypatch):
    """In bfloat16, ERNIE's routers and angles are in float32 all the same, also when layers are computed again."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = {"bf16": True, "gradient_checkpointing": True, "eval_strategy": "no"}
    base = tiny_models["ernie4_5_vl_moe"]
    train_sharded(launch, base, records, two, fsdp_environment(monkeypatch), **options)
    same = {**OPTIONS, **options, "model_name_or_path": str(base), "per_device_train_batch_size": 8}
    train(config(**same, output_dir=str(one)))
    assert logged(two, "loss")[0] == pytest.approx(logged(one, "loss")[0], rel=1e-6)
    for key, rel in {"loss": 1e-3, "grad_norm": 1e-2}.items():
        assert len(logged(one, key)) == 3 and logged(two, key) == pytest.approx(logged(one, key), rel=rel), key


@pytest.mark.slow
def test_fsdp2_trains_every_weight(launch, config, tiny, records, tmp_path, monkeypatch):
    """Same losses and gradients, a model that loads and answers, a run that resumes."""
    one, two = tmp_path / "one", tmp_path / "two"
    sharded, options = fsdp_environment(monkeypatch), {"finetuning": "full", "learning_rate": 1e-4}
    train_sharded(launch, tiny, records, two, sharded, **options)
    batch = {"per_device_train_batch_size": 8, "val_json": str(records["val"])}
    train(config(**{**OPTIONS, **batch, **options, "output_dir": str(one)}))
    for key, count in {"loss": 3, "grad_norm": 3, "eval_loss": 2}.items():
        assert len(logged(one, key)) == count and logged(two, key) == pytest.approx(logged(one, key), rel=1e-4), key
    assert (two / "checkpoint-2/pytorch_model_fsdp.bin").is_file()
    picture = json.loads(records["val"].read_text())[0]["conversations"][0]["value"]
    assert isinstance(LatexOCR.from_pretrained(two / "model")(picture, max_new_tokens=4), str)
    shutil.rmtree(two / "checkpoint-3")
    train_sharded(launch, tiny, records, two, sharded, **options, resume_from_checkpoint="true")
    assert logged(two, "loss")[-1] == pytest.approx(logged(one, "loss")[-1], rel=1e-4)


def train_by_zero3(tiny, records, output: Path, options: dict) -> subprocess.CompletedProcess:
    """DeepSpeed runs on CPUs too; its shards are flat and empty outside of forward passes there as well."""
    options = {"model_name_or_path": tiny, "train_json": records["train"], **OPTIONS, **options}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "zero3.yaml"),
         "--num_processes", "2", str(ROOT / "scripts/train.py"), *as_words(options),
         "--per_device_train_batch_size", "4", "--output_dir", str(output)],
        capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@requires("deepspeed")  # which compiles for minutes
def test_zero3_equals_one_process(config, tiny, records, tmp_path):
    """Same losses, gradients and validation, and a whole adapter with the same numbers."""
    one, two = tmp_path / "one", tmp_path / "two"
    train_by_zero3(tiny, records, two, {"val_json": records["val"], "gradient_checkpointing": True})
    train(config(**OPTIONS, per_device_train_batch_size=8, val_json=str(records["val"]), output_dir=str(one)))
    for key, count in {"loss": 3, "grad_norm": 3, "eval_loss": 2, "eval_edit_distance": 2}.items():
        assert len(logged(one, key)) == count and logged(two, key) == pytest.approx(logged(one, key), rel=1e-5), key
    wanted, found = (load_file(output / "adapter/adapter_model.safetensors") for output in (one, two))
    assert set(found) == set(wanted) and len(wanted) == 42  # 3 layers of 7 projections, A and B
    assert all(torch.allclose(found[name], wanted[name], atol=1e-4) for name in wanted)


@pytest.mark.slow
@requires("deepspeed")  # which compiles for minutes
def test_zero3_trains_every_weight(config, tiny, records, tmp_path):
    """A new token's row and the decay of weights as in one process, all are announced, what was saved answers."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = {"finetuning": "full", "learning_rate": 1e-4, "weight_decay": 100.0, "eval_strategy": "no"}
    done = train_by_zero3(tiny, records, two, {**options, "new_tokens": r"\prod"})
    assert "(100.00%)" in done.stdout
    batch = {"per_device_train_batch_size": 8, "output_dir": str(one)}
    train(config(**{**OPTIONS, **options, **batch, "new_tokens": [r"\prod"]}))
    for key in ("loss", "grad_norm"):
        assert len(logged(one, key)) == 3 and logged(two, key) == pytest.approx(logged(one, key), rel=1e-4), key
    picture = json.loads(records["val"].read_text())[0]["conversations"][0]["value"]
    assert isinstance(LatexOCR.from_pretrained(two / "model")(picture, max_new_tokens=4), str)


def test_fsdp2_rounds_nothing_by_itself():
    """Weights, sums of gradients, what the model returns, what comes into a layer."""
    policy = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16, "output_dtype": torch.bfloat16}
    for adapters, wanted in ((True, (None, torch.float32)), (False, (torch.bfloat16, torch.bfloat16))):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=MixedPrecisionPolicy(**policy))
        round_as_one_process_does(plugin, adapters=adapters)
        found = plugin.mixed_precision_policy
        assert (found.param_dtype, found.reduce_dtype) == wanted
        assert found.output_dtype is None and found.cast_forward_inputs is False
    without = FullyShardedDataParallelPlugin(fsdp_version=2)
    round_as_one_process_does(without, adapters=True)
    assert without.mixed_precision_policy is None


def test_fsdp_settings_that_lose_the_adapter_are_refused():
    full = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}
    check_fsdp(FullyShardedDataParallelPlugin(**full))
    with pytest.raises(InputError, match="set fsdp_state_dict_type: FULL_STATE_DICT"):
        check_fsdp(FullyShardedDataParallelPlugin(fsdp_version=2))  # accelerate's default is sharded
    with pytest.raises(InputError, match="set gradient_checkpointing: true"):
        check_fsdp(FullyShardedDataParallelPlugin(**full, activation_checkpointing=True))
    with pytest.raises(InputError, match="set fsdp_version: 2, see"):
        check_fsdp(FullyShardedDataParallelPlugin(**{**full, "fsdp_version": 1}))


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for Slurm's commands and python, which note their arguments; a job on nodes n7 and n8."""
    programs = {
        "scontrol": '[ "$1" = show ] && printf "n7\\nn8\\n" || echo "scontrol $*" >>"$NOTES"',
        "scancel": 'echo "scancel $*" >>"$NOTES"; kill -TERM $(cat "$NOTES".pid)',
        "srun": 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "${@:3}" || exit; done',
        "python": f'[ "$1" = -c ] && exec {sys.executable} "$@"\necho "python $*" >>"$NOTES"\n'
        'echo $$ >"$NOTES".pid; [ -z "${LONG:-}" ] || { sleep 30 & trap "kill $!; exit 143" TERM; wait; }',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "my.yaml").write_text(f"output_dir: {tmp_path}/run\n", encoding="utf-8")
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"),
        "NOTES": str(tmp_path / "notes"), "SLURM_GPUS_ON_NODE": "8", "SLURM_NNODES": "2", "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NODELIST": "n[7-8]",
    }  # fmt: skip

    def start(**more: str) -> subprocess.Popen:
        command = ["bash", str(FOLDER / "slurm.sbatch"), str(tmp_path / "my.yaml")]
        return subprocess.Popen(command, env={**environment, **more}, stdout=subprocess.PIPE, text=True)

    return start


def test_slurm_starts_one_launcher_a_node(slurm, tmp_path):
    assert slurm().wait(timeout=30) == 0
    first, second = (tmp_path / "notes").read_text().splitlines()
    assert second == first.replace("--machine_rank 0", "--machine_rank 1")
    assert "-m accelerate.commands.launch --config_file scripts/accelerate/multi_node.yaml" in first
    assert "--num_machines 2 --num_processes 16 --main_process_ip n7 --main_process_port 21234" in first
    assert first.endswith(f"scripts/train.py --config {tmp_path}/my.yaml")


def test_slurm_job_queues_again_and_resumes(slurm, tmp_path):
    """SIGUSR1 comes before the time limit: training gets SIGTERM, the job goes back to the queue."""
    job = slurm(LONG="1")
    deadline = time.monotonic() + 30
    while not (tmp_path / "notes.pid").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 143
    assert (tmp_path / "notes").read_text().splitlines()[1:] == [
        "scancel --signal=TERM 41234",
        "scontrol requeue 41234",
    ]

    (tmp_path / "run/checkpoint-5").mkdir(parents=True)
    (tmp_path / "run/checkpoint-5/trainer_state.json").write_text("{}")
    (tmp_path / "notes").unlink()
    assert slurm().wait(timeout=30) == 0
    assert "--resume_from_checkpoint true" in (tmp_path / "notes").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the workers' protection needs sigwaitinfo")
def test_a_signal_to_every_process_of_the_job(tiny, records, tmp_path):
    """Slurm signals the data-loader workers too; a worker that dies must not cost the checkpoint."""
    process = run_until(3, ["setsid", sys.executable, *words(tiny, records, tmp_path)], tmp_path)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert len(list(tmp_path.glob("checkpoint-*/latexocr.json"))) == 1
