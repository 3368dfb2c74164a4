"""Optimizer state and FSDP's weights in a checkpoint: the same whole tensors whatever the layout.

A checkpoint has, for each weight `key` of the model (megatron-core's keys, layers stacked in one tensor):

    key                             the weight, as the model holds it; FP32 with FSDP, which is its own master copy
    optimizer.state.param.key       its FP32 master copy, where that is another tensor
    optimizer.state.exp_avg.key     and so on: what the optimizer remembers of it

Each rank writes the part that it holds, and reads what it is to hold: rows of FSDP, whole shards of tensor parallelism,
and of the distributed optimizer a range of elements, as up to three boxes (the end of a row, whole rows, the beginning
of a row). Nothing is gathered and nothing copied: megatron-core's own way, `fully_reshardable`, puts a whole FP32 copy
of weights and moments, 12 bytes a parameter of the shard, into the host memory of every rank, to save and to load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_rocm.checkpoint.keys import MASTERS, STATE
from megatron_rocm.model.fsdp import FullySharded, Parts, parts_of
from megatron_rocm.model.megatron_fsdp import MegatronFullySharded, replica_of
from megatron_rocm.train import adam_state


@dataclass(frozen=True)
class Held:
    """What this rank holds of one parameter."""

    parts: Parts  # where the tensor parallel shard lies in the checkpoint
    start: int  # of the held elements among those of the shard
    tensors: dict[str, Tensor]  # by what begins their key: as many elements each
    replica: Any  # megatron-core's: all zeros on the rank that writes


def held(model: list[Any], optimizer: MegatronOptimizer, weights: Mapping[str, Any]) -> Iterator[Held]:
    """All that a checkpoint holds beyond `weights`, the model's own sharded state dict (of FSDP: no weights)."""
    if isinstance(model[0], FullySharded):
        wrapper = model[0]
        parts = {id(parameter): wrapper.parts[name] for name, parameter in wrapper.module.named_parameters()}
    elif isinstance(model[0], MegatronFullySharded):
        parts = {id(parameter): place for wrapper in model for parameter, place in wrapper.parts}
    else:
        parts = parts_of(weights)
    for part in adam_state.parts(optimizer):
        ranges = isinstance(part, DistributedOptimizer) and not part.ddp_config.use_megatron_fsdp
        yield from _distributed(part, parts) if ranges else _whole(part, parts)


def _distributed(part: Any, parts: Mapping[int, Parts]) -> Iterator[Held]:
    buckets = (bucket for buffer in part.gbuf_ranges for of_a_type in buffer.values() for bucket in of_a_type)
    for bucket in buckets:
        for parameter, where in bucket["param_map"].items():
            tensors = part._get_main_param_and_optimizer_states(parameter)
            own_master = parameter.dtype != tensors["param"].dtype
            place = parts[id(parameter)]
            replica = (*place[0].replica_id[:2], part.distributed_optimizer_instance_id)
            yield Held(place, where["param"].start, _named(tensors, own_master=own_master), replica)


def _whole(part: Any, parts: Mapping[int, Parts]) -> Iterator[Held]:
    of = {}  # parameter of a master copy
    for masters, parameters in zip(
        getattr(part, "fp32_from_float16_groups", ()), getattr(part, "float16_groups", ()), strict=True
    ):
        of.update({id(master): parameter for master, parameter in zip(masters, parameters, strict=True)})
    for group in part.optimizer.param_groups:
        for master in group["params"]:
            place = parts[id(of.get(id(master), master))]
            tensors = {"param": master, **part.optimizer.state[master]}
            if isinstance(master, DTensor):
                yield _rows(master, tensors, place)
            else:
                yield Held(place, 0, _named(tensors, own_master=id(master) in of), place[0].replica_id)


