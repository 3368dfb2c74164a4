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
from megatron_rocm.train import adam_state

OPTIMIZER = "optimizer.state"  # begins the keys of optimizer tensors, as with megatron-core's other optimizers


def tensors(model: FullySharded, optimizer: MegatronOptimizer) -> dict[str, tuple[DTensor, Place]]:
    """Every tensor of model and optimizer that a checkpoint holds, by its name in this process."""
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    found = {name: (parameter, model.places[name]) for name, parameter in model.module.named_parameters()}
    for parameter, state in _states(optimizer):
        name = names[id(parameter)]
        place = model.places[name]
        for key, value in state.items():
            if key == "step":
                continue
            found[f"{OPTIMIZER}.{key}.{name}"] = value, replace(place, key=f"{OPTIMIZER}.{key}.{place.key}")
    return found


def sharded(model: FullySharded, optimizer: MegatronOptimizer) -> dict[str, ShardedTensor]:
    """This rank's rows of all of them, for megatron-core's dist_checkpointing. Loading writes into the tensors."""
    adam_state.initialize_all(optimizer)
    rows = {name: _rows(tensor, place) for name, (tensor, place) in tensors(model, optimizer).items()}
    return {name: shard for name, shard in rows.items() if shard}


def load(model: FullySharded, optimizer: MegatronOptimizer, loaded: dict[str, torch.Tensor], step: float) -> None:
    """Put what was loaded for `sharded` into model and optimizer, after `step` optimizer steps.

    Raises RuntimeError where the optimizer would go on without what it has to remember, KeyError where a tensor was
    not loaded.
    """
    with torch.no_grad():
        for name, (tensor, _) in tensors(model, optimizer).items():
            local = tensor.to_local()
            if local.numel():
                local.copy_(loaded[name].view_as(local))
    for part in optimizer.chained_optimizers:  # type: ignore[attr-defined]
        for group in part.optimizer.param_groups:
            states = [part.optimizer.state[parameter] for parameter in group["params"]]
            if step and not all("exp_avg" in state for state in states):
                raise RuntimeError(f"{type(part.optimizer).__name__} has no moments to load")
            if step and not any("step" in state for state in states):
                group["step"] = int(step)  # Transformer Engine's and Apex's Adam
            for state in states:
                if "step" in state:
                    state["step"].fill_(step)


def steps(optimizer: MegatronOptimizer) -> float:
    """Steps that the optimizer has counted, for each parameter or for a group; 0 where it does not count."""
    counts = [state["step"] for _, state in _states(optimizer) if "step" in state]
    for part in optimizer.chained_optimizers:  # type: ignore[attr-defined]
        counts += [group["step"] for group in part.optimizer.param_groups if "step" in group]
    return max(map(float, counts), default=0.0)


def _states(optimizer: MegatronOptimizer) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(parameter, its optimizer state); an FSDP parameter is its own master copy."""
    for part in optimizer.chained_optimizers:  # type: ignore[attr-defined]
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, part.optimizer.state[parameter]


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
