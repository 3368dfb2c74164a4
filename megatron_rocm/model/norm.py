"""Root mean square normalization for where there is no Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_rocm.model.blocks import blocks


class RMSNorm(torch.nn.RMSNorm):
    """x · weight / sqrt(mean(x²) + eps) over the last dimension (Zhang and Sennrich, arXiv:1910.07467).

    megatron-core's own wrapper of torch's norm refuses sequence parallelism, where each rank sees a part of the tokens
    and the weight's gradients must be summed over the tensor-parallel ranks. `finalize_model_grads` does that for
    weights marked `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] → [..., h]."""
        if x.is_cuda:
            return super().forward(x)  # one kernel there, a chain of them on a CPU
        return rms_norm(x, self.weight, self.eps or 0.0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula above for `x` [..., h]; arithmetic is in FP32."""
    return _RmsNorm.apply(x, weight, eps)  # type: ignore[no-any-return,no-untyped-call]


class _RmsNorm(torch.autograd.Function):
    """Keeps its input and one number per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat, out = x.reshape(-1, x.size(-1)), x.new_empty(x.shape)
        flat_out = out.view_as(flat)
        inverses, wide = torch.empty(len(flat), 1, device=x.device), weight.float()
        for part in blocks(len(flat), x.size(-1) * 4, x.device):
            rows, inverse = flat[part].float(), inverses[part]
            torch.linalg.vector_norm(rows, dim=-1, keepdim=True, out=inverse)
            inverse.square_().div_(x.size(-1)).add_(eps).rsqrt_()
            torch.mul(rows * inverse, wide, out=flat_out[part])
        ctx.save_for_backward(x, weight, inverses)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverses = ctx.saved_tensors
        flat, size = x.reshape(-1, x.size(-1)), x.size(-1)
        grad, result = grads[0].reshape(-1, size), x.new_empty(x.shape)
        flat_result, wide = result.view_as(flat), weight.float()
        to_weight = torch.zeros_like(wide)
        for part in blocks(len(flat), size * 4, x.device):
            normed, given = flat[part] * inverses[part], grad[part].float()
            through = given * normed
            to_weight += through.sum(0)
            mean = torch.mv(through, wide).div_(size).unsqueeze(1)
            change = (given * wide).addcmul_(normed, mean, value=-1)
            torch.mul(change, inverses[part], out=flat_result[part])
        return result, to_weight.to(weight.dtype), None
