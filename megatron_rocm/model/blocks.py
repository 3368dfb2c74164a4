"""Rows of a matrix a block at a time, so that a chain of elementwise kernels finds its operands in cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Of one operand, per thread: about a core's second-level cache (1 to 2 MiB on servers), and few kernels.
CACHE = 1 << 20
# A GPU's kernels are better off with all rows at once; blocks only bound what is held besides.
MEMORY = 1 << 28


def blocks(rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Slices that together are `range(rows)`; `row_bytes` is the size of a row of the widest operand."""
    bound = CACHE * torch.get_num_threads() if device.type == "cpu" else MEMORY
    size = max(1, bound // row_bytes)
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))
