"""What training calls for each product gives that product: torch, a Linear of Transformer Engine's, Apex's kernel."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rocm.errors import UsageError
from megatron_rocm.tune import products
from megatron_rocm.tune.judge import judge
from megatron_rocm.tune.shapes import LAYOUTS, Caller, Gemm, Phase

CPU = torch.device("cpu")


class Multiply(torch.autograd.Function):
    """y = x·Wᵀ with Transformer Engine's way of weight gradients: added to `main_grad` where they are fused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fused: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fused, ctx.weight = fused, weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (dy,) = grads
        dw = dy.t().float() @ x.float()
        if ctx.fused:
            ctx.weight.main_grad += dw
        return dy @ weight, torch.zeros_like(weight) if ctx.fused else dw.to(weight.dtype), None


class Linear(torch.nn.Module):
    """What is used of transformer_engine.pytorch.Linear (transformer_engine/pytorch/module/linear.py)."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, params_dtype: torch.dtype, device: torch.device,
        fuse_wgrad_accumulation: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        assert not bias
        self.weight = torch.nn.Parameter(torch.zeros(out_features, in_features, dtype=params_dtype, device=device))
        self.fused = fuse_wgrad_accumulation

    def forward(self, x: Tensor) -> Any:
        return Multiply.apply(x, self.weight, self.fused)  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine and Apex as modules that do the same in torch."""
    te = types.ModuleType("transformer_engine.pytorch")
    te.Linear = Linear  # type: ignore[attr-defined]
    apex: Any = types.ModuleType("fused_weight_gradient_mlp_cuda")
    apex.wgrad_gemm_accum_fp32 = lambda x, dy, grad: grad.add_(dy.t().float() @ x.float())
    package: Any = types.ModuleType("transformer_engine")
    package.pytorch = te
    for module in (package, te, apex):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def gemm(phase: Phase, by: Caller, accumulates: bool = False) -> Gemm:
    out = "fp32" if accumulates else "bf16"
    return Gemm("fc1", phase, 96, 80, 256, LAYOUTS[phase], "bf16", out, accumulates, count=1, by=by)  # type: ignore[arg-type]


CASES: tuple[tuple[Phase, Caller, bool], ...] = (
    ("forward", "torch", False), ("dgrad", "torch", False), ("wgrad", "torch", False),
    ("forward", "te", False), ("dgrad", "te", False), ("wgrad", "te", False), ("wgrad", "te", True),
    ("wgrad", "apex", True),
)  # fmt: skip


@pytest.mark.parametrize(("phase", "by", "accumulates"), CASES)
def test_each_call_is_the_product(phase: Phase, by: Caller, accumulates: bool) -> None:
    verdict = judge(gemm(phase, by, accumulates), CPU)
    assert verdict.right, verdict


def test_a_cpu_is_no_device_to_tune_on() -> None:
    with pytest.raises(UsageError, match="sees no GPU"):
        products.device()
    assert products.usable(CPU)
