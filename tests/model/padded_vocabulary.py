"""Compare losses and gradients with large values in the rows that pad the vocabulary, and TP=1 with TP=2.

Rank 0 prints JSON.
The arguments are files of runs: pairs of one in one process (two do the same) and one over two.
"""

from __future__ import annotations

import json
import sys
from typing import NamedTuple

import torch

from megatron_rocm.config.schema import RunConfig


class Found(NamedTuple):
    """Of one micro batch."""

    losses: torch.Tensor  # [rows, sequence]
    gradients: dict[str, torch.Tensor]  # of their sum
    padding: float  # the sum of the padded rows' absolute gradients
    labels: torch.Tensor
    logits: torch.Tensor  # [rows, sequence, rows of the output layer]


def forward_and_backward(run: RunConfig, planted: float) -> Found:
    """With `planted` in this rank's padded rows."""
    from megatron.core import parallel_state as mpu

    from megatron_rocm.model.build import build_chunks, transformer_config
    from megatron_rocm.model.init import VOCABULARY, fill
    from megatron_rocm.model.llama import core

    tokens = run.model.vocab_size
    model = core(build_chunks(run, transformer_config(run))[0])
    fill(model, run)
    tables = [parameter for name, parameter in model.named_parameters() if name.endswith(VOCABULARY)]
    rows = run.model.padded_vocab_size // mpu.get_tensor_model_parallel_world_size()
    mine = min(rows, max(0, tokens - mpu.get_tensor_model_parallel_rank() * rows))
    with torch.no_grad():
        for table in tables:
            table[mine:] = planted
    ids = torch.randint(tokens, (2, 33), generator=torch.Generator().manual_seed(7))
    ids[0, :3] = torch.tensor([tokens - 1, 0, tokens - 1])
    inputs = ids[:, :-1], torch.arange(32).expand(2, 32), None
    losses = model(*inputs, labels=ids[:, 1:])
    losses.sum().backward()
    with torch.no_grad():
        logits = model(*inputs)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    padding = sum(table.grad[mine:].abs().sum().item() for table in tables)
    return Found(losses.detach(), gradients, padding, ids[:, 1:], logits)


def compare(alone: RunConfig, split: RunConfig) -> dict[str, float]:
    """Differences by what made them; all are to be 0, or rounding."""
    from megatron.core import parallel_state as mpu

    from megatron_rocm.train import distributed

    said = {"planted loss": 0.0, "planted gradient": 0.0, "gradient of padding": 0.0}
    whole: Found | None = None
    for run in (alone, split):
        distributed.form_groups(run)
        plain, planted = forward_and_backward(run, 0.0), forward_and_backward(run, 50.0)
        said["planted loss"] += (planted.losses - plain.losses).abs().max().item()
        for name, gradient in plain.gradients.items():
            said["planted gradient"] += (planted.gradients[name] - gradient).abs().max().item()
        said["gradient of padding"] += plain.padding + planted.padding
        if whole is None:
            whole = plain
            logits = whole.logits[..., : run.model.vocab_size].flatten(0, 1)
            exact = torch.nn.functional.cross_entropy(logits, whole.labels.flatten(), reduction="none")
            said["softmax"] = (exact - whole.losses.flatten()).abs().max().item()
        else:
            said["tp loss"] = (whole.losses - plain.losses).abs().max().item()
            said["tp gradient"] = max(
                relative(run, name, g, whole.gradients[name]) for name, g in plain.gradients.items()
            )
        mpu.destroy_model_parallel()
    return said


def relative(run: RunConfig, name: str, part: torch.Tensor, whole: torch.Tensor) -> float:
    """How far this rank's part of a gradient is from its part of `whole`, which is padded for one process."""
    from megatron_rocm.model.init import VOCABULARY, _shard

    wanted = whole
    if name.endswith(VOCABULARY):
        wanted = torch.zeros(run.model.padded_vocab_size, whole.size(1))
        wanted[: run.model.vocab_size] = whole[: run.model.vocab_size]
    if whole.dim() > 1:
        wanted = _shard(wanted, name)
    return ((part - wanted).norm() / whole.norm()).item()  # a rank without tokens has a part of zeros


if __name__ == "__main__":
    from megatron_rocm.platform import cpu

    cpu.install()
    from megatron_rocm.train.distributed import connect, leave

    runs = [RunConfig.load(path) for path in sys.argv[1:]]
    connect(runs[0])
    found = [compare(one, two) for one, two in zip(runs[::2], runs[1::2], strict=True)]
    of_both: list[list[dict[str, float]]] = [[], []]
    torch.distributed.all_gather_object(of_both, found)
    if torch.distributed.get_rank() == 0:
        print(json.dumps([one for of_rank in of_both for one in of_rank]))
    leave()
