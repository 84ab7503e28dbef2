"""The Triton kernels against plain PyTorch, run by Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator

import pytest
from conftest import MODEL_TYPES, ROOT, launch_by, warm_python

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
CODE = """
import importlib.util, json, sys, weakref
import torch
from torch.nn.functional import cross_entropy, silu
from latexocr import experts, kernels, layers, lora, loss

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
grads = torch.empty_like(grad), torch.empty_like(grad)
kernels.swiglu_backward(grad, gate.detach(), up.detach(), grads)
check("swiglu", (kernels.swiglu(gate.detach(), up.detach()), wanted), (grads[0], gate.grad), (grads[1], up.grad))

both, grad_y = torch.randn(5, 2 * 300, requires_grad=True), torch.randn(5, 300)
y = layers._SwiGLU.apply(both)
(found_grad,) = torch.autograd.grad(y, both, grad_y)
wanted = silu(both[:, :300]) * both[:, 300:]
check("stacked swiglu", (y, wanted), (found_grad, torch.autograd.grad(wanted, both, grad_y)[0]))

rows, shares, grad_y = torch.randn(8, 300), torch.randn(4, 2), torch.randn(4, 300)
places = torch.randperm(8).view(4, 2)
theirs = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 1]]).bool()
rows[places[~theirs]] = float("nan")
results = []
for takes in (False, True):
    lora.takes = lambda x: takes
    grads = experts.weighted_sum_backward(grad_y, rows, places, shares, theirs)
    results.append((experts.weighted_sum(rows, places, shares, theirs), grads[0][places[theirs]], grads[1]))
check("weighted sum", *zip(*results[::-1]))

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
for adapters in (1, 2):
    seeds, width = torch.arange(3, 3 + adapters), 16 * adapters
    x, a, grad = torch.randn(70, 200), torch.randn(width, 200), torch.randn(70, 200 + width)
    results = []
    for takes in (False, True):
        lora.takes = lambda x: takes
        down = lora.lora_down(x, a, seeds, threshold, 0.5)
        grad_a = lora.lora_grad_a(down, grad[:, 200:], seeds, threshold, 0.5)
        results.append((down, grad_a, lora.lora_grad_x(grad, a, seeds, threshold, 0.5)))
    for name, one, other in zip(("down", "grad_a", "grad_x"), *results):
        check(f"lora_{name} {adapters}", (other, one))

sources = [torch.randn(5, 1000), torch.randn(7, 3)]
around = [torch.zeros(5, 1010), torch.zeros(9, 4)]
kernels.Copies([around[0][:, 10:], around[1][1:8, :3]], sources)()
wanted = [torch.cat([torch.zeros(5, 10), sources[0]], 1), torch.nn.functional.pad(sources[1], (0, 1, 1, 1))]
check("copies", *zip(around, wanted))
source = torch.ones(2, 3)
held = weakref.ref(source)
copies = kernels.Copies([torch.zeros(2, 3)], [source])
del source
assert held() is not None  # else another tensor could be where the kernel reads

for width in (20, 2500):
    table, ids = torch.randn(9, width), torch.tensor([[8, 0, 3], [3, 3, 7]])
    for numbers in (ids, ids.int().T):
        check(f"take_rows {width} {numbers.dtype}", (kernels.take_rows(table, numbers), table[numbers.long()]))

logits, targets = torch.randn(4, 5000, requires_grad=True), torch.tensor([3, -100, 4999, 0])
wanted = cross_entropy(logits, targets, reduction="none")
(0.5 * wanted.sum()).backward()
rows = logits.detach().clone()
losses = kernels.cross_entropy_in_place(rows, targets, torch.tensor(0.5), -100)
check("cross_entropy", (losses, wanted), (rows, logits.grad))

if importlib.util.find_spec("bitsandbytes"):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from latexocr import nf4

    # but for 128, blocks go on in the next row; 8, 4 or 2 weights are read at once
    for rows, columns, rank in ((40, 128, 16), (20, 680, 32), (33, 300, 8), (32, 90, 8)):
        packed, state = quantize_4bit(torch.randn(rows, columns), quant_type="nf4", compress_statistics=True)
        b, zeros = torch.randn(rows, rank), torch.zeros(rows, rank)
        wanted = torch.cat([dequantize_4bit(packed, state), zeros, b, zeros, zeros], 1)
        check(f"4 bits {columns}", (nf4.whole_beside(packed, state, b, rank, 2 * rank), wanted))
        assert nf4.takes(state)
    packed, state = quantize_4bit(torch.randn(3, 10, 128), quant_type="nf4", compress_statistics=True)
    stack = nf4.whole_beside(packed, state, torch.empty(30, 0), 0, 0).view(3, 10, 128)
    check("4 bits, a stack", (stack, dequantize_4bit(packed, state)))
    assert nf4.takes(state)
