"""torch's AdamW in one kernel over all parameters, with the gradients' clipping in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch.distributed.tensor import DTensor

from megatron_rocm.train.adam_state import parts


def fuse(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """Switch torch's AdamW to its fused kernel; `optimizer` itself. Those that are not torch's stay as they are.

    megatron-core has no option for it where Transformer Engine and Apex are missing.
    """
    for part in parts(optimizer):
        if type(part.optimizer) is torch.optim.AdamW:
            for group in part.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False
    return optimizer


@contextmanager
def clipped(optimizer: MegatronOptimizer, norm: float) -> Iterator[None]:
    """Within this a step uses gradients, whose norm is `norm`, clipped to the run's CLIP_GRAD.

    The fused kernel divides by a number what it reads anyway; for all others megatron-core scales the gradients first.
    """
    scaled = []
    for part in parts(optimizer):
        most = part.config.clip_grad
        if most <= 0 or norm + 1e-6 <= most:
            continue
        parameters = part.get_parameters()
        if _takes_scale(part.optimizer):
            part.optimizer.grad_scale = torch.tensor((norm + 1e-6) / most, device=parameters[0].device)
            scaled.append(part.optimizer)
        elif parameters:
            aware = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, most, norm, aware)
    try:
        yield
    finally:
        for inner in scaled:
            del inner.grad_scale


def _takes_scale(inner: Any) -> bool:
    groups = inner.param_groups if type(inner) is torch.optim.AdamW else []
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(group.get("fused") for group in groups)
    return bool(parameters) and fused and not any(isinstance(parameter, DTensor) for parameter in parameters)
