"""PyTorch FSDP-v2 through megatron-core's wrapper.

Parameters are kept in FP32 and gathered in the type that is computed in, so that they are their own master copy and
gradients of micro batches add up in FP32. No process ever holds the whole model: layers give up their values as soon
as they are built (`OnMeta`), and initial values are drawn after the model is cut, one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import TorchFullyShardedDataParallel, TorchFullyShardedDataParallelConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from megatron_rocm.model.llama import core

# Where a parameter lies in a checkpoint: tensors without data, one after the other along its rows. The SwiGLU's gate
# and up are two.
Parts = tuple[ShardedTensor, ...]


class OnMeta(TransformerLayer):
    """A layer whose parameters have shapes and types, but no values."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        to_meta(self)


def without_values(spec: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """The same block of layers, built without values."""
    return replace(spec, layer_specs=[replace(layer, module=OnMeta) for layer in spec.layer_specs or []])


def to_meta(module: torch.nn.Module) -> None:
    """Take the values from all parameters."""
    _replace(module, "meta")


class FullySharded(TorchFullyShardedDataParallel):
    """`model`, a GPTModel in its wrappers whose parameters are on meta, cut over the data parallel ranks.

    megatron-core 0.16.1's wrapper as its own finalize_model_grads expects it, with a precision of its own: computed in
    `compute`, gradients reduced in `reduce`, parameters and gradients kept in FP32. They have no values yet. `parts`
    says by a parameter's name where it lies in a checkpoint.
    """

    def __init__(
        self, config: TransformerConfig, model: torch.nn.Module, compute: torch.dtype, reduce: torch.dtype
    ) -> None:
        # Not its own constructor, which cuts the model itself and hands torch no precision.
        super(TorchFullyShardedDataParallel, self).__init__(config=config, module=model)
        self.ddp_config = TorchFullyShardedDataParallelConfig()
        self.process_group = mpu.get_data_parallel_group(with_context_parallel=True)
        self.device_mesh = DeviceMesh.from_group(self.process_group, "cuda")
        # Found before parameters are cut: afterwards megatron-core cuts the SwiGLU's gate and up at the wrong rows.
        parts = parts_of(model.sharded_state_dict())  # type: ignore[operator]
        self.parts = {name: parts[id(parameter)] for name, parameter in model.named_parameters()}
        # Inputs are cast where they need it: RoPE's angles must stay in FP32.
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
        device = torch.cuda.current_device()
        with _keeping_attributes(model):
            before: list[Any] = []
            for part in _units(model):
                _replace(part, device, torch.float32)
                fully_shard(part, mesh=self.device_mesh, mp_policy=policy)
                if config.recompute_granularity is not None:
                    # Recomputing a layer would otherwise be taken for the order of the backward pass.
                    part.set_modules_to_backward_prefetch(before)  # type: ignore[operator]
                before = [part]
            for part in _root(model):
                _replace(part, device, torch.float32)
            fully_shard(model, mesh=self.device_mesh, mp_policy=policy)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Nothing is left to do; finalize_model_grads passes an argument that the base class does not take."""

    def scale_gradients(self, scaling_factor: Any) -> None:
        """Scale what FSDP has averaged over the ranks as if it were their sum; the base class does nothing."""
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scaling_factor * self.process_group.size())


def shard(config: TransformerConfig, model: torch.nn.Module, compute: torch.dtype, reduce: torch.dtype) -> FullySharded:
    """Cut `model` over the data parallel ranks, without values."""
    to_meta(model)
    return FullySharded(config, model, compute, reduce)


def _units(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What is gathered at a time, in the order of the forward pass."""
    inner = core(model)
    if inner.share_embeddings_and_output_weights:
        return [*inner.decoder.layers]
    return [inner.embedding, *inner.decoder.layers, inner.output_layer]


def _root(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What is gathered with the whole, and stays so from the forward pass to the end of the backward pass.

    An embedding that is the output layer's weight too is used at both ends.
    """
    inner = core(model)
    tied = [inner.embedding] if inner.share_embeddings_and_output_weights else []
    return [*tied, inner.decoder.final_layernorm]


def _replace(module: torch.nn.Module, device: Any, dtype: torch.dtype | None = None) -> None:
    """Put empty parameters on `device` in the place of all of the module's."""
    with _keeping_attributes(module):
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                setattr(owner, name, torch.nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype)))


@contextmanager
def _keeping_attributes(module: torch.nn.Module) -> Iterator[None]:
    """Within this parameters may be replaced: the new ones get the old ones' attributes, which megatron-core reads."""
    kept = {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}
    yield
    for name, parameter in module.named_parameters():
        vars(parameter).update(kept[name])


def parts_of(weights: Mapping[str, Any]) -> dict[int, Parts]:
    """The parts of each parameter, by its id, in a sharded state dict of models."""
    found: dict[int, Parts] = {}
    for entry in nested_values(weights):
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):  # not Transformer Engine's extra state
            parts = [entry] if isinstance(entry, ShardedTensor) else entry.build()
            found[id(entry.data)] = tuple(part.without_data() for part in parts)
    return found


def whole_gradients(wrapper: FullySharded) -> dict[str, torch.Tensor]:
    """Each parameter's FP32 gradient, whole, by the parameter's name in the GPTModel; zeros where it has none.

    Collective; every rank gets all. What finalize_model_grads has left is the mean over the global batch's tokens.
    """
    found = {}
    for name, parameter in core(wrapper.module).named_parameters():
        gradient: Any = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = gradient.full_tensor().float()
    return found
