"""Print, for each run, how often its layers' parts are called in forward and backward of one micro batch, as JSON.

The arguments are the runs' files.
"""

from __future__ import annotations

import json
import sys

import torch

from megatron_rocm.config.schema import RunConfig


def calls(run: RunConfig) -> list[int]:
    """Of attention and of the MLP, in all layers together."""
    from megatron_rocm.model.build import build_chunks, transformer_config
    from megatron_rocm.model.init import fill
    from megatron_rocm.model.llama import core

    model = core(build_chunks(run, transformer_config(run))[0])
    fill(model, run)
    counts = [0, 0]

    def counted(which: int, module: torch.nn.Module) -> None:
        def count(*_: object) -> None:
            counts[which] += 1

        module.register_forward_pre_hook(count)

    for layer in model.decoder.layers:
        counted(0, layer.self_attention.core_attention)
        counted(1, layer.mlp)
    ids = torch.arange(run.training.seq_length)[None]
    model(ids, ids, None, labels=ids).sum().backward()
    return counts


if __name__ == "__main__":
    from megatron_rocm.platform import cpu

    cpu.install()
    from megatron_rocm.train import distributed

    runs = [RunConfig.load(path) for path in sys.argv[1:]]
    distributed.connect(runs[0])
    distributed.form_groups(runs[0])
    print(json.dumps([calls(run) for run in runs]))
    distributed.leave()
