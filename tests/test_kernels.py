"""The Triton kernels against plain PyTorch, run by Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import MODEL_TYPES, ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
CODE = """
import json, sys
import torch
from torch.nn.functional import cross_entropy, silu
from latexocr import kernels, lora, loss

torch.manual_seed(0)
found = {}

def check(name, *pairs):
    found[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

for width in (7, 96, 300):
    x, grad = torch.randn(2, 5, width, requires_grad=True), torch.randn(2, 5, width)
    weight = torch.randn(width)
    y, scales = kernels.rms_norm(x.detach(), weight, 1e-6)
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    wanted.backward(grad)
    check(f"rms_norm {width}", (y, wanted), (kernels.rms_norm_backward(grad, x.detach(), weight, scales), x.grad))

gate, up = (torch.randn(3, 1500, requires_grad=True) for _ in range(2))
grad = torch.randn(3, 1500)
wanted = silu(gate) * up
wanted.backward(grad)
grads = kernels.swiglu_backward(grad, gate.detach(), up.detach())
check("swiglu", (kernels.swiglu(gate.detach(), up.detach()), wanted), (grads[0], gate.grad), (grads[1], up.grad))

x = torch.randn(3, 1500, requires_grad=True)
wanted = x * torch.sigmoid(1.702 * x)
wanted.backward(grad)
check("quick_gelu", (kernels.quick_gelu(x.detach()), wanted), (kernels.quick_gelu_backward(grad, x.detach()), x.grad))

for heads, head_dim in ((3, 20), (2, 16)):
    x = torch.randn(2, heads, 4, head_dim).transpose(1, 2).requires_grad_()  # as attention layers hold it
    cos, sin = torch.randn(2, 4, head_dim), torch.randn(2, 4, head_dim)
    left, right = x.chunk(2, dim=-1)
    wanted = x * cos[:, :, None] + torch.cat([-right, left], dim=-1) * sin[:, :, None]
    grad = torch.randn_like(wanted)
    (expected,) = torch.autograd.grad(wanted, x, grad)
    check(f"rotate {heads}x{head_dim}", (kernels.rotate(x.detach(), cos, sin, backward=False), wanted),
          (kernels.rotate(grad, cos, sin, backward=True), expected))

threshold = round(0.25 * 2**16)
for gated, adapters in ((False, 2), (True, 1)):
    seeds, width = torch.arange(3, 3 + adapters), 16 * adapters
    x, up, a = torch.randn(70, 200), torch.randn(70, 200) if gated else None, torch.randn(width, 200)
    grad, gates = torch.randn(70, 200 + width), (x, up) if gated else None
    results = []
    for takes in (False, True):
        lora.takes = lambda x: takes
        down = lora.lora_down(x, up, a, seeds, threshold, 0.5)
        grad_a = lora.lora_grad_a(down, grad[:, 200:], seeds, threshold, 0.5)
        results.append((down, grad_a, *lora.lora_grad_x(grad, gates, a, seeds, threshold, 0.5)))
    for name, one, other in zip(("down", "grad_a", "grad_x", "grad_up"), *results):
        if one is not None:
            check(f"lora_{name} {gated}", (other, one))

sources = [torch.randn(5, 1000), torch.randn(7, 3)]
around = [torch.zeros(5, 1010), torch.zeros(9, 4)]
kernels.Copies([around[0][:, 10:], around[1][1:8, :3]], sources)()
wanted = [torch.cat([torch.zeros(5, 10), sources[0]], 1), torch.nn.functional.pad(sources[1], (0, 1, 1, 1))]
check("copies", *zip(around, wanted))

logits, targets = torch.randn(4, 5000, requires_grad=True), torch.tensor([3, -100, 4999, 0])
wanted = cross_entropy(logits, targets, reduction="none")
(0.5 * wanted.sum()).backward()
rows = logits.detach().clone()
losses = kernels.cross_entropy_in_place(rows, targets, torch.tensor(0.5), -100)
check("cross_entropy", (losses, wanted), (rows, logits.grad))
print(json.dumps(found))
"""


MODEL_CODE = """
import json, sys
import torch
from test_fused import gradients
from latexocr import layers, lora
from latexocr.collate import FlattenedCollator
from latexocr.modeling import add_lora, load_base
from latexocr.records import read_records
from latexocr.train import TrainConfig, load_preprocessor

model_name, data = sys.argv[1:]
config = TrainConfig(model_name_or_path=model_name, train_json=data, use_cpu=True, min_visual_tokens=4)
folder, preprocessor = load_preprocessor(config)
torch.manual_seed(0)
model = add_lora(load_base(folder, dtype=torch.float32), preprocessor.family,
                 components=["language", "vision", "merger"], r=16, alpha=4, dropout=0.0)
for name, parameter in model.named_parameters():
    parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.05)
names = [type(part).__name__ for part in model.modules()]
features = [preprocessor(record) for record in read_records(data)[:2]]
batch = FlattenedCollator(tokenizer=preprocessor.processor.tokenizer, family=preprocessor.family)(features)
loss, grads = gradients(model, dict(batch))
model.zero_grad()
lora.takes = lambda x: True
layers.fuse_layers(model)
fused_names = [type(part).__name__ for part in model.modules()]
lora.FusedLoras(model).prepare()
fused_loss, fused_grads = gradients(model, dict(batch))
print(json.dumps({
    "names": names == fused_names,
    "fused": sum(isinstance(part, layers._Fused) for part in model.modules()),
    "losses": [loss, fused_loss],
    "gradients": len(grads),
    "largest": max(float((fused_grads[name] - grad).norm() / grad.norm()) for name, grad in grads.items()),
}))
"""
# language model: norms and gated MLP of 3 layers, the last norm; tower: norms and activation of 2 blocks, mergers
FUSED = {"qwen2_vl": 3 * 3 + 1 + 2 * 3 + 1, "qwen2_5_vl": 3 * 3 + 1 + 2 * 3 + 1, "qwen3_vl": 3 * 5 + 1 + 2 * 2 + 2}


def run(code: str, *words: object) -> dict:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fused_layers_equal_stock(model_type, tiny_models, records):
    """Loss and every gradient, adapters on all components and norms trained too."""
    found = run(MODEL_CODE, tiny_models[model_type], records["train"])
    assert found["names"] and found["fused"] == FUSED[model_type], found
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-6)
    assert found["gradients"] > 50 and found["largest"] < 1e-4


def test_kernels_equal_plain_pytorch():
    errors = run(CODE)
    assert len(errors) == 16
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}
