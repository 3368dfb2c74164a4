"""`--network` and `--gemm`: processes that measure, and what their figures come to."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_rocm.doctor import bandwidth
from megatron_rocm.doctor.finding import Finding, fine, problem
from megatron_rocm.doctor.patient import Patient
from megatron_rocm.errors import UsageError
from megatron_rocm.launch import preflight, torchrun
from megatron_rocm.launch.command import command, config_file
from megatron_rocm.launch.run import environment
from megatron_rocm.resolve import Resolution, resolve

KEPT = 20  # lines of what a process says, in which its last words are looked for


@dataclass(frozen=True)
class Measured:
    """A finding and the rows that `--json` has."""

    finding: Finding
    rows: tuple[dict[str, Any], ...] = field(default=())


def several(patient: Patient) -> Resolution:
    """The run whose processes `network` measures. Raises UsageError where there is none, or it has but one process."""
    if patient.resolution is None:
        raise UsageError(f"--network needs a run that can be made: {patient.refused}")
    if patient.resolution.config.parallel.world_size < 2:
        raise UsageError(
            "--network: the run has one process; say NNODES=2 NODE_RANK=… MASTER_ADDR=… on each of two nodes, or "
            "GPUS_PER_NODE=2"
        )
    return patient.resolution


def one_gpu(patient: Patient) -> Resolution:
    """The run whose products `gemm` measures; of a model that doesn't fit here one layer. Raises UsageError without."""
    if patient.resolution:
        return patient.resolution
    request = replace(patient.request, layers=1)
    try:
        return resolve(request, patient.machine, dict(patient.environment), dry_run=True)
    except UsageError:
        raise UsageError(f"--gemm needs a run that can be made: {patient.refused}") from None


def network(resolution: Resolution) -> Measured:
    """All-reduce over all processes of the run, started as training is.

    Rows, on node 0 alone: bytes, seconds, and in bytes per second `algorithm` = bytes / seconds and `bus` = algorithm ·
    2(n-1)/n, what each link carries in a ring of n processes (NVIDIA/nccl-tests doc/PERFORMANCE.md).
    """
    run = resolution.config
    world = run.parallel.world_size
    with tempfile.TemporaryDirectory(prefix="megatron-rocm-") as folder:
        try:
            if run.launch.node_rank == 0:
                preflight.check_port(run.launch.master_port)
        except UsageError as error:
            return Measured(problem("all-reduce", str(error), "no process can meet there"))
        run = run.model_copy(update={"launch": run.launch.model_copy(update={"log_dir": folder})})
        run.save(config_file(run))
        words = command(run, "megatron_rocm.doctor.bandwidth", str(config_file(run)))
        status, said = _say(words, _environment(resolution))
        result = config_file(run).with_name(bandwidth.RESULT)
        if status or (run.launch.node_rank == 0 and not result.exists()):
            return Measured(
                problem(
                    "all-reduce", _last_words(said) or f"it ended with exit status {status}",
                    "a run over these nodes would not start either", "docs/network.md; the same command on every node",
                )
            )  # fmt: skip
        told = json.loads(result.read_text())["sizes"] if result.exists() else ()
    rows = tuple(with_bandwidth(row, world) for row in told)
    if not rows:
        return Measured(fine("all-reduce", f"over {world} processes; node 0 shows the figures"))
    wrong = [row for row in rows if not row["right"]]
    if wrong:
        sizes = ", ".join(size_text(row["bytes"]) for row in wrong)
        return Measured(problem("all-reduce", f"wrong sums at {sizes}", "gradients would be wrong"), rows)
    best = max(row["bus"] for row in rows)
    nodes = run.parallel.nnodes
    found = f"over {world} processes on {nodes} node{'s' * (nodes > 1)}: up to {best / 1e9:.3g} GB/s of bus bandwidth"
    return Measured(fine("all-reduce", found), rows)


def with_bandwidth(row: dict[str, Any], world: int) -> dict[str, Any]:
    """The row with `algorithm` and `bus` in bytes per second."""
    algorithm = row["bytes"] / row["seconds"]
    return {**row, "algorithm": algorithm, "bus": algorithm * 2 * (world - 1) / world}


