"""The state that Transformer Engine's modules keep under delayed scaling, for modules that have none.

Its layout is that of TransformerEngineBaseModule.fp8_meta and init_fp8_meta_tensors in
transformer_engine/pytorch/module/base.py and of DelayedScalingRecipeState in
transformer_engine/pytorch/quantization.py, NVIDIA's 2.11; its update that of kernel_bulk in
transformer_engine/common/recipe/delayed_scaling.cu.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

MOST = 448.0  # of E4M3


def state(length: int, tensors: int) -> Any:
    """As DelayedScalingRecipeState begins."""
    return SimpleNamespace(scale=torch.ones(tensors), amax_history=torch.zeros(length, tensors))


def meta(length: int, algo: str = "max", margin: int = 0) -> dict[str, Any]:
    """`fp8_meta` of a linear layer after its first forward pass."""
    recipe = SimpleNamespace(amax_history_len=length, amax_compute_algo=algo, margin=margin)
    return {
        "fp8_checkpoint": True, "fp8_group": None, "recipe": recipe, "num_gemms": 1, "fp8_max_fwd": MOST,
        "scaling_fwd": state(length, 3), "scaling_bwd": state(length, 2),
    }  # fmt: skip


def update(fp8_meta: dict[str, Any], key: str, *amaxes: float) -> None:
    """After a micro batch with these largest values: they become the newest row. Zero leaves a column as it is."""
    of, recipe = fp8_meta[key], fp8_meta["recipe"]
    for column, amax in enumerate(amaxes):
        history = of.amax_history[:, column]
        if amax:
            history.copy_(torch.cat([history[1:], torch.tensor([amax])]))
            most = history.max() if recipe.amax_compute_algo == "max" else history[-1]
            history[0] = 0.0
            if most.isfinite():
                of.scale[column] = MOST / most / 2.0**recipe.margin


def attach(module: Any, run: Any) -> None:
    """Have `module` remember the largest values of its input, and of its weight once a step."""
    module.fp8_meta = meta(run.fp8.amax_history, run.fp8.amax_algo)
    done = 0

    def see(_: Any, arguments: tuple[Tensor, ...], __: Any) -> None:
        nonlocal done
        weight = float(module.weight.abs().max()) if done % run.training.num_micro_batches == 0 else 0.0
        update(module.fp8_meta, "scaling_fwd", float(arguments[0].abs().max()), weight, 0.0)
        done += 1

    module.register_forward_hook(see)