def _rows(parameter: DTensor, tensors: dict[str, Any], place: Parts) -> Held:
    """FSDP-v2 cuts rows as torch.chunk does, Megatron-FSDP as its buffers end: a rank may have fewer, or none."""
    local = {name: value.to_local() for name, value in tensors.items() if isinstance(value, DTensor)}
    named = {"": local.pop("param"), **_named(local, own_master=False)}
    if hasattr(parameter, "megatron_fsdp_slice"):
        start, replica = parameter.megatron_fsdp_slice.start, replica_of(parameter)
    else:
        mesh = parameter.device_mesh
        row = mesh.get_local_rank() * -(-parameter.size(0) // mesh.size())
        start, replica = row * math.prod(parameter.shape[1:]), 0
    return Held(place, start, named, (*place[0].replica_id[:2], replica))


def _named(tensors: dict[str, Any], *, own_master: bool) -> dict[str, Tensor]:
    """By what begins their keys. `master_param` is an offloading optimizer's second name for `param`."""
    skip = {"step", "master_param"} | (set() if own_master else {"param"})
    return {f"{STATE}{name}.": value for name, value in tensors.items() if name not in skip and value is not None}


def sharded(all_held: Iterator[Held], stored: Collection[str] | None = None) -> dict[str, ShardedTensor]:
    """For megatron-core's dist_checkpointing, under names that mean nothing. Loading writes into the tensors.

    `stored` are the keys of the checkpoint to load from; None to save. KeyError of megatron-core's `load` names what is
    not there.
    """
    boxes: list[ShardedTensor] = []
    for one in all_held:
        for prefix, tensor in one.tensors.items():
            boxes += _boxes(one, tensor, _source(prefix, stored))
    return {str(number): box for number, box in enumerate(boxes)}


def _source(prefix: str, stored: Collection[str] | None) -> Callable[[str], str]:
    """What makes a weight's key the key to read or write."""
    if stored is None or prefix not in MASTERS:
        return lambda key: prefix + key
    return lambda key: next((name + key for name in MASTERS if name + key in stored), prefix + key)


def _boxes(one: Held, tensor: Tensor, name: Callable[[str], str]) -> Iterator[ShardedTensor]:
    """The tensor's elements as boxes of the whole one."""
    flat = tensor.detach().view(-1)
    begin, end = one.start, one.start + flat.numel()
    before = 0  # elements of the parts that came already
    for part in one.parts:
        size = math.prod(part.local_shape)
        first, last = max(begin, before), min(end, before + size)
        for at, corner, shape in boxes(first - before, last - before, part.local_shape):
            start = before + at - begin
            stacked = part.prepend_axis_num
            offset = (shift + more for shift, more in zip(part.global_offset[stacked:], corner, strict=True))
            shape = (1,) * stacked + shape
            yield ShardedTensor(
                name(part.key),
                flat[start : start + math.prod(shape)].view(shape),
                flat.dtype,
                shape,
                part.global_shape,
                (*part.global_offset[:stacked], *offset),
                axis_fragmentations=None,  # boxes differ in size
                replica_id=one.replica,
                allow_shape_mismatch=part.allow_shape_mismatch,
            )
        before += size


def boxes(first: int, last: int, shape: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Cut elements first to last (exclusive) of a vector or matrix into (first element, corner, shape) of boxes."""
    columns = shape[1] if len(shape) == 2 else 1
    while first < last:
        row, column = divmod(first, columns)
        whole = (last - first) // columns
        rows, wide = (1, min(columns - column, last - first)) if column or not whole else (whole, columns)
        yield first, (row, column)[: len(shape)], (rows, wide)[: len(shape)]
        first += rows * wide


def loaded(optimizer: MegatronOptimizer) -> None:
    """Take over what was written into an optimizer's tensors where it works on copies of them in host memory."""
    for part in adam_state.parts(optimizer):
        for on_device, copy in getattr(part.optimizer, "gpu_params_map_cpu_copy", {}).items():
            if copy.dtype == on_device.dtype:  # else it is the master copy, which was written into itself
                copy.data.copy_(on_device)
