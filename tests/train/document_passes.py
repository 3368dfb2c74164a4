"""Compare one micro batch of a run, by attention within documents, with its documents one by one; prints JSON.

The argument is the run's file.
"""

from __future__ import annotations

import json
import sys

import torch

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.model.documents import boundaries, lengths


def compare(run: RunConfig) -> dict[str, float]:
    """The largest differences of a micro batch's losses and gradients from those of its documents one by one."""
    from megatron_rocm.model.build import build_chunks, transformer_config
    from megatron_rocm.model.init import fill
    from megatron_rocm.model.llama import core
    from megatron_rocm.train.loop import open_data

    data = open_data(run)[0]
    items = [data[n] for n in range(run.training.micro_batch_size)]
    tokens, labels, positions = (torch.stack([item[k] for item in items]) for k in ("tokens", "labels", "position_ids"))
    model = core(build_chunks(run, transformer_config(run))[0])
    fill(model, run)

    def gradients(total: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(total, list(model.parameters())))

    together = model(tokens, positions, None, labels=labels, packed_seq_params=boundaries(run, tokens))
    whole = gradients(together.sum())
    rows = []
    for row, sizes in enumerate(lengths(tokens, run.data.eod)):
        cut = [part.split(sizes) for part in (tokens[row], labels[row], positions[row])]
        assert all(part[0] == 0 for part in cut[2])  # positions begin anew
        rows.append(torch.cat([model(t[None], p[None], None, labels=n[None])[0] for t, n, p in zip(*cut, strict=True)]))
    one_by_one = torch.stack(rows)
    across = model(tokens, positions, None, labels=labels)
    shuffled = model(tokens, positions.flip(1), None, labels=labels)
    return {
        "documents": sum(len(sizes) for sizes in lengths(tokens, run.data.eod)),
        "loss": (together - one_by_one).abs().max().item(),
        "gradient": max(
            ((a - b).norm() / b.norm()).item() for a, b in zip(whole, gradients(one_by_one.sum()), strict=True)
        ),
        "across": (across - one_by_one).abs().max().item(),
        "positions": (across - shuffled).abs().max().item(),
    }


if __name__ == "__main__":
    from megatron_rocm.platform import cpu

    cpu.install()
    from megatron_rocm.train import distributed

    the_run = RunConfig.load(sys.argv[1])
    distributed.connect(the_run)
    distributed.form_groups(the_run)
    print(json.dumps(compare(the_run)))
    distributed.leave()
