"""What a run is at a moment, and what of it a checkpoint holds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rocm.checkpoint import fsdp
from megatron_rocm.model.build import core
from megatron_rocm.model.fsdp import FullySharded

RNG = "rng_state"
FSDP = "fully_sharded"


@dataclass
class State:
    """A run after `iteration` steps."""

    model: list[Any]  # wrapped model chunks
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    iteration: int = 0
    consumed_samples: int = 0

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
    """How megatron-core shards the optimizer in the checkpoint: in a way that any layout can read."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }


def sharded(state: State, *, loading: bool = False) -> dict[str, Any]:
    """The state dict of megatron-core's dist_checkpointing, with Megatron-LM's keys. Values are this rank's shards."""
    how = metadata()
    common = {
        "checkpoint_version": 3.0,
        "iteration": state.iteration,
        "consumed_train_samples": state.consumed_samples,
        "opt_param_scheduler": state.scheduler.state_dict(),
        RNG: rng_state(),
    }
    if isinstance(state.model[0], FullySharded):
        return {
            **common,
            "optimizer": {"step": fsdp.steps(state.optimizer)},
            FSDP: fsdp.sharded(state.model[0], state.optimizer),
        }
    models = {
        name: core(chunk).sharded_state_dict(metadata=how)
        for name, chunk in zip(_model_keys(state), state.model, strict=True)
    }
    optimizer = state.optimizer.sharded_state_dict(models, is_loading=loading, metadata=how)
    return {**common, "optimizer": optimizer, **models}


def restore(state: State, loaded: dict[str, Any]) -> None:
    """Take over what dist_checkpointing has loaded for `sharded(state, loading=True)`."""
    if isinstance(state.model[0], FullySharded):
        fsdp.load(state.model[0], state.optimizer, loaded[FSDP], loaded["optimizer"]["step"])
    else:
        for name, chunk in zip(_model_keys(state), state.model, strict=True):
            core(chunk).load_state_dict(loaded[name])
        state.optimizer.load_state_dict(loaded["optimizer"])
    state.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    state.iteration = loaded["iteration"]
    state.consumed_samples = loaded["consumed_train_samples"]
    if RNG in loaded:
        set_rng_state(loaded[RNG])


def _model_keys(state: State) -> list[str]:
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
