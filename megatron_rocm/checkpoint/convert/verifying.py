"""Do both sides of a conversion compute the same? megatron-core and transformers on the same tokens, layer by layer.

Both run in FP32, whatever the weights' type: BF16 widens to FP32 exactly, so that only the order of additions differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from megatron_rocm.checkpoint import reader
from megatron_rocm.checkpoint.convert.from_huggingface import FromHuggingFace
from megatron_rocm.checkpoint.convert.from_megatron import FromMegatron
from megatron_rocm.checkpoint.convert.huggingface import CONFIG, llama_config
from megatron_rocm.checkpoint.convert.source import Source
from megatron_rocm.checkpoint.convert.table import weights
from megatron_rocm.checkpoint.unpickle import read_common
from megatron_rocm.config.schema import Model, RunConfig
from megatron_rocm.model.build import build_chunks, transformer_config
from megatron_rocm.model.llama import core
from megatron_rocm.plan.memory import count_parameters
from megatron_rocm.platform import cpu
from megatron_rocm.train.distributed import form_groups, leave

TOKENS = 64
SPARE = 2 * 10**9  # bytes, for torch and the tokens' activations

# One process on a CPU's plain layers; what of it does not concern the model is whatever a RunConfig must have.
ALONE: dict[str, dict[str, Any]] = {
    "parallel": {
        "gpus_per_node": 1, "world_size": 1, "tp": 1, "pp": 1, "dp": 1, "sequence_parallel": False,
        "distributed_optimizer": False, "overlap_grad_reduce": False, "overlap_param_gather": False,
        "count_embedding_and_loss": False,
    },
    "precision": {"dtype": "fp32", "flash_attention": False},
    "training": {"global_batch_size": 1, "num_micro_batches": 1, "seq_length": TOKENS, "recompute_num_layers": None},
    "optimizer": {"lr": 1e-4, "min_lr": 0, "lr_warmup_iters": 0, "lr_decay_iters": 1},
    "data": {"cache_path": None, "tokenizer_model": None, "eod": 0},
    "checkpoint": {},
    "logging": {"wandb": False},
    "hardware": {"vendor": "cpu", "arch": "", "gpu_memory": 0, "tier": "torch", "threads": 1},
    "launch": {"master_port": 1, "log_dir": ""},
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """How far the two models lie apart after one of their parts, in the numbers' own unit."""

    name: str
    largest: float
    tolerance: float

    @property
    def share(self) -> float:
        """Of the tolerance; infinite where a number is none."""
        return self.largest / self.tolerance if math.isfinite(self.largest) else math.inf


@dataclass(frozen=True)
class Agreement:
    """How far two models lie apart from the embedding to the logits. `top1` is the share of equal likeliest tokens."""

    places: tuple[Place, ...]
    top1: float

    def __bool__(self) -> bool:
        return all(place.share <= 1 for place in self.places)

    def __str__(self) -> str:
        logits = self.places[-1]
        top1 = f"the same likeliest token for {self.top1:.1%} of the tokens"
        first = next((place for place in self.places if place.share > 1), None)
        if first:
            return (
                f"the two sides DIFFER, first at {first.name}: by {first.largest:.2e} (tolerance "
                f"{first.tolerance:.2e}); logits by {logits.largest:.2e}, {top1}"
            )
        worst = max(self.places, key=lambda place: place.largest)
        return (
            f"the two sides agree at all {len(self.places)} places: largest difference {worst.largest:.2e}, at "
            f"{worst.name} (tolerance {worst.tolerance:.2e}); logits {logits.largest:.2e}, {top1}"
        )


def beyond_memory(model: Model) -> str:
    """Why `verify` does not fit this machine's memory; empty where it does."""
    needed = 8 * count_parameters(model, padded=True) + SPARE  # weights in FP32, and as they are loaded
    free = _free_memory()
    return f"that takes {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free" if needed > free else ""


def _free_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def tolerance(model: Model, layers: int, scale: float) -> float:
    """The difference that FP32 rounding explains between numbers of size `scale`, after so many layers.

    A sum of n terms in two orders differs by about eps·sqrt(n) of its size; the longest one has
    max(ffn_hidden_size, hidden_size) terms, and the residual stream adds up two of them a layer and the output's.
    A factor 4 covers softmax, norms and the rotary tables. A wrong mapping is off by the numbers' own size.
    """
    terms = max(model.ffn_hidden_size, model.hidden_size)
    return 4 * torch.finfo(torch.float32).eps * math.sqrt(terms) * (2 * layers + 1) * scale


