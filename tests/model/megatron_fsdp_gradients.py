"""Megatron-FSDP's whole gradients beside those of plain data parallel training, as one line of JSON.

The arguments are the runs' files, plain ones; each is built both ways. For each: the largest relative difference of a
parameter's gradient, and what a process holds of the model before the first step.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.platform import cpu


def gradients(run: RunConfig) -> tuple[dict[str, Any], Any]:
    state = loop.build(run)
    step.prepare(run, state)
    chunk = state.model[0]
    if run.parallel.megatron_fsdp:
        buffers = chunk.param_and_grad_buffer
        held = {
            "share": sum(group.model_weight_buffer.data.numel() for group in buffers.parameter_groups),
            "whole": sum(parameter.numel() for parameter in chunk.module.raw_param.values()),
            "gathered": sum(parameter.untyped_storage().nbytes() for parameter in chunk.module.raw_param.values()),
        }
    data, _ = loop.open_data(run)
    step.forward_backward(run, state, [micro_batches(run, data, 0, each) for each in state.model])
    if not run.parallel.megatron_fsdp:
        return {name: parameter.main_grad for name, parameter in core(chunk).named_parameters()}, None
    return whole_gradients(chunk), held


if __name__ == "__main__":
    cpu.install()
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_rocm.model.llama import core
    from megatron_rocm.model.megatron_fsdp import whole_gradients
    from megatron_rocm.parity.gradients import relative_difference
    from megatron_rocm.train import distributed, loop, step
    from megatron_rocm.train.batches import micro_batches

    found = []
    runs = [RunConfig.load(path) for path in sys.argv[1:]]
    distributed.connect(runs[0])
    for run in runs:
        distributed.form_groups(run)
        expected, _ = gradients(run)
        sharded = run.model_copy(update={"parallel": run.parallel.model_copy(update={"megatron_fsdp": True})})
        whole, held = gradients(sharded)
        assert whole.keys() == expected.keys()
        mine = max(relative_difference(whole[name], expected[name]) for name in expected)
        everyones: list[float] = [mine] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
        found.append({"difference": max(everyones), **held})
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    distributed.leave()
