"""Does an exported folder compute what its checkpoint computes? megatron-core and transformers on the same tokens.

Both run in FP32, whatever the weights' type: BF16 widens to FP32 exactly, so that only the order of additions differs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from megatron_rocm.checkpoint.convert.export import iteration_folder, run_config
from megatron_rocm.checkpoint.unpickle import read_metadata
from megatron_rocm.config.schema import Model, RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.model.build import build_chunks, transformer_config
from megatron_rocm.model.llama import core
from megatron_rocm.platform import cpu
from megatron_rocm.train.distributed import form_groups, leave


@dataclass(frozen=True)
class Agreement:
    """How far two models' logits lie apart, in the logits' own unit. `top1` is the share of equal likeliest tokens."""

    largest: float
    tolerance: float
    top1: float

    def __bool__(self) -> bool:
        return self.largest <= self.tolerance

    def __str__(self) -> str:
        verdict = "agree" if self else "DIFFER"
        return (
            f"logits {verdict}: largest difference {self.largest:.2e} (tolerance {self.tolerance:.2e}), "
            f"the same likeliest token at {self.top1:.1%} of the places"
        )


def tolerance(model: Model, scale: float) -> float:
    """The difference that FP32 rounding explains between logits of size `scale`.

    A sum of n terms in two orders differs by about eps·sqrt(n) of its size; the longest one has
    max(ffn_hidden_size, hidden_size) terms, and the residual stream adds up two of them a layer and the output's.
    A factor 4 covers softmax, norms and the rotary tables. A wrong mapping is off by the logits' own size.
    """
    terms = max(model.ffn_hidden_size, model.hidden_size)
    return 4 * torch.finfo(torch.float32).eps * math.sqrt(terms) * (2 * model.num_layers + 1) * scale


def check(
    checkpoint_dir: str | Path, hf_dir: str | Path, tokens: int = 64, *, iteration: int | None = None
) -> Agreement:
    """Compare megatron-core's model, loaded by its own loader, with transformers' on the same random tokens.

    Needs memory for the model in FP32 twice over, on the GPU if there is one. Makes a process group of one, so it
    can't be called within another. Raises UsageError for a bad source.
    """
    source = iteration_folder(checkpoint_dir, iteration)
    run = _alone(run_config(source))
    if not (Path(hf_dir) / "config.json").is_file():
        raise UsageError(f"{hf_dir}: no Hugging Face model here (no config.json)")
    length = min(tokens, run.model.max_position_embeddings)
    ids = torch.randint(run.model.vocab_size, (1, length), generator=torch.Generator().manual_seed(1234))
    theirs = _transformers_logits(hf_dir, ids)
    ours = _megatron_logits(run, source, ids)[..., : run.model.vocab_size]
    if ours.shape != theirs.shape:
        raise UsageError(f"{hf_dir}: its logits have shape {tuple(theirs.shape)}, the checkpoint's {tuple(ours.shape)}")
    top1 = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    scale = ours.abs().max().item()
    return Agreement((ours - theirs).abs().max().item(), tolerance(run.model, scale), top1)


def _alone(run: RunConfig) -> RunConfig:
    """The run's model in one process, in FP32, on plain layers."""
    parallel = {
        "tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1, "world_size": 1, "nnodes": 1, "gpus_per_node": 1,
        "fsdp": False, "megatron_fsdp": False, "hsdp": False, "sequence_parallel": False,
        "distributed_optimizer": False,
    }  # fmt: skip
    changes = {
        "parallel": parallel,
        "precision": {"dtype": "fp32"},
        "training": {"recompute": False},
        "hardware": {"vendor": "cpu", "tier": "torch"},
    }
    sections = {name: getattr(run, name).model_copy(update=update) for name, update in changes.items()}
    return run.model_copy(update=sections)


@torch.no_grad()
def _megatron_logits(run: RunConfig, source: Path, ids: Tensor) -> Tensor:
    cpu.install()
    read_metadata(source)  # megatron-core's own reader would execute what it finds there
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        form_groups(run)
        model = core(build_chunks(run, transformer_config(run))[0])
        # Tensors alone: the objects among them are FP8's, and a checkpoint need not have them.
        wanted = {key: part for key, part in model.sharded_state_dict().items() if not isinstance(part, ShardedObject)}
        weights = dist_checkpointing.load({"model": wanted}, str(source))["model"]
        missing = set(model.load_state_dict(weights, strict=False).missing_keys)
        assert all(key.endswith("_extra_state") for key in missing), missing
        model = model.to(_device()).eval()
        positions = torch.arange(ids.size(1)).unsqueeze(0)
        return model(ids.to(_device()), positions.to(_device()), None).float().cpu()
    finally:
        leave()


@torch.no_grad()
def _transformers_logits(folder: str | Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder).float().to(_device()).eval()
    return model(ids.to(_device())).logits.float().cpu()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