def gemm(resolution: Resolution) -> Measured:
    """Each matrix product of the configured model's step on one GPU. Rows: as doctor.gemm has them, with `tflops`."""
    run, layers = resolution.config, resolution.request.layers
    with tempfile.TemporaryDirectory(prefix="megatron-rocm-") as folder:
        path = Path(folder) / "run.json"
        run.save(path)
        done = subprocess.run(
            [sys.executable, "-m", "megatron_rocm.doctor.gemm", str(path)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, env=_environment(resolution), check=False,
        )  # fmt: skip
    if done.returncode:
        said = _last_words(done.stderr.splitlines()) or f"it ended with exit status {done.returncode}"
        return Measured(problem("matrix products", said, "a step of training does the same"))
    rows = tuple(with_speed(row) for row in json.loads(done.stdout.splitlines()[-1])["products"])
    timed = [row for row in rows if row["tflops"] is not None]
    if not timed:
        return Measured(fine("matrix products", "each would take too long here; choose a smaller MODEL_SIZE"), rows)
    work = sum(2 * row["m"] * row["n"] * row["k"] * row["count"] for row in timed)
    seconds = sum(row["seconds"] * row["count"] for row in timed)
    mixed = "as a step mixes them" + (f"; of {layers} layer: the whole model can't be trained here" if layers else "")
    speed = f"{work / seconds / 1e12:.3g} TFLOP/s in {timed[0]['dtype']}"
    return Measured(fine("matrix products", f"{speed}, {mixed}"), rows)


def with_speed(row: dict[str, Any]) -> dict[str, Any]:
    """The row with `tflops`: 10^12 operations a second, None where it was not timed."""
    work = 2 * row["m"] * row["n"] * row["k"]
    return {**row, "tflops": work / row["seconds"] / 1e12 if row["seconds"] else None}


def network_table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The rows of `network` as lines."""
    body = [
        (
            size_text(row["bytes"]), f"{row['seconds'] * 1e6:.1f}", f"{row['algorithm'] / 1e9:.3f}",
            f"{row['bus'] / 1e9:.3f}",
        )
        for row in rows
    ]  # fmt: skip
    return _table(("size", "µs", "algorithm GB/s", "bus GB/s"), body)


def gemm_table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The rows of `gemm` as lines."""
    body = [
        (
            row["name"], row["phase"], f"{row['m']} × {row['n']} × {row['k']}", str(row["count"]),
            f"{row['seconds'] * 1e3:.3f}" if row["seconds"] else "too long here",
            f"{row['tflops']:.3g}" if row["tflops"] else "",
        )
        for row in rows
    ]  # fmt: skip
    return _table(("layer", "pass", "m × n × k", "a step", "ms", "TFLOP/s"), body)


def size_text(size: int) -> str:
    """Bytes as 1 KiB, 16 MiB, 1 GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size} B"


def _table(head: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *body)) for column in range(len(head))]
    return [
        "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *body)
    ]


def _environment(resolution: Resolution) -> dict[str, str]:
    values = environment(resolution, Path(os.devnull))
    del values[torchrun.LOG]  # what they print is shown
    return values


def _say(words: list[str], values: dict[str, str]) -> tuple[int, list[str]]:
    """Run a command whose output goes to stderr as it comes: its exit status and its last lines."""
    process = subprocess.Popen(
        words, env=values, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout
    said: list[str] = []
    try:
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            said = [*said[1 - KEPT :], line.rstrip()]
        return process.wait(), said
    finally:
        process.kill()
        process.wait()


def _last_words(said: list[str]) -> str:
    """What tells what went wrong: the first message of ours with the lines that belong to it, else the last line."""
    for at, line in enumerate(said):
        if line.startswith(("error: ", "megatron-rocm: ")):
            more = itertools.takewhile(lambda one: one.startswith("  "), said[at + 1 :])
            return " ".join([line.partition(": ")[2], *map(str.strip, more)])
    return next((line for line in reversed(said) if line.strip()), "")
