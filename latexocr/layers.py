"""Norms, gates, activations and rotary positions of transformers' layers, each as one kernel.

Why: as transformers writes them, they are half a dozen kernels each, and each kernel reads and writes whole
activations. `torch.compile` makes one kernel of them too, after half a minute of compilation in every new
environment; these compile while the model loads, and any shape will do.

Modules keep their place, their parameters and their names; only their forward pass changes, and but for experts on a
GPU only.
Everything is computed in float32 and rounded to the type of the input.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import layer_norm
from transformers.activations import QuickGELUActivation

from latexocr import lora
from latexocr.experts import apply_experts
from latexocr.quantization import is_rounded

ROTARY = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision")


def fuse_layers(model: torch.nn.Module) -> None:
    """Let norms, gated MLPs, QuickGELU and rotary positions of `model` run as one kernel each, on a GPU.

    Rotary positions are functions of transformers' modules: they are replaced there, for all models of these
    families in this process; elsewhere than on a GPU they call the function they replace.
    """
    for part in list(model.modules()):
        fused = _fused_class(part)
        if fused is not None:
            part.__class__ = fused
        module = sys.modules[type(part).__module__]
        for name in ROTARY:
            function = getattr(module, name, None)
            if function is not None and not hasattr(function, "replaced") and _turns_halves(function):
                setattr(module, name, _fused_rotary(function))


def fuse_rounded_experts(model: torch.nn.Module) -> None:
    """Stacked experts in 4 bits: transformers cannot compute with them, anywhere."""
    for part in model.modules():
        if is_rounded(part._parameters.get("gate_up_proj")):
            part.__class__ = _fused_class(part)


def _fused_class(part: torch.nn.Module) -> type | None:
    kind = type(part)
    if issubclass(kind, _Fused):
        return None
    if kind is torch.nn.LayerNorm and part.elementwise_affine:
        forward: type = FusedLayerNorm
    elif kind is QuickGELUActivation:
        forward = FusedQuickGELU
    elif kind.__name__.endswith("RMSNorm") and hasattr(part, "variance_epsilon"):
        forward = FusedRMSNorm
    elif all(hasattr(part, name) for name in ("gate_proj", "up_proj", "down_proj")) and _is_silu(part):
        forward = FusedGatedMlp
    elif "gate_up_proj" in part._parameters and hasattr(part, "num_experts") and _is_silu(part):
        forward = FusedExperts
    elif all(hasattr(part, name) for name in ("text_moe", "vision_moe", "shared_experts")):
        forward = FusedModalityExperts
    else:
        return None
    return _with_forward(forward, kind)


@functools.cache
def _with_forward(fused: type, kind: type) -> type:
    """A class like `kind` with the forward pass of `fused`; errors and printed models name `kind`."""
    return type(kind.__name__, (fused, kind), {"__module__": kind.__module__})


def _is_silu(mlp: torch.nn.Module) -> bool:
    return type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


class _Fused:
    """What a module is once it has been fused; never constructed."""


class FusedRMSNorm(_Fused):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (RMSNorm, arXiv:1910.07467)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon) if lora.takes(x) else super().forward(x)


class FusedLayerNorm(_Fused):
    """PyTorch's own kernel, also under autocast, which would make float32 of input and output.

    In full training the weights are float32 and the vision tower's input is not: then they are rounded too.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not lora.takes(x):
            return super().forward(x)
        dtype = min(x.dtype, self.weight.dtype, key=lambda dtype: dtype.itemsize)
        with torch.autocast("cuda", enabled=False):
            x, weight, bias = (tensor.to(dtype) for tensor in (x, self.weight, self.bias))
            return layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class FusedGatedMlp(_Fused):
    """down(silu(gate(x)) * up(x))   (SwiGLU, arXiv:2002.05202)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not lora.takes(x):
            return super().forward(x)
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class FusedExperts(_Fused):
    """`apply_experts`, anywhere: where transformers (5.23) has an index for no expert, it means other ranks' ones."""

    def forward(self, rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        stacks = self.gate_up_proj, self.down_proj
        return apply_experts(rows, index, weights, *stacks, self._activate, self.num_experts)

    def _activate(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        if lora.takes(gate_and_up):
            return _SwiGLU.apply(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=1)
        return self.act_fn(gate) * up


class FusedModalityExperts(_Fused):
    """ERNIE's experts: some see the tokens of text, some those of images, the shared ones see all."""

    def forward(self, x: torch.Tensor, token_types: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers (batch, length, width), and the routers' logits (batch * length, experts).

        Args:
            x: (batch, length, width).
            token_types: (batch, length), 0 is text; None: all are.
        """
        rows = x.flatten(0, -2)
        if token_types is None:
            answers, logits = _routed(self.text_moe, rows, None)
        else:
            shown = token_types.flatten()[:, None] != 0
            (text, text_logits), (vision, vision_logits) = (
                _routed(self.text_moe, rows, shown), _routed(self.vision_moe, rows, ~shown)
            )  # fmt: skip
            answers, logits = text + vision, torch.where(shown, vision_logits, text_logits)
        answers = answers.view_as(x)
        return answers if self.shared_experts is None else answers + self.shared_experts(x), logits


def _routed(
    moe: torch.nn.Module, rows: torch.Tensor, others: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers (tokens, width) and logits (tokens, experts); nothing for rows (tokens, 1) that are others'."""
    logits, weights, index = moe.gate(rows)
    if others is not None:
        index = index.masked_fill(others, moe.num_experts)
    return moe.experts(rows, index, weights), logits


class FusedQuickGELU(_Fused):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _QuickGELU.apply(x) if lora.takes(x) else super().forward(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        from latexocr import kernels

        x = x.contiguous()
        y, scale = kernels.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        from latexocr import kernels

        x, weight, scale = ctx.saved_tensors
        grad = grad.contiguous()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            normed = x.float() * scale.view(*x.shape[:-1], 1)
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        return kernels.rms_norm_backward(grad, x, weight, scale), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    """Of gate and up, or of one tensor (rows, 2 * inner) that holds them side by side."""

    @staticmethod
    def forward(ctx: Any, *given: torch.Tensor) -> torch.Tensor:
        from latexocr import kernels

        given = tuple(tensor.contiguous() for tensor in given)
        ctx.save_for_backward(*given)
        return kernels.swiglu(*_gate_and_up(given))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from latexocr import kernels

        given = ctx.saved_tensors  # read once: checkpointing gives them out once
        grads = tuple(map(torch.empty_like, given))
        kernels.swiglu_backward(grad.contiguous(), *_gate_and_up(given), _gate_and_up(grads))
        return grads


def _gate_and_up(given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return given if len(given) == 2 else given[0].chunk(2, dim=-1)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        from latexocr import kernels

        x = x.contiguous()
        ctx.save_for_backward(x)
        return kernels.quick_gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        from latexocr import kernels

        return kernels.quick_gelu_backward(grad.contiguous(), *ctx.saved_tensors)


class _Rotation(torch.autograd.Function):
    """Pairs (x_i, x_{i + d/2}) turned by their angle (RoFormer, arXiv:2104.09864); the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        from latexocr import kernels

        ctx.save_for_backward(cos, sin)
        return kernels.rotate(x, cos, sin, backward=False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        from latexocr import kernels

        return kernels.rotate(grad, *ctx.saved_tensors, backward=True), None, None


def _turns_halves(function: Callable) -> bool:
    """Whether it turns pairs (x_i, x_{i + d/2}), as `_Rotation` does, and not neighbours, as ERNIE's does.

    Tried and not looked up: on one head of four numbers at an angle of 90 degrees.
    """
    x, cos, sin = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    return torch.equal(function(x, x, cos, sin)[0].flatten(), torch.tensor([-3.0, -4.0, 1.0, 2.0]))


def _fused_rotary(replaced: Callable) -> Callable:
    """`apply_rotary_pos_emb` for (batch, heads, length, head_dim), or its sibling of the vision tower for (length,
    heads, head_dim)."""

    @functools.wraps(replaced)
    def rotary(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        in_rows = q.dim() == 3
        each = [x if in_rows else x.transpose(1, 2) for x in (q, k)]  # (..., heads, head_dim)
        if not lora.takes(q) or args or kwargs or any((*x.shape[:-2], x.shape[-1]) != cos.shape for x in each):
            return replaced(q, k, cos, sin, *args, **kwargs)
        cos, sin = cos.contiguous(), sin.contiguous()
        q, k = (_Rotation.apply(x, cos, sin) for x in each)
        return (q, k) if in_rows else (q.transpose(1, 2), k.transpose(1, 2))

    rotary.replaced = replaced
    return rotary
