"""Initial weights that don't depend on the layout.

Each parameter is drawn whole, from a generator seeded by the run's seed and the parameter's global name, and cut to
this rank's shard: TP=2, PP=2, VPP or FSDP start from the very weights of one process. (megatron-core's own
initialization depends on the layout when it draws on the GPU.)
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from torch.distributed.tensor import DTensor

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.model.fp8 import set_weight

# What ends a parameter's name → the axis that tensor parallelism cuts, and how many matrices lie stacked in it
# (gate and up of the SwiGLU are cut each for itself).
SHARDS = {
    "word_embeddings.weight": (0, 1),
    "output_layer.weight": (0, 1),
    "linear_qkv.weight": (0, 1),
    "linear_proj.weight": (1, 1),
    "linear_fc1.weight": (0, 2),
    "linear_fc2.weight": (1, 1),
}
# They add to the residual stream: their standard deviation is divided by sqrt(2·layers), as in Megatron-LM and GPT-2.
RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")
VOCABULARY = ("word_embeddings.weight", "output_layer.weight")
TIED = "embedding.word_embeddings.weight"


def fill(model: GPTModel, run: RunConfig) -> None:
    """Give every parameter of this rank's `model` its initial value: normal matrices, norms of 1."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                _put(parameter, _shard(_whole(global_name(model, name), parameter, run), name), run)


def _put(parameter: Any, values: torch.Tensor, run: RunConfig) -> None:
    """Copy; FSDP's parameters get this rank's rows, rounded to the type that other layouts begin with."""
    if not isinstance(parameter, DTensor):
        set_weight(parameter, values)
        return
    local = parameter.to_local()
    if hasattr(parameter, "megatron_fsdp_slice"):
        mine = values.flatten()[parameter.megatron_fsdp_slice]
    else:
        mesh = parameter.device_mesh
        rows = values.chunk(mesh.size())  # as FSDP-v2 cuts: the last ranks may have none
        mine = rows[mesh.get_local_rank()] if mesh.get_local_rank() < len(rows) else values[:0]
    local.copy_(mine.to(torch.bfloat16 if run.precision.dtype == "bf16" else torch.float32).view_as(local))


def global_name(model: GPTModel, name: str) -> str:
    """The parameter's name in the undivided model: layers counted through all stages, tied weights called alike."""
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return TIED
    found = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if not found:
        return name
    layer = model.decoder.layers[int(found.group(1))]
    return f"decoder.layers.{layer.layer_number - 1}.{found.group(2)}"


def _whole(name: str, parameter: Any, run: RunConfig) -> torch.Tensor:
    """The undivided matrix, FP32, on the parameter's device."""
    axis, _ = SHARDS[_kind(name)]
    # Under Megatron-FSDP a parameter has the undivided shape; what it was made of is the tensor parallel shard.
    shape = list(getattr(parameter, "orig_param", parameter).shape)
    shape[axis] *= mpu.get_tensor_model_parallel_world_size()
    std = run.model.init_std
    if name.endswith(RESIDUAL):
        std /= math.sqrt(2.0 * run.model.num_layers)
    seed = int.from_bytes(hashlib.sha256(f"{run.training.seed} {name}".encode()).digest()[:7], "big")
    generator = torch.Generator(parameter.device).manual_seed(seed)
    if not name.endswith(VOCABULARY):
        return torch.empty(shape, device=parameter.device).normal_(0.0, std, generator=generator)
    # The rows that pad the vocabulary depend on TP. They are no tokens and model/llama.py keeps them out of the loss,
    # so they stay zero and change nothing.
    whole = torch.zeros(shape, device=parameter.device)
    whole[: run.model.vocab_size].normal_(0.0, std, generator=generator)
    return whole


def _shard(whole: torch.Tensor, name: str) -> torch.Tensor:
    axis, stacked = SHARDS[_kind(name)]
    parts, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    return torch.cat([matrix.chunk(parts, axis)[rank] for matrix in whole.chunk(stacked, axis)], axis)


def _kind(name: str) -> str:
    return next(kind for kind in SHARDS if name.endswith(kind))
