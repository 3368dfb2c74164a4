"""The summary that AMD's scripts print at the end of a run, from the run's own log lines."""

from __future__ import annotations

import re
from collections.abc import Iterable

FIELDS = {
    "throughput": r"throughput per GPU \(TFLOP/s/GPU\): ([0-9.]+)",
    "elapsed": r"elapsed time per iteration \(ms\): ([0-9.]+)",
    "batch": r"global batch size: +([0-9]+)",
    "memory": r"mem usages: ([0-9.]+)",
}


def summary(lines: Iterable[str], seq_length: int, world_size: int) -> list[str]:
    """Averages over the iterations' lines without the first two and the last, as train_llama3.sh of
    ROCm/Megatron-LM takes them; of fewer than four lines all but the first count. Empty where there are no lines.

    `seq_length` is in tokens; throughput comes out in TFLOP/s, time in milliseconds.
    """
    rows = [row for row in map(_values, lines) if row]
    counted = (rows[2:-1] if len(rows) > 3 else rows[1:]) or rows
    if not counted:
        return []
    mean = {name: sum(row[name] for row in counted) / len(counted) for name in FIELDS}
    tokens = mean["batch"] * seq_length * 1000 / (mean["elapsed"] * world_size)
    return [
        f"throughput per GPU: {mean['throughput']:.{2 if mean['throughput'] >= 1 else 4}f}",
        f"elapsed time per iteration: {mean['elapsed']:.2f}",
        f"tokens/GPU/s: {tokens:.1f}",
        f"mem usages: {mean['memory']:.4f}",
    ]


def _values(line: str) -> dict[str, float] | None:
    found = {name: re.search(pattern, line) for name, pattern in FIELDS.items()}
    if not all(found.values()):
        return None
    return {name: float(match.group(1)) for name, match in found.items() if match}
