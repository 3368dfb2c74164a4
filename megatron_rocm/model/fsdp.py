"""PyTorch FSDP-v2 through megatron-core's wrapper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import TorchFullyShardedDataParallel, TorchFullyShardedDataParallelConfig
from megatron.core.transformer import TransformerConfig


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in a checkpoint: its key there and, where layers are stacked in it, which of how many."""

    key: str
    layer: int | None
    layers: int | None


class FullySharded(TorchFullyShardedDataParallel):
    """megatron-core 0.16.1's wrapper as its own finalize_model_grads expects it.

    `places` has a Place for each parameter's name.
    """

    def __init__(self, config: TransformerConfig, model: torch.nn.Module) -> None:
        # Found before parameters are cut: afterwards megatron-core cuts the SwiGLU's gate and up at the wrong rows.
        places = _places(model)
        super().__init__(config, TorchFullyShardedDataParallelConfig(), model)
        self.places = places

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Nothing is left to do; finalize_model_grads passes an argument that the base class does not take."""

    def scale_gradients(self, scaling_factor: Any) -> None:
        """Scale what FSDP has averaged over the ranks as if it were their sum; the base class does nothing."""
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scaling_factor * self.process_group.size())


def shard(config: TransformerConfig, model: torch.nn.Module) -> FullySharded:
    """Cut `model` over the data parallel ranks."""
    return FullySharded(config, model)


def _places(model: Any) -> dict[str, Place]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places = {}
    for entry in model.sharded_state_dict().values():
        if not isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
            continue  # Transformer Engine's extra state
        part = entry if isinstance(entry, ShardedTensor) else entry.build()[0]
        stacked = part.prepend_axis_num == 1
        layer, layers = (part.global_offset[0], part.global_shape[0]) if stacked else (None, None)
        places[names[id(entry.data)]] = Place(part.key, layer, layers)
    return places