def verify(source: Source, folder: str | Path) -> Agreement:
    """Run the same random tokens through both sides of a conversion that wrote `source` to `folder`.

    megatron-core's model is loaded by its own loader where a side is a checkpoint, transformers' by its own where one
    is a Hugging Face folder; what is neither goes through the table. Needs memory for the model in FP32 and the weights
    as they are. Makes a process group of one, so it can't be called within another. Raises UsageError.
    """
    folder = Path(folder)
    model, ids = source.model, _tokens(source.model)
    written: Source = FromHuggingFace(folder) if (folder / CONFIG).is_file() else FromMegatron(folder)
    sides = (source, written)
    kind = written.dtype(next(weights(model)))
    theirs = _run_transformers(next((side for side in sides if isinstance(side, FromHuggingFace)), source), ids, kind)
    ours = _run_megatron(next((side for side in sides if isinstance(side, FromMegatron)), source), ids, kind)
    ours["logits"] = ours["logits"][..., : model.vocab_size]
    places = tuple(_compare(model, name, ours[name], theirs[name]) for name in ours)
    top1 = (ours["logits"].argmax(-1) == theirs["logits"].argmax(-1)).float().mean().item()
    return Agreement(places, top1)


def _compare(model: Model, name: str, ours: Tensor, theirs: Tensor) -> Place:
    kind, _, number = name.partition(" ")
    layers = {"embedding": 0, "layer": int(number or 0)}.get(kind, model.num_layers)
    allowed = tolerance(model, layers, ours.abs().max().item())
    largest = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else math.inf
    return Place(name, largest, allowed)


def _tokens(model: Model) -> Tensor:
    length = min(TOKENS, model.max_position_embeddings)
    return torch.randint(model.vocab_size, (1, length), generator=torch.Generator().manual_seed(1234))


def _watch(parts: dict[str, Any], shaped: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What each module puts out in the next forward pass, as [batch, sequence, hidden]."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            seen[name] = shaped(tensor).detach().float().cpu()

        return hook

    for name, module in parts.items():
        module.register_forward_hook(keep(name))
    return seen


def _named(embedding: Any, layers: Any, norm: Any) -> dict[str, Any]:
    numbered = {f"layer {number}": layer for number, layer in enumerate(layers, 1)}
    return {"embedding": embedding, **numbered, "norm": norm}


@torch.no_grad()
def _run_megatron(source: Source, ids: Tensor, kind: torch.dtype) -> dict[str, Tensor]:
    cpu.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        run = RunConfig.model_validate({"model": source.model.model_dump(), **ALONE})
        if isinstance(source, FromMegatron) and source.run:
            run = run.model_copy(update={"core": source.run.core})
        form_groups(run)
        model = core(build_chunks(run, transformer_config(run))[0])
        _load(model, source)
        _round(model, kind)
        model = model.to(_device(source.model)).eval()
        seen = _watch(
            _named(model.embedding, model.decoder.layers, model.decoder.final_layernorm),
            lambda out: out.transpose(0, 1),
        )
        ids = ids.to(_device(source.model))
        positions = torch.arange(ids.size(1), device=ids.device).unsqueeze(0)
        logits = model(ids, positions, None).float().cpu()
        return {**seen, "logits": logits}
    finally:
        leave()


def _load(model: Any, source: Source) -> None:
    if isinstance(source, FromMegatron):
        # Tensors alone: the objects among them are FP8's, and a checkpoint need not have them.
        wanted = {key: part for key, part in model.sharded_state_dict().items() if not isinstance(part, ShardedObject)}
        loaded = reader.load({"model": wanted}, source.folder, read_common(source.folder))["model"]
        missing = set(model.load_state_dict(loaded, strict=False).missing_keys)
        assert all(key.endswith("_extra_state") for key in missing), missing
        return
    ours = dict(model.named_parameters())
    for weight in weights(source.model):
        parameter, row = ours[weight.local if weight.local in ours else weight.megatron], 0
        for part in weight.to_megatron(source.tensors(weight), source.model):
            parameter[row : row + len(part)].copy_(part)
            row += len(part)


@torch.no_grad()
def _run_transformers(source: Source, ids: Tensor, kind: torch.dtype) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if isinstance(source, FromHuggingFace):
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(LlamaConfig(**llama_config(source.model, dtype="float32", bos=None, eos=0)))
        ours = dict(model.named_parameters())
        for weight in weights(source.model):
            for name, tensor in source.tensors(weight).items():
                ours[name].copy_(tensor)
    _round(model, kind)
    model = model.to(_device(source.model)).eval()
    seen = _watch(_named(model.model.embed_tokens, model.model.layers, model.model.norm), lambda out: out)
    logits = model(ids.to(_device(source.model))).logits.float().cpu()
    return {**seen, "logits": logits}


def _round(model: Any, kind: torch.dtype) -> None:
    """Give weights of a wider type the values that they were written with."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(kind))


def _device(model: Model) -> str:
    needed = 4 * count_parameters(model, padded=True) + SPARE
    return "cuda" if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > needed else "cpu"
