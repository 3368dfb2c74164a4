"""`python -m megatron_rocm.doctor.bandwidth RUN.json`: one process of an all-reduce over all of a run's processes.

They meet as those of training do. Rank 0 leaves {"sizes": [row, …]} in RUN.json's folder as `network.json`. A row has
`bytes` of the message, `seconds` of one all-reduce on the slowest rank, and `right`: the sum was as it must be.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.doctor.gemm import elapsed
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.process import die_with_parent, write_whole_lines

RESULT = "network.json"
SMALLEST, LARGEST = 2**10, {"cuda": 2**30, "cpu": 2**26}  # bytes
STEP = 4
SECONDS = 0.3  # how long a size is repeated
REPEATS = 100  # and how often at most


def main(arguments: Sequence[str]) -> int:
    """Join the others and measure. 2 where they don't come together."""
    die_with_parent()
    write_whole_lines()
    path = Path(arguments[0])
    run = RunConfig.load(path)

    from megatron_rocm.train.process import quiet

    quiet()
    from megatron_rocm.train import distributed

    try:
        distributed.connect(run)
        distributed.agree(run)
    except UsageError as error:
        if distributed.first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    rows = measure("cpu" if run.hardware.vendor == "cpu" else "cuda")
    if os.environ["RANK"] == "0":
        partial = path.with_name(f".{RESULT}")
        partial.write_text(json.dumps({"sizes": rows}))
        partial.replace(path.with_name(RESULT))
    distributed.leave()
    return 0


def measure(device: str) -> list[dict[str, Any]]:
    """A row for each size, the same on every rank."""
    import torch.distributed as dist

    world, size, rows = dist.get_world_size(), SMALLEST, []
    while size <= LARGEST[device]:
        rows.append(_row(size, device, world))
        size *= STEP
    return rows


def _row(size: int, device: str, world: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    tensor = torch.full((size // 4,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(tensor)
    right = bool((tensor == world * (world + 1) / 2).all())
    tensor.zero_()  # or repeated sums would grow without end

    def several(times: int) -> None:
        for _ in range(times):
            dist.all_reduce(tensor)

    once = agreed(elapsed(lambda: several(1), device), device)
    times = max(1, min(REPEATS, int(SECONDS / once)))
    seconds = agreed(elapsed(lambda: several(times), device) / times, device)
    return {"bytes": size, "seconds": seconds, "right": agreed(float(not right), device) == 0}


def agreed(value: float, device: str) -> float:
    """The largest of all ranks' values."""
    import torch
    import torch.distributed as dist

    largest = torch.tensor([value], device=device, dtype=torch.float32 if device == "cuda" else torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest.item())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
