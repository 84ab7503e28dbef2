"""The moving average of the weights: its arithmetic, and what becomes of it in a training."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from latexocr.averaging import WeightAverage
from latexocr.graphs import GradientBuffer
from latexocr.metrics_file import read_metrics
from latexocr.train import train


def test_the_average_by_hand():
    """Weights 1, then 3: with a decay of 0.1 (below 2/11, the most after step 1) 0.1 * 1 + 0.9 * 3 = 2.8; with 0.9
    the first step counts for 9/11."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    often, seldom = WeightAverage(model, 0.1), WeightAverage(model, 0.9)
    address = model.weight.data_ptr()
    model.weight.data.fill_(3.0)
    for average, expected in ((often, 2.8), (seldom, (2 * 1 + 9 * 3) / 11)):
        average.update(1)
        with average.applied():
            assert model.weight.item() == pytest.approx(expected)
        assert model.weight.item() == 3.0
    with often.applied():
        often.restore()  # as for a checkpoint in the middle of a validation
        assert model.weight.item() == 3.0
    assert model.weight.item() == 3.0 and model.weight.data_ptr() == address


@pytest.mark.parametrize("finetuning", ("full", "lora"))
def test_the_average_is_validated_kept_and_resumed(finetuning, config, records, tmp_path):
    """A resumed run repeats the whole one to the last bit; what is kept is the best checkpoint's average."""
    options = dict(finetuning=finetuning, average_weights=0.5, learning_rate=1e-2, val_json=str(records["val"]),
                   eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, max_steps=6,
                   eval_generate_samples=0, save_total_limit=None, output_dir=str(tmp_path / "run"))  # fmt: skip
    whole = train(config(**options))
    name = "model.safetensors" if finetuning == "full" else "adapter_model.safetensors"
    kept = load_file(whole.trained_dir / name)
    best = min((row["eval_loss"], row["step"]) for row in read_metrics(tmp_path / "run") if "eval_loss" in row)[1]
    averages = load_file(tmp_path / f"run/checkpoint-{best}/average.safetensors")
    raw = load_file(tmp_path / f"run/checkpoint-{best}" / name)
    part = "embed_tokens.weight" if finetuning == "full" else "layers.0.mlp.up_proj.lora_A"
    ((of_average,), (of_kept,), (of_raw,)) = (
        [value for key, value in tensors.items() if part in key] for tensors in (averages, kept, raw)
    )
    assert torch.equal(of_average.to(of_kept.dtype), of_kept) and not torch.equal(of_average, of_raw)
    resumed = train(config(**{**options, "resume_from_checkpoint": str(tmp_path / "run/checkpoint-4")}))
    assert resumed.metrics["eval_loss"] == whole.metrics["eval_loss"]
    assert all(torch.equal(value, kept[key]) for key, value in load_file(resumed.trained_dir / name).items())


def test_clipping_the_buffer_is_clipping_its_gradients():
    """Gradients 3 and 4 have the norm 5: clipped to 1 they are 0.6 and 0.8; to 10 they stay."""
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    buffer = GradientBuffer(parameters)
    buffer.attach()
    for parameter, value in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad.fill_(value)
    assert buffer.clip(10.0).item() == 5 and [p.grad.item() for p in parameters] == [3, 4]
    assert buffer.clip(1.0).item() == 5 and [p.grad.item() for p in parameters] == pytest.approx([0.6, 0.8])
