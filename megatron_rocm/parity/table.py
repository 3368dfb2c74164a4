"""What a comparison prints."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.parity.layouts import LAYOUTS, Planned
from megatron_rocm.parity.verdict import LATER, Differences, tolerance
from megatron_rocm.parity.worker import REFERENCE

OK, MISMATCH, CRASHED, SKIPPED = "ok", "MISMATCH", "CRASHED", "skipped"
BAD = (MISMATCH, CRASHED)
WIDTH = 118
_NAME = max(len(layout.name) for layout in LAYOUTS)
_COLUMNS = f"{{:<{_NAME}}}  {{:>8}}  {{:>8}}  {{:>8}}  {{:<8}}  {{}}"


@dataclass(frozen=True)
class Row:
    """One layout. Without differences, the note says why there are none."""

    layout: str
    verdict: str
    differences: Differences | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.layout == REFERENCE:
            return _COLUMNS.format(self.layout, "-", "-", "-", "", self.note)
        if not self.differences:
            return f"{self.layout:<{_NAME}}  {self.verdict}: {self.note}"
        found = self.differences
        numbers = (f"{value:.1e}" for value in (found.loss, found.norm, found.gradient))
        whose = found.parameter if found.gradient else ""
        return _COLUMNS.format(self.layout, *numbers, self.verdict, whose).rstrip()


def head(run: RunConfig, steps: int) -> list[str]:
    """What is compared, and the names of the columns."""
    training, data = run.training, "your data" if run.data.paths else "mock data"
    many = "1 step" if steps == 1 else f"{steps} steps"
    return [
        f"{run.model.title} in {run.precision.dtype.upper()}, {many} of {training.global_batch_size} sequences of "
        f"{training.seq_length} tokens of {data}",
        f"one process is compared to {REFERENCE} in FP32, all others to one process",
        "",
        _COLUMNS.format("", "loss", "gradient", "worst", "", "").rstrip(),
        _COLUMNS.format("layout", "nats", "norm", "gradient", "verdict", "whose gradient is the worst"),
    ]


def tail(run: RunConfig, steps: int, rows: Sequence[Row]) -> list[str]:
    """The tolerances and why they are these, and the verdict on all."""
    allowed = tolerance(run)
    lines = ["", "largest differences allowed: loss in nats, gradient norm before clipping and gradients relative"]
    before = 0
    for at in allowed.steps:
        if before < steps:
            last = at is allowed.steps[-1] or at.until >= steps
            until = steps if last else at.until
            name = f"step {until}" if until == before + 1 else f"steps {before + 1} to {until}"
            gradient = f"{allowed.gradient:8.0e}" if not before else ""
            lines.append(f"{name:<{_NAME}}  {at.loss:8.0e}  {at.norm:8.0e}  {gradient}".rstrip())
            before = until
    why = f"{allowed.why}. {LATER}." if steps > 1 else f"{allowed.why}."
    bad = [row.layout for row in rows if row.verdict in BAD]
    compared = sum(row.differences is not None for row in rows)
    verdict = f"failed: {', '.join(bad)}" if bad else f"all {compared} agree"
    return [*lines, *textwrap.wrap(why, WIDTH), "", verdict]


def skipped(rows: Sequence[Row]) -> list[str]:
    """Layouts that were not run, by the reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.verdict == SKIPPED:
            reasons.setdefault(row.note, []).append(row.layout)
    return [f"{SKIPPED}: {', '.join(names)}: {why}" for why, names in reasons.items()]


def plan_lines(planned: Sequence[Planned]) -> list[str]:
    """For DRY_RUN=1: what would be run, and what not."""
    lines = [f"{'layout':<{_NAME}}  processes"]
    for one in planned:
        layout = one.layout
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in layout.variables.items())
        what = variables if one.resolution else f"{SKIPPED}: {one.refused}"
        lines.append(f"{layout.name:<{_NAME}}  {layout.processes or '-':>9}  {what}".rstrip())
    return lines
