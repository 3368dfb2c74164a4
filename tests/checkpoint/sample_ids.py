"""Train runs of one world size, each in its own log_dir, one after the other in the same processes; beside its metrics
each leaves `ids.<rank>.json`: the data parallel rank, and the samples that this rank has trained on, in order.

The arguments are the runs' files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.platform import cpu


class Noted:
    """A data set that notes which of its samples were asked for."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples
        self.ids: list[int] = []

    def __getitem__(self, number: int) -> Any:
        self.ids.append(number)
        return self.samples[number]


if __name__ == "__main__":
    cpu.install()
    from megatron.core import parallel_state
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from megatron_rocm.train import distributed, loop

    loop.draw = lambda *args: None  # a curve costs a second
    open_data = loop.open_data
    runs = [RunConfig.load(path) for path in sys.argv[1:]]
    distributed.connect(runs[0])
    for run in runs:
        distributed.form_groups(run)
        train, valid = open_data(run)
        noted = Noted(train)
        loop.open_data = lambda run, noted=noted, valid=valid: (noted, valid)  # type: ignore[assignment]
        loop.train(run)
        rank = parallel_state.get_data_parallel_rank()
        file = Path(run.launch.log_dir) / f"ids.{distributed.dist.get_rank()}.json"
        file.write_text(json.dumps({"rank": rank, "ids": noted.ids}))
        parallel_state.destroy_model_parallel()
        # DTensor's operations answer with a mesh that equals theirs: that of the run before, and its groups.
        _clear_sharding_prop_cache()
    distributed.leave()
