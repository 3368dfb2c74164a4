"""Go through several runs of one world size in the same processes: a run with LOAD_CKPT_PATH saves what it has loaded,
without a step between; any other trains. One whose folder begins with `core` saves as megatron-core itself does.

The arguments are the runs' files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.platform import cpu


def resave(run: RunConfig) -> None:
    from megatron_rocm.checkpoint import save as saving
    from megatron_rocm.checkpoint.load import resume
    from megatron_rocm.train.loop import build

    state = build(run)
    saving.prepare(run)
    resume(run, state)
    ours = saving.sharded
    if Path(run.launch.log_dir).name.startswith("core"):
        saving.sharded = as_core_does  # type: ignore[assignment]
    saving.save(run, state)
    saving.sharded = ours


def as_core_does(state: Any) -> dict[str, Any]:
    from megatron_rocm.checkpoint import state as ours

    content = ours.sharded(state)
    del content[ours.SHARDS]
    weights = {name: content[name] for name in ours._weights_of(state)}
    content["optimizer"] = state.optimizer.sharded_state_dict(weights, metadata=ours.metadata())
    return content


if __name__ == "__main__":
    cpu.install()
    from megatron.core import parallel_state
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from megatron_rocm.train import distributed, loop

    loop.draw = lambda *args: None  # a curve costs a second
    runs = [RunConfig.load(path) for path in sys.argv[1:]]
    distributed.connect(runs[0])
    for run in runs:
        distributed.form_groups(run)
        (resave if run.checkpoint.load else loop.train)(run)
        parallel_state.destroy_model_parallel()
        # DTensor's operations answer with a mesh that equals theirs: that of the run before, and its groups.
        _clear_sharding_prop_cache()
    distributed.leave()
