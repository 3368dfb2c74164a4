"""Megatron-FSDP (megatron-core's own fully sharded data parallelism), and with replicas HSDP.

Parameters, gradients and optimizer state lie in flat buffers, cut over the ranks that share one copy of the model;
with HSDP there are several copies, whose gradients are added up. A rank's part of a parameter is a range of whole rows.

The wrapper is megatron-core 0.16.1's, put right where it is wrong. What it can't do (optimizers other than Adam, a
single rank to shard over, FP16) resolve/rules.py refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.fsdp import mcore_fsdp_adapter as adapter
from megatron.core.distributed.fsdp.src.megatron_fsdp.utils import FSDPDistributedIndex
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import DeviceMesh

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.model.fsdp import Parts, parts_of, to_meta
from megatron_rocm.model.llama import core


def settings(run: RunConfig) -> dict[str, Any]:
    """What of DistributedDataParallelConfig makes it this way of sharding."""
    return {
        "use_megatron_fsdp": True,
        "data_parallel_sharding_strategy": "optim_grads_params",
        "num_distributed_optimizer_instances": run.parallel.hsdp_replicas if run.parallel.hsdp else 1,
        # So many elements may be gathered ahead, or wait to be reduced: two layers', as megatron-core means to. Left to
        # itself it takes the larger of that and 1e9 where the smaller is meant (megatron_fsdp.py:392), and so gathers
        # all of a model below 500 million parameters at once.
        "suggested_communication_unit_size": 2 * _layer_elements(run),
    }


def _layer_elements(run: RunConfig) -> int:
    model, heads = run.model, run.model.num_attention_heads + run.model.num_query_groups
    matrices = 2 * heads * model.kv_channels + 3 * model.ffn_hidden_size
    return model.hidden_size * (matrices // run.parallel.tp + 2)


class Called(torch.nn.Module):
    """`module`, called: MegatronFSDP.forward runs the forward of what it wraps without that module's own hooks.

    Among them is the one by which a backward pass is begun and ended. Where no Float16Module lies between, it hangs on
    the last submodule alone (megatron_fsdp.py:1025), and what changes that one's output in place takes it away: every
    micro batch but the first then adds its gradients as many times as a bucket has parameters.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class MegatronFullySharded(adapter.FullyShardedDataParallel):
    """`model`, a GPTModel in its wrappers, cut over the data parallel ranks layer by layer. It has no values yet.

    `parts` has each parameter as the optimizer knows it, and where its tensor parallel shard lies in a checkpoint.
    """

    def __init__(self, config: TransformerConfig, ddp: DistributedDataParallelConfig, model: torch.nn.Module) -> None:
        to_meta(model)
        places = parts_of(core(model).sharded_state_dict())
        named = {name: places[id(parameter)] for name, parameter in core(model).named_parameters()}
        config.init_model_with_meta_device = True
        with _resettable(model):
            super().__init__(config, ddp, Called(model), device=torch.device(torch.cuda.current_device()))
        config.init_model_with_meta_device = False
        # The base class binds those of MegatronFSDP to the instance.
        del self.scale_gradients, self.finish_grad_sync
        self.parts: list[tuple[Any, Parts]] = [
            (parameter, named[name]) for name, parameter in core(self).named_parameters()
        ]

    def _init_dist_index(self, pg_collection: Any) -> FSDPDistributedIndex:
        """The mesh of this pipeline stage's ranks; the base class takes the whole world for it, and fails where PP > 1.

        Ranks count tensor parallel first, then context and data parallel, then stages.
        """
        replicas = self.ddp_config.num_distributed_optimizer_instances
        whole = mpu.get_data_parallel_group(with_context_parallel=True)
        shards = mpu.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=replicas > 1)
        self.tp_group = mpu.get_tensor_model_parallel_group()
        groups = {"shards": shards, "tp": self.tp_group}
        outer: dict[str, Any] = {}
        if replicas > 1:
            groups = {"replicas": mpu.get_inter_distributed_optimizer_instance_group(), **groups}
            outer = {"dp_outer_dim": "replicas", "hybrid_fsdp_group": whole}
        stage = whole.size() * self.tp_group.size()
        ranks = mpu.get_pipeline_model_parallel_rank() * stage + torch.arange(stage)
        mesh = ranks.view([group.size() for group in groups.values()])
        device_mesh = DeviceMesh.from_group([*groups.values()], "cuda", mesh=mesh, mesh_dim_names=tuple(groups))
        return FSDPDistributedIndex(device_mesh, dp_shard_dim="shards", tp_dim="tp", **outer)

    def _fix_tensor_parallel_attributes(self, module: torch.nn.Module) -> None:
        """Mark what Transformer Engine does not mark; without it the base class fails where TP > 1."""
        if isinstance(adapter.TELinear, type):
            super()._fix_tensor_parallel_attributes(module)

    def sync_rng_states_across_tp_group(self) -> None:
        """Nothing: tensor parallel ranks have different generators on purpose; the base class makes them equal."""

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Wait for the gradients' sums over the ranks, and hand each parameter its part."""
        self.module.finish_grad_sync(force_all_reduce)
        weight = _tied_over_stages(core(self))
        if weight is not None:
            # finalize_model_grads adds it up over the stages in place, and then assigns the bare local part as a
            # gradient, which torch refuses of a DTensor's `grad`.
            weight.main_grad = weight.grad

    def scale_gradients(self, scaling_factor: Any) -> None:
        """Scale what the optimizer will get.

        The base class scales the buffers and hands out their content anew. Where they are in BF16 that undoes what
        finalize_model_grads has added to the FP32 copies meanwhile: norms' gradients of other tensor parallel ranks
        under sequence parallelism, those of tied embeddings of another stage.
        """
        for _, parameter in self.param_and_grad_buffer.optimizer_named_parameters:
            if parameter.grad is not None:
                parameter.grad.to_local().mul_(scaling_factor)

    def take_over_weights(self) -> None:
        """Compute with the master weights as they are now; what is gathered of others is dropped."""
        self.param_and_grad_buffer.copy_main_weights_to_model_weights()
        self.module.synchronize_param_gather()


