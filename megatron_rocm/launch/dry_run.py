"""DRY_RUN=1: everything a run would be, as text. Starts nothing, imports no torch."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_rocm.config.schema import RunConfig, Section
from megatron_rocm.data.mixture import table
from megatron_rocm.launch.command import command
from megatron_rocm.platform.network import VARIABLES
from megatron_rocm.resolve import Resolution
from megatron_rocm.train.ramp import samples_of

UNNAMED_MASTER = "NODE0"
MOST_LINES = 64  # of more nodes the first two and the last are shown: the lines differ in NODE_RANK alone


def text(resolution: Resolution) -> str:
    """The resolved configuration with origins, notes, environment and the commands."""
    run = resolution.config
    parts = [_configuration(resolution)]
    if resolution.notes:
        parts.append("notes\n" + "\n".join(f"  {note}" for note in resolution.notes))
    if lines := data_lines(run):
        parts.append("data\n" + "\n".join(f"  {line}" for line in lines))
    parts.append("environment\n" + "\n".join(_rows(_environment(resolution))))
    parts.append(f"command on this node (node {run.launch.node_rank})\n  {shlex.join(command(run))}")
    if run.parallel.nnodes > 1:
        parts.append(_per_node(resolution))
    return "\n\n".join(parts)


def short(resolution: Resolution) -> str:
    """The configuration in a few lines, for the head of a log."""
    lines = []
    for section, rows in _sections(resolution):
        values = " ".join(f"{name}={shlex.quote(value)}" for name, value, _ in rows)
        lines.append(textwrap.fill(values, 118, initial_indent=f"{section:<13}", subsequent_indent=" " * 13,
                                   break_long_words=False, break_on_hyphens=False))  # fmt: skip
    told = data_lines(resolution.config) if resolution.config.launch.node_rank == 0 else []
    return "\n".join([*lines, *(f"note: {note}" for note in resolution.notes), *network_lines(resolution), *told])


def network_lines(resolution: Resolution) -> list[str]:
    """What this node offers the others to talk over, and why; nothing for a single node."""
    if resolution.config.parallel.nnodes == 1:
        return []
    rows = resolution.environment
    chosen = [(name, *rows[name]) for name in VARIABLES if name in rows]
    return [
        f"network: {name}={value}: {why}" if value else f"network: {name} unset: {why}" for name, value, why in chosen
    ]


def data_lines(run: RunConfig) -> list[str]:
    """What each source of the data gives to the whole run, from its first step on; nothing for mock data."""
    data, training, evaluations = run.data, run.training, run.logging.eval_iters
    if not data.paths:
        return []
    samples = {"train": samples_of(training, 0, training.train_iters)}
    if evaluations > 0:
        samples["valid"] = evaluations * training.global_batch_size
    return table(data.paths, data.split, data.blend_by, training.seq_length, samples, data.blend_max_epochs)


def _configuration(resolution: Resolution) -> str:
    head = f"configuration {resolution.config.hash}"
    return "\n".join([head, *(f"{section}\n" + "\n".join(_rows(rows)) for section, rows in _sections(resolution))])


def _sections(resolution: Resolution) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Each section with its fields as (name, value, origin): a variable by its name, a derived field by its own."""
    for section in RunConfig.model_fields:
        part: Section = getattr(resolution.config, section)
        rows = []
        for field, info in type(part).model_fields.items():
            meta = info.json_schema_extra
            name = str(meta["var"]) if isinstance(meta, dict) and "var" in meta else field
            rows.append((name, shown(getattr(part, field)), resolution.origins.get(name, "derived")))
        yield section, rows


def shown(value: Any) -> str:
    """A value as a person would type it."""
    if isinstance(value, tuple):  # a list, or a data blend: weight prefix weight prefix …
        parts = [part if isinstance(part, tuple) else (part,) for part in value]
        return " ".join(
            shown(one) for part in parts for one in (part[-1:] if len(parts) == 1 else part) if one is not None
        )
    if isinstance(value, bool):
        return str(int(value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _environment(resolution: Resolution) -> list[tuple[str, str, str]]:
    return [(name, value, why) for name, (value, why) in resolution.environment.items()]


def _rows(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    name = max((len(row[0]) for row in rows), default=0)
    value = min(max((len(row[1]) for row in rows), default=0), 32)
    return [f"  {row[0]:<{name}}  {row[1]:<{value}}  {row[2]}".rstrip() for row in rows]


def _per_node(resolution: Resolution) -> str:
    """The line to type on each node."""
    request, nodes = resolution.request, resolution.config.parallel.nnodes
    head = "on each node, within RDZV_TIMEOUT seconds"
    master = {}
    if "MASTER_ADDR" not in request.said:
        master = {"MASTER_ADDR": UNNAMED_MASTER}
        head += f" ({UNNAMED_MASTER}: the name or address of node 0)"
    shown = [0, 1, nodes - 1] if nodes > MOST_LINES else list(range(nodes))
    lines = [f"  {request.command(**master, NODE_RANK=rank)}" for rank in shown]
    if len(shown) < nodes:
        lines.insert(2, f"  … NODE_RANK=2 to {nodes - 2}, each in a line like these …")
    return "\n".join([head, *lines])
