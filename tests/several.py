"""Train several runs of one world size, one after the other in the same processes.

The arguments are the runs' files.
"""

from __future__ import annotations

import sys

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.platform import cpu

if __name__ == "__main__":
    cpu.install()
    from megatron.core import parallel_state
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from megatron_rocm.train import distributed
    from megatron_rocm.train.loop import train

    runs = [RunConfig.load(path) for path in sys.argv[1:]]
    distributed.connect(runs[0])
    for run in runs:
        distributed.form_groups(run)
        train(run)
        parallel_state.destroy_model_parallel()
        # DTensor's operations answer with a mesh that equals theirs: that of the run before, and its groups.
        _clear_sharding_prop_cache()
    distributed.leave()
