"""What a run is at a moment, and what of it a checkpoint holds."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rocm.checkpoint import shards
from megatron_rocm.checkpoint.keys import MASTERS
from megatron_rocm.model.fp8 import scaled_with_delay, without_fp8
from megatron_rocm.model.fsdp import FullySharded
from megatron_rocm.model.llama import core
from megatron_rocm.model.megatron_fsdp import MegatronFullySharded
from megatron_rocm.train import adam_state

RNG = "rng_state"
SHARDS = "shards"
SCALERS = "grad_scalers"


@dataclass
class State:
    """A run after `iteration` steps."""

    model: list[Any]  # wrapped model chunks
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    iteration: int = 0
    consumed_samples: int = 0
    recent_losses: list[float] = field(default_factory=list)  # that the next one is judged by

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Have every parameter gathered, and not gathered again, within this.

        With overlap_param_gather a parameter is stale until the forward pass comes to it: saved then, old weights
        would be saved.
        """
        hooked = [chunk for chunk in self.model if getattr(chunk, "use_forward_hook", False)]
        for chunk in hooked:
            chunk.disable_forward_pre_hook()
        yield
        for chunk in hooked:
            chunk.enable_forward_pre_hook()


def metadata() -> dict[str, Any]:
    """What megatron-core is told of the format; `fully_reshardable` is its name of our optimizer tensors' keys."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }


def sharded(
    state: State, stored: Collection[str] | None = None, form: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The state dict of megatron-core's dist_checkpointing, with Megatron-LM's keys. Values are this rank's shards.

    `stored` are the keys of the checkpoint that it is to be loaded from, and `form` what it says of how it has named
    them; None to save. The optimizer gets its state where it has none yet.
    """
    adam_state.initialize(state.optimizer)
    weights = _weights(state, form or {})
    parts = shards.sharded(shards.held(state.model, state.optimizer, weights), stored)
    for content in weights.values():  # only now: the shards were found by the weights themselves
        without_fp8(content)
    if stored is not None:
        scales = scaled_with_delay(core(state.model[0]).config)
        weights = {name: _as_stored(content, stored, scales=scales) for name, content in weights.items()}
    return {
        "checkpoint_version": 3.0,
        "iteration": state.iteration,
        "consumed_train_samples": state.consumed_samples,
        "recent_losses": state.recent_losses,
        "opt_param_scheduler": state.scheduler.state_dict(),
        "optimizer": _counters(state.optimizer),
        RNG: rng_state(),
        SHARDS: parts,
        **weights,
    }


def restore_weights(state: State, loaded: dict[str, Any]) -> None:
    """Take over what dist_checkpointing has loaded of `sharded(state, stored)`; the shards are in place already."""
    for name, chunk in zip(_weights_of(state), state.model, strict=False):
        core(chunk).load_state_dict(loaded[name])
    shards.loaded(state.optimizer)
    for chunk in state.model:
        if isinstance(chunk, MegatronFullySharded):
            chunk.take_over_weights()


def restore_optimizer(state: State, loaded: dict[str, Any]) -> None:
    """The same for what of the optimizer is one for all parameters: after `restore_weights`."""
    adam_state.set_steps(state.optimizer, adam_state.steps_in(loaded["optimizer"]))
    for part, scaler in zip(_scaled(state.optimizer), loaded["optimizer"].get(SCALERS, ()), strict=False):
        part.grad_scaler.load_state_dict(scaler)


def forget_optimizer(state: State) -> None:
    """Have the optimizer, whose tensors are as before the first step, count from there."""
    adam_state.set_steps(state.optimizer, 0)


def restore_position(state: State, loaded: dict[str, Any], batch: int, batch_now: int) -> None:
    """The same for where training is. A step of `batch` samples was one of the schedule and is, with `batch_now`."""
    schedule = loaded.get("opt_param_scheduler", {"num_steps": loaded["iteration"] * batch})
    updates, rest = divmod(schedule["num_steps"], batch)
    state.scheduler.num_steps = 0
    state.scheduler.step(increment=updates * batch_now + rest * batch_now // batch)
    state.iteration = loaded["iteration"]
    state.consumed_samples = loaded["consumed_train_samples"]
    state.recent_losses = loaded.get("recent_losses", [])
    if RNG in loaded:
        set_rng_state(loaded[RNG])


def begin(state: State) -> None:
    """Where training is before the first step."""
    state.scheduler.num_steps = 0
    state.scheduler.step(increment=0)
    state.iteration = state.consumed_samples = 0
    state.recent_losses = []


def weights_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state dict that `sharded` has made is the model's own: of FSDP nothing."""
    return {name: value for name, value in content.items() if name.startswith("model")}


def _weights(state: State, form: Mapping[str, Any]) -> dict[str, Any]:
    """The model chunks' own sharded state dicts; of FSDP, whose weights checkpoint/shards.py has, none."""
    named = {name: form[name] for name in ("singleton_local_shards", "non_homogeneous_layers") if name in form}
    how = {**metadata(), **named}
    return {
        name: core(chunk).sharded_state_dict(metadata=how)
        for name, chunk in zip(_weights_of(state), state.model, strict=False)
    }


def _as_stored(weights: dict[str, Any], stored: Collection[str], *, scales: bool) -> dict[str, Any]:
    """Transformer Engine's own objects as they are, where the checkpoint has none of them: FSDP does not save them.

    Without `scales`, FP8's delayed ones, they stay so in any case: what Transformer Engine reads of such an object it
    unpickles, whatever is in it.

    A weight in FP32 comes from the master copy where the checkpoint has one: the weight beside it is rounded.
    """
    for entry in weights.values():
        if not isinstance(entry, ShardedObject) and entry.data.dtype == torch.float32:
            entry.key = next((name + entry.key for name in MASTERS if name + entry.key in stored), entry.key)
    return {
        name: LocalNonpersistentObject(entry.data)
        if isinstance(entry, ShardedObject) and not (scales and entry.unique_key in stored)
        else entry
        for name, entry in weights.items()
    }


def _counters(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """What of the optimizer is one for all parameters."""
    return {
        "step": adam_state.steps(optimizer),
        SCALERS: [part.grad_scaler.state_dict() for part in _scaled(optimizer)],
    }


def _scaled(optimizer: MegatronOptimizer) -> list[Any]:
    """The parts that scale the loss: all or none."""
    return [part for part in adam_state.parts(optimizer) if getattr(part, "grad_scaler", None)]


def _weights_of(state: State) -> list[str]:
    """What the model chunks are called in the state dict."""
    if isinstance(state.model[0], (FullySharded, MegatronFullySharded)):
        return []
    return ["model"] if len(state.model) == 1 else [f"model{number}" for number in range(len(state.model))]


def rng_state() -> ShardedObject:
    """This rank's random generators. One object for each place in (pipeline, tensor, data·context) parallelism."""
    sizes = (
        mpu.get_pipeline_model_parallel_world_size(),
        mpu.get_tensor_model_parallel_world_size(),
        mpu.get_data_parallel_world_size(with_context_parallel=True),
    )
    place = (
        mpu.get_pipeline_model_parallel_rank(),
        mpu.get_tensor_model_parallel_rank(),
        mpu.get_data_parallel_rank(with_context_parallel=True),
    )
    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(RNG, states, sizes, place, replica_id=0)


def set_rng_state(states: dict[str, Any]) -> None:
    """What `rng_state` put into its object."""
    random.setstate(states["random_rng_state"])
    numpy.random.set_state(states["np_rng_state"])
    torch.set_rng_state(states["torch_rng_state"])
    torch.cuda.set_rng_state(states["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["rng_tracker_states"])
