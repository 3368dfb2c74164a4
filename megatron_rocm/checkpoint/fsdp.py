"""A fully sharded model in the same checkpoint format as every other: each rank's rows of each whole parameter.

megatron-core's own way of saving torch's FSDP mixes up the rows of `linear_fc1` and can't cut a parameter into uneven
parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.tensor import DTensor

from megatron_rocm.model.fsdp import FullySharded, Place

OPTIMIZER = "optimizer.state"  # begins the keys of optimizer tensors, as with megatron-core's other optimizers


def tensors(model: FullySharded, optimizer: MegatronOptimizer) -> dict[str, tuple[DTensor, Place]]:
    """Every tensor of model and optimizer that a checkpoint holds, by its name in this process."""
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    found = {name: (parameter, model.places[name]) for name, parameter in model.module.named_parameters()}
    for parameter, main, state in _states(optimizer):
        name = names[id(parameter)]
        place = model.places[name]
        kept = {key: value for key, value in state.items() if key != "step"}
        if main is not parameter:
            kept["fp32_param"] = main
        for key, value in kept.items():
            found[f"{OPTIMIZER}.{key}.{name}"] = value, replace(place, key=f"{OPTIMIZER}.{key}.{place.key}")
    return found


def sharded(model: FullySharded, optimizer: MegatronOptimizer) -> dict[str, ShardedTensor]:
    """This rank's rows of all of them, for megatron-core's dist_checkpointing. Loading writes into the tensors."""
    rows = {name: _rows(tensor, place) for name, (tensor, place) in tensors(model, optimizer).items()}
    return {name: shard for name, shard in rows.items() if shard}


def load(model: FullySharded, optimizer: MegatronOptimizer, loaded: dict[str, torch.Tensor], step: float) -> None:
    """Put what was loaded for `sharded` into model and optimizer, after `step` optimizer steps."""
    with torch.no_grad():
        for name, (tensor, _) in tensors(model, optimizer).items():
            if name in loaded:
                local = tensor.to_local()
                local.copy_(loaded[name].view_as(local))
        for _, _, state in _states(optimizer):
            if "step" in state:
                state["step"].fill_(step)


def steps(optimizer: MegatronOptimizer) -> float:
    """Steps that the optimizer has counted; 0 where it does not count."""
    return max((float(state["step"]) for _, _, state in _states(optimizer) if "step" in state), default=0.0)


def _states(optimizer: MegatronOptimizer) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """(model parameter, the one that is optimized, its optimizer state); the two are one in FP32."""
    for part in optimizer.chained_optimizers:  # type: ignore[attr-defined]
        pairs = [(parameter, parameter) for group in part.optimizer.param_groups for parameter in group["params"]]
        if hasattr(part, "fp32_from_float16_groups"):
            mains = {
                id(main): parameter
                for halves, wholes in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
                for parameter, main in zip(halves, wholes, strict=True)
            }
            pairs = [(mains.get(id(main), main), main) for _, main in pairs]
        for parameter, main in pairs:
            yield parameter, main, part.optimizer.state[main]


def _rows(tensor: DTensor, place: Place) -> ShardedTensor | None:
    """This rank's rows as a part of the whole tensor; None where it has none. FSDP cuts as torch.chunk does."""
    local = tensor.to_local().detach()
    if not local.numel():
        return None
    mesh = tensor.device_mesh
    start = mesh.get_local_rank() * -(-tensor.size(0) // mesh.size())
    shape, offset = tuple(tensor.shape), (start, *(0,) * (tensor.dim() - 1))
    if place.layer is not None and place.layers is not None:
        local, shape, offset = local.unsqueeze(0), (place.layers, *shape), (place.layer, *offset)
    # No fragmentation: the last rank's part may be smaller.
    return ShardedTensor(place.key, local, local.dtype, tuple(local.shape), shape, offset, axis_fragmentations=None)
