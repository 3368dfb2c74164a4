"""Each family's model in one process, ours and transformers', on the same weights and batch; how far they lie apart.

Prints JSON: {family: what `compare` gives}.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from support import tiny_run

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.platform import cpu

# Published shapes in small: heads, key-value heads, head size, rotary base and scaling are those of the family's.
LONG = {"max_position_embeddings": 131_072, "seq_length": 64, "global_batch_size": 2, "micro_batch_size": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama 2, 7B": {"family": "llama2", "num_query_groups": 4, "rotary_base": 10_000, "rope_scaling": False},
    "llama 2, 70B": {
        "family": "llama2", "hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 1, "rotary_base": 10_000,
        "rope_scaling": False,
    },
    "code llama": {"family": "llama2", "num_query_groups": 4, "rotary_base": 1_000_000, "rope_scaling": False},
    "llama 3": {"rope_scaling": False},
    "llama 3.1": {"kv_channels": 128, "rope_scaling_factor": 8.0},
    "llama 3.2, 1B": {"kv_channels": 64, "rope_scaling_factor": 32.0, "tied_embeddings": True},
    "llama 3.2, 3B": {
        "hidden_size": 96, "kv_channels": 128, "num_attention_heads": 3, "num_query_groups": 1,
        "rope_scaling_factor": 32.0, "tied_embeddings": True,
    },
}  # fmt: skip


def compare(fields: dict[str, Any]) -> dict[str, Any]:
    """Largest differences in nats and logits, relative ones of gradients."""
    run = tiny_run(**{"norm_eps": 1e-6, **LONG, **fields})
    form_groups(run)
    dataset, _ = open_data(run)
    state = build(run)
    prepare(run, state)
    weights = reference.exported(state.model[0], run.model)
    model = reference.build(run, weights)
    other = reference.build(with_base(run, 10 * run.model.rotary_base), weights)
    batch = default_collate([dataset[0], dataset[1]])
    with torch.no_grad():
        ours = core(state.model[0])(batch["tokens"], batch["position_ids"], None)[..., : run.model.vocab_size]
        theirs, others = (reference.logits(run, one, batch) for one in (model, other))
    loss, _ = forward_backward(run, state, [micro_batches(run, dataset, 0, state.model[0])])
    expected = reference.forward_backward(run, model, dataset, 0)
    names = {name for weight in table.weights(run.model) for name in weight.hugging_face}
    with tempfile.TemporaryDirectory() as folder:
        for name, copies in gradients.whole(state, run.model):
            gradients.write(Path(folder), name, copies[0])
        apart = gradients.differences(Path(folder), reference.gradients(run, model))
    forget()
    return {
        "logits": (ours - theirs).abs().max().item(),
        "other base": (ours - others).abs().max().item(),
        "loss": abs(loss - expected),
        "gradients": apart,
        "compared": sorted(names),
        "theirs": sorted(name for name, _ in model.named_parameters()),
    }


def with_base(run: RunConfig, base: int) -> RunConfig:
    """The run with another rotary base."""
    return run.model_copy(update={"model": run.model.model_copy(update={"rotary_base": base})})


if __name__ == "__main__":
    cpu.install()
    import torch
    import torch.distributed as dist
    from torch.utils.data import default_collate

    from megatron_rocm.checkpoint.convert import table
    from megatron_rocm.model.llama import core
    from megatron_rocm.parity import gradients, reference
    from megatron_rocm.parity.measure import forget
    from megatron_rocm.train.batches import micro_batches
    from megatron_rocm.train.distributed import form_groups
    from megatron_rocm.train.loop import build, open_data
    from megatron_rocm.train.step import forward_backward, prepare

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with contextlib.redirect_stdout(sys.stderr):
        found = {name: compare(fields) for name, fields in FAMILIES.items()}
    print(json.dumps(found))
