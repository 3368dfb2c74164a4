"""FP8 where Transformer Engine is installed: whether it can, and what becomes of weights that it keeps in FP8."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.platform import transformer_engine

# Recipe → the question that Transformer Engine answers for the GPU it finds (transformer_engine/pytorch/fp8.py).
QUESTIONS = {
    "delayed": "is_fp8_available",
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}


def require(run: RunConfig) -> None:
    """Raise UsageError where the installed Transformer Engine can't do this run's FP8, with what is missing."""
    uses = ["fp8", f"fp8 {run.fp8.recipe}"]
    if run.fp8.param_gather:
        uses.append("fp8 parameters")
    if run.training.recompute:
        uses.append("recompute")
    lacking = transformer_engine.missing(uses)
    if lacking:
        raise UsageError(f"TE_FP8=1: the installed Transformer Engine does not fit. {'. '.join(lacking)}")
    question = QUESTIONS[run.fp8.recipe]
    ask: Any = getattr(importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager, question)
    able, why = ask()
    if not able:
        raise UsageError(
            f"TE_FP8_RECIPE={run.fp8.recipe}: Transformer Engine refuses it here ({why}); set another TE_FP8_RECIPE "
            "(docs/fp8.md), or TE_FP8=0"
        )


def scaled_with_delay(config: TransformerConfig) -> bool:
    """Whether scales are kept from one micro batch to the next, as Transformer Engine's `_extra_state`."""
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def set_weight(parameter: Any, values: Tensor) -> None:
    """Give a weight its initial value. One kept in FP8 has it in BF16 beside it, for the optimizer's master copy."""
    parameter.copy_(values)
    if is_float8tensor(parameter) and hasattr(parameter, "get_high_precision_init_val"):
        parameter.get_high_precision_init_val().copy_(values)


def plain(value: Tensor) -> Tensor:
    """`value`, or what a tensor in FP8 stands for."""
    return dequantize_fp8_tensor(value) if is_float8tensor(value) else value


def without_fp8(weights: Mapping[str, Any]) -> None:
    """Have BF16 copies in the place of FP8 tensors in a model's sharded state dict: what checkpoints hold."""
    for entry in weights.values():
        if not isinstance(entry, ShardedObject):
            entry.data = plain(entry.data)
