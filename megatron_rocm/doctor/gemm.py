"""`python -m megatron_rocm.doctor.gemm RUN.json`: how fast one GPU does the matrix products of that run's step.

Prints a line of JSON: {"products": [row, …]}. A row has the product's name, phase, m, n, k, layout, dtype and count as
`tune.shapes` has them, and `seconds` of one product; null where it would take too long here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.platform.process import die_with_parent
from megatron_rocm.tune.shapes import Gemm, gemms

SECONDS = 0.2  # how long a product is repeated
REPEATS = 200  # and how often at most
TOLD = ("name", "phase", "m", "n", "k", "layout", "dtype", "count")
PATIENCE = 10.0  # a product that takes longer than this is left out
ROUGH = Gemm("rough", "forward", 512, 512, 512, "TN", "fp32", "fp32", False, 1)


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    die_with_parent()
    run = RunConfig.load(arguments[0])
    print(json.dumps({"products": measure(run)}))
    return 0


def measure(run: RunConfig) -> list[dict[str, Any]]:
    """A row for each product of the run's step."""
    import torch

    device = "cpu" if run.hardware.vendor == "cpu" else "cuda"
    if device == "cpu":
        torch.set_num_threads(run.hardware.threads)
    generator = torch.Generator(device).manual_seed(run.training.seed)
    rough = seconds(ROUGH, device, generator)
    slowest = rough / ROUGH.flops  # seconds per operation
    measured: dict[str, float | None] = {}
    rows = []
    for gemm in gemms(run):
        if gemm.key not in measured:
            late = device == "cpu" and slowest * gemm.flops > PATIENCE
            measured[gemm.key] = None if late else seconds(gemm, device, generator)
        row = asdict(gemm)
        rows.append({**{name: row[name] for name in TOLD}, "seconds": measured[gemm.key]})
    return rows


def seconds(gemm: Gemm, device: str, generator: Any) -> float:
    """Seconds of one product by torch.matmul, as a mean over some after the first two."""
    import torch

    from megatron_rocm.tune.products import DTYPES, factors, sizes

    a, b = (torch.randn(size, generator=generator, device=device).to(DTYPES[gemm.dtype]) for size in sizes(gemm))
    left, right = factors(gemm, a, b)

    def several(times: int) -> None:
        for _ in range(times):
            torch.matmul(left, right)

    several(1)  # chooses the kernel
    once = elapsed(lambda: several(1), device)
    times = max(1, min(REPEATS, int(SECONDS / once)))
    return elapsed(lambda: several(times), device) / times


def elapsed(work: Callable[[], None], device: str) -> float:
    """Seconds until the device has done the work."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return max(time.perf_counter() - start, 1e-9)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
