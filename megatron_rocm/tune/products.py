"""The products of `shapes` in torch: operands, and the call that training makes for each."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from megatron_rocm.errors import UsageError
from megatron_rocm.tune.shapes import Gemm

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def device() -> torch.device:
    """The GPU that kernels are tried on. Raises UsageError where torch sees none."""
    if not torch.cuda.is_available():
        raise UsageError(f"torch {torch.__version__} sees no GPU: install the torch of this machine's GPUs")
    return torch.device("cuda", torch.cuda.current_device())


def usable(where: torch.device) -> bool:
    """Whether the device still computes, after a kernel that failed."""
    try:
        return bool(torch.ones(1, device=where).item() == 1)
    except RuntimeError:
        return False


def sizes(gemm: Gemm) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of A and B as row-major tensors, which hold what column-major words call the transposed."""
    a = (gemm.m, gemm.k) if gemm.layout[0] == "T" else (gemm.k, gemm.m)
    b = (gemm.k, gemm.n) if gemm.layout[1] == "T" else (gemm.n, gemm.k)
    return a, b


def factors(gemm: Gemm, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Views of B as [n, k] and of A as [k, m], whose product is the result [n, m]."""
    return (b.t() if gemm.layout[1] == "T" else b), (a.t() if gemm.layout[0] == "T" else a)


def multiply(gemm: Gemm, a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """The result [n, m] by the call that training makes; added to `into`, and that, where the product accumulates."""
    return _CALLERS[gemm.by](gemm, a, b, into)


def _by_torch(gemm: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    left, right = factors(gemm, a, b)
    return torch.matmul(left, right)


def _by_apex(gemm: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    """As LinearWithGradAccumulationAndAsyncCommunication in megatron/core/tensor_parallel/layers.py."""
    fused = importlib.import_module("fused_weight_gradient_mlp_cuda")  # built with Apex; of no distribution
    assert into is not None
    add = fused.wgrad_gemm_accum_fp32 if gemm.out == "fp32" else fused.wgrad_gemm_accum_fp16
    add(a, b, into)
    return into


def _by_transformer_engine(gemm: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    """A pass through a Linear of Transformer Engine's, where the wanted one of its three products has our operands."""
    import transformer_engine.pytorch as te

    outputs, inputs = {"forward": (gemm.m, gemm.k), "dgrad": (gemm.k, gemm.m), "wgrad": (gemm.n, gemm.m)}[gemm.phase]
    dtype, where = DTYPES[gemm.dtype], a.device
    layer = te.Linear(
        inputs, outputs, bias=False, params_dtype=dtype, device=where, fuse_wgrad_accumulation=into is not None
    )
    if gemm.phase == "wgrad":
        if into is not None:
            layer.weight.main_grad = into
        layer(a).backward(b)
        return layer.weight.grad if into is None else into  # type: ignore[no-any-return]
    with torch.no_grad():
        layer.weight.copy_(a)
    if gemm.phase == "forward":
        with torch.no_grad():
            return layer(b)  # type: ignore[no-any-return]
    x = torch.zeros(gemm.n, inputs, dtype=dtype, device=where, requires_grad=True)
    layer(x).backward(b)
    assert x.grad is not None
    return x.grad


_CALLERS = {"torch": _by_torch, "te": _by_transformer_engine, "apex": _by_apex}