print(json.dumps(found))
"""


MODEL_CODE = """
import json, sys
import torch
from test_fused import gradients
from latexocr import layers, lora
from latexocr.collate import FlattenedCollator
from latexocr.adapters import add_lora
from latexocr.modeling import load_base
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
model.train().gradient_checkpointing_enable({"use_reentrant": False})
fused_loss, fused_grads = gradients(model, dict(batch))
print(json.dumps({
    "names": names == fused_names,
    "fused": sum(isinstance(part, layers._Fused) for part in model.modules()),
    "losses": [loss, fused_loss],
    "gradients": len(grads),
    "largest": max(float((fused_grads[name] - grad).norm() / grad.norm()) for name, grad in grads.items()),
}))
"""
AUTOCAST_CODE = """
import json, sys
import torch
from latexocr import layers, lora
from latexocr.collate import FlattenedCollator
from latexocr.loss import supervised_loss, supervised_targets
from latexocr.modeling import load_base
from latexocr.records import read_records
from latexocr.train import TrainConfig, load_preprocessor

model_name, data = sys.argv[1:]
config = TrainConfig(model_name_or_path=model_name, train_json=data, use_cpu=True, min_visual_tokens=4)
folder, preprocessor = load_preprocessor(config)
model = load_base(folder, dtype=torch.float32).train()
features = [preprocessor(record) for record in read_records(data)[:2]]
batch = FlattenedCollator(tokenizer=preprocessor.processor.tokenizer, family=preprocessor.family)(features)

def gradients(autocast):
    inputs = dict(batch)
    targets = supervised_targets(inputs.pop("labels"), inputs["logits_to_keep"])
    inputs = {name: value for name, value in inputs.items() if name not in ("num_samples", "num_tokens")}
    inputs["image_grid_thw"] = torch.as_tensor(inputs["image_grid_thw"])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(**inputs, use_cache=False)
    model.zero_grad()
    loss = supervised_loss(outputs.logits, targets, 10)
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

from latexocr.attention import VARLEN, set_attention
set_attention(model, VARLEN)
runs = {"exact": gradients(False), "stock": gradients(True)}
lora.takes = lambda x: True
layers.fuse_layers(model)
runs["fused"] = gradients(True)
exact = runs["exact"][1]

def error(name):
    return float(torch.cat([(runs[name][1][key] - value).flatten() for key, value in exact.items()]).norm()
                 / torch.cat([value.flatten() for value in exact.values()]).norm())

print(json.dumps({
    "losses": [loss for loss, _ in runs.values()],
    "errors": [error("stock"), error("fused")],
    "types": sorted({str(grad.dtype) for grad in runs["fused"][1].values()}),
}))
"""
# language model: norms and gated MLP of 3 layers, the last norm; tower: norms and activation of 2 blocks, mergers
FUSED = {
    "qwen2_vl": 3 * 3 + 1 + 2 * 3 + 1,
    "qwen2_5_vl": 3 * 3 + 1 + 2 * 3 + 1,
    "qwen3_vl": 3 * 5 + 1 + 2 * 2 + 2,
    # the gated MLPs of two layers are their shared experts, beside two kinds of experts in one block
    "ernie4_5_vl_moe": 3 * 3 + 1 + 2 * 3 + 1 + 3 + 2 * 3,
    "paddleocr_vl": 3 * 3 + 1 + 2 * 2 + 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Callable[..., dict]]:
    """Runs code with Triton's interpreter, which is chosen when Triton is imported, and reads what it prints."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    with warm_python(tmp_path_factory.mktemp("triton"), **environment) as python:
        yield lambda code, *words: json.loads(launch_by(python, "-c", code, *words, **environment).stdout)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fused_layers_equal_stock(run, model_type, tiny_models, records):
    """Loss and every gradient, adapters on all components and norms trained too; the fused layers are recomputed."""
    found = run(MODEL_CODE, tiny_models[model_type], records["train"])
    assert found["names"] and found["fused"] == FUSED[model_type], found
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-6)
    assert found["gradients"] > 50 and found["largest"] < 1e-4


@pytest.mark.parametrize("model_type", MODEL_TYPES[:3])  # half a minute each; the others have no layers of their own
def test_fused_layers_under_autocast(run, model_type, tiny_models, records):
    """Full training: float32 weights, 16-bit arithmetic. Fused layers lose hardly more precision than stock ones."""
    found = run(AUTOCAST_CODE, tiny_models[model_type], records["train"])
    exact, stock, fused = found["losses"]
    assert stock == pytest.approx(exact, rel=5e-3) and fused == pytest.approx(exact, rel=5e-3) and fused != exact
    assert found["errors"][1] < 1.5 * found["errors"][0] < 0.1, found
    assert found["types"] == ["torch.float32"]


def test_kernels_equal_plain_pytorch(run):
    errors = run(CODE)
    assert len(errors) == 21 + 5 * (importlib.util.find_spec("bitsandbytes") is not None)
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}
