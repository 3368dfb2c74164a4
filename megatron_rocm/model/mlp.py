"""The MLP with SwiGLU (Shazeer, arXiv:2002.05202), for where there is no Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from megatron_rocm.model.blocks import blocks


class SwiGluMlp(MLP):
    """megatron-core's MLP; where its fusions are off, with an activation that keeps nothing but its own input.

    A spec names it as it is: of a ModuleSpec megatron-core asks that it be its MLP itself.
    """

    def __init__(self, config: TransformerConfig) -> None:
        linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, linear, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any) -> Any:
        """[s, b, h] → [s, b, h] and no bias."""
        if self.config.bias_activation_fusion:
            return super().forward(hidden_states, per_token_scale, **kwargs)
        both, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(both))


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) · up of [..., gate and up]."""
    return _SwiGlu.apply(both)  # type: ignore[no-any-return,no-untyped-call]


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        flat = both.reshape(-1, both.size(-1))
        width = flat.size(-1) // 2
        out = both.new_empty(len(flat), width)
        for part in blocks(len(flat), width * both.element_size(), both.device):
            gate, up = flat[part].chunk(2, -1)
            torch.ops.aten.silu.out(gate, out=out[part]).mul_(up)
        return out.view(*both.shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        flat = both.reshape(-1, both.size(-1))
        grad, result = grads[0].reshape(len(flat), -1), torch.empty_like(flat)
        for part in blocks(len(flat), grad.size(-1) * both.element_size(), both.device):
            (gate, up), (to_gate, to_up) = flat[part].chunk(2, -1), result[part].chunk(2, -1)
            torch.mul(grad[part], up, out=to_up)
            torch.ops.aten.silu_backward.grad_input(to_up, gate, grad_input=to_gate)
            torch.ops.aten.silu.out(gate, out=to_up).mul_(grad[part])
        return result.view_as(both)