def whole_gradients(wrapper: MegatronFullySharded) -> dict[str, Tensor]:
    """Each parameter's FP32 gradient, whole, by the parameter's name in the GPTModel; zeros where it has none.

    Collective; every rank gets all. What finalize_model_grads has left is the mean over the global batch's tokens.
    """
    whole = {}
    group = wrapper.megatron_fsdp_dist_index.get_fsdp_group()
    for name, parameter in core(wrapper).named_parameters():
        shape = parameter.orig_param.shape  # of the tensor parallel shard
        flat = torch.zeros(shape.numel(), dtype=torch.float32, device=parameter.device)
        if parameter.grad is not None:
            flat[parameter.megatron_fsdp_slice] = parameter.grad.to_local().flatten().float()
        dist.all_reduce(flat, group=group)
        whole[name] = flat.view(shape)
    return whole


def replica_of(parameter: Any) -> int:
    """Which of HSDP's copies of the model this rank's part of `parameter` belongs to."""
    outer = parameter.megatron_fsdp_dist_index.get_outer_fsdp_group()
    return outer.rank() if outer else 0


@contextmanager
def _resettable(model: torch.nn.Module) -> Iterator[None]:
    """Within this, a module on meta whose parameters are put on a device can be asked to give them initial values.

    It gives them none, but the attributes of the old ones, which Megatron-FSDP drops (param_and_grad_buffer.py:2420):
    how tensor parallelism cuts them, which have to be added up under sequence parallelism, which are tied.
    """
    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    for module in owners:
        module.reset_parameters = _attributes_again(module)  # type: ignore[assignment]
    yield
    for module in owners:
        del module.reset_parameters


def _attributes_again(module: torch.nn.Module) -> Callable[[], None]:
    old = list(module.parameters(recurse=False))

    def reset_parameters() -> None:
        for before, now in zip(old, module.parameters(recurse=False), strict=True):
            vars(now).update(vars(before))

    return reset_parameters


def _tied_over_stages(model: GPTModel) -> Any:
    """The weight that the first and the last stage both hold, if this stage is one of the two."""
    if model.share_embeddings_and_output_weights and not (model.pre_process and model.post_process):
        return model.shared_embedding_or_output_weight()
    return None
