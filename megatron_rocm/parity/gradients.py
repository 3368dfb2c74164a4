"""The whole gradient of every parameter, whatever layout it was computed in, and how far two of them lie apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_rocm.checkpoint.convert.table import weights
from megatron_rocm.checkpoint.state import State
from megatron_rocm.config.schema import Model
from megatron_rocm.model import fsdp
from megatron_rocm.model.init import SHARDS, VOCABULARY, global_name
from megatron_rocm.model.llama import core


def whole(state: State, model: Model) -> Iterator[tuple[str, list[Tensor]]]:
    """(name in the undivided model, gradient in FP32) of each parameter that this rank holds a part of.

    To be asked for between forward_backward and the update, by all ranks. Rows that pad the vocabulary are left out.
    Where tensor parallel ranks hold a parameter each for itself (norms), there is one gradient for each of them.
    """
    names = {weight.megatron: weight.local for weight in weights(model)}  # Transformer Engine's are called otherwise
    scale = state.optimizer.get_loss_scale().item()
    for chunk in state.model:
        gradients = _over_data_parallel(chunk)
        for name, parameter in core(chunk).named_parameters():
            copies = _over_tensor_parallel(name, parameter, gradients[name].float() / scale)
            if name.endswith(VOCABULARY):
                copies = [copy[: model.vocab_size] for copy in copies]
            known_as = global_name(core(chunk), name)
            yield names.get(known_as, known_as), copies


def _over_data_parallel(chunk: Any) -> dict[str, Tensor]:
    """Gradients by the parameters' local names, each whole but for tensor parallelism."""
    if isinstance(chunk, fsdp.FullySharded):
        return fsdp.whole_gradients(chunk)
    if not isinstance(chunk, DistributedDataParallel):
        from megatron_rocm.model import megatron_fsdp

        return megatron_fsdp.whole_gradients(chunk)
    if not chunk.ddp_config.use_distributed_optimizer:
        return {name: parameter.main_grad for name, parameter in core(chunk).named_parameters()}
    by_parameter = {parameter: gradient for buffer in chunk.buffers for parameter, gradient in _gathered(buffer)}
    return {name: by_parameter[parameter] for name, parameter in core(chunk).named_parameters()}


def _gathered(buffer: Any) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Each parameter's gradient from a buffer of which every rank has reduced its own part of each bucket alone.

    Source: `_ParamAndGradBucketGroup.start_grad_sync` in megatron/core/distributed/param_and_grad_buffer.py.
    """
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        mine = bucket.grad_data.chunk(group.size())[group.rank()].contiguous()
        gradients = torch.empty_like(bucket.grad_data)
        dist.all_gather_into_tensor(gradients, mine, group=group)
        for parameter in bucket.params_list:
            start, end, _ = buffer.param_index_map[parameter]
            yield parameter, gradients[start - bucket.offset : end - bucket.offset].view(parameter.shape)


def _over_tensor_parallel(name: str, parameter: Tensor, gradient: Tensor) -> list[Tensor]:
    """The undivided gradient; of a parameter that is not divided, every rank's."""
    ranks = mpu.get_tensor_model_parallel_world_size()
    parts = [torch.empty_like(gradient) for _ in range(ranks)]
    dist.all_gather(parts, gradient.contiguous(), group=mpu.get_tensor_model_parallel_group())
    if parameter.dim() == 1:
        return parts
    axis, stacked = next(how for kind, how in SHARDS.items() if name.endswith(kind))
    matrices = zip(*(part.chunk(stacked, axis) for part in parts), strict=True)
    return [torch.cat([torch.cat(matrix, axis) for matrix in matrices], axis)]


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| as vectors; not a number where a gradient is not."""
    apart = torch.linalg.vector_norm(found - expected, dtype=torch.float64).item()
    size = torch.linalg.vector_norm(expected, dtype=torch.float64).item()
    return apart / size if size else (0.0 if apart == 0 else float("inf"))


def write(folder: Path, name: str, gradient: Tensor) -> None:
    """Keep a gradient for `differences`. One file each: no process needs to hold all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    numpy.save(folder / f"{name}.npy", gradient.float().cpu().numpy())


def differences(folder: Path, found: Iterator[tuple[str, list[Tensor]]]) -> dict[str, float]:
    """Each parameter's relative difference to what was written, the largest over all copies that ranks hold.

    Collective; the same on every rank. A parameter that no rank has differs infinitely.
    """
    mine: dict[str, float] = {}
    for name, copies in found:
        expected = torch.from_numpy(numpy.load(folder / f"{name}.npy", mmap_mode="c")).to(copies[0].device)
        mine[name] = _worst([mine.get(name, 0.0), *(relative_difference(copy, expected) for copy in copies)])
    everyones: list[dict[str, float]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return {
        name: _worst([of[name] for of in everyones if name in of] or [float("inf")])
        for name in sorted(path.stem for path in folder.glob("*.npy"))
    }


def _worst(values: list[float]) -> float:
    """The largest, where what is not a number is larger than any."""
    return max(values, key=lambda value: float("inf") if value != value else value)
