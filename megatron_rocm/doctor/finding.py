"""What a check finds, and the report that findings make."""

from __future__ import annotations

import textwrap
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["ok", "warning", "problem"]
WIDTH = 118


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(_Part):
    """One answer. A `problem` keeps training from starting, a `warning` makes it slower or less safe.

    `why` says what it leads to, `mend` is the command, flag or variable that mends it; both empty where all is well.
    """

    check: str
    status: Status = "ok"
    found: str
    why: str = ""
    mend: str = ""
    concern: str = ""


class Report(_Part):
    """What `--json` prints. `network` and `gemm` have rows where they were asked for; doctor.measure says of what."""

    version: str
    host: str
    can_train: bool
    machine: dict[str, Any]
    findings: tuple[Finding, ...]
    network: tuple[dict[str, Any], ...] = ()
    gemm: tuple[dict[str, Any], ...] = ()


def warning(check: str, found: str, why: str, mend: str = "") -> Finding:
    """Training can start all the same."""
    return Finding(check=check, status="warning", found=found, why=why, mend=mend)


def problem(check: str, found: str, why: str, mend: str = "") -> Finding:
    """Training can't start."""
    return Finding(check=check, status="problem", found=found, why=why, mend=mend)


def fine(check: str, found: str) -> Finding:
    """As it should be, or a fact that needs no judgement."""
    return Finding(check=check, found=found)


def text(findings: tuple[Finding, ...]) -> list[str]:
    """The findings as lines, by concern in their order; what is wrong with its reason and remedy below it."""
    lines: list[str] = []
    concern = ""
    name = max((len(finding.check) for finding in findings), default=0)
    for finding in findings:
        if finding.concern != concern:
            concern = finding.concern
            lines += ["", concern]
        lines += _wrapped(f"  {finding.status:<8} {finding.check:<{name}}  ", finding.found)
        under = " " * (13 + name)
        if finding.why:
            lines += _wrapped(f"{under}why:  ", finding.why)
        if finding.mend:
            lines.append(f"{under}mend: {finding.mend}")  # whole, so that a command can be copied
    return lines[1:]


def verdict(findings: tuple[Finding, ...]) -> str:
    """The last line: whether training can start, and what was counted."""
    count = {status: sum(finding.status == status for finding in findings) for status in ("problem", "warning", "ok")}
    can = "can't" if count["problem"] else "can"
    counts = ", ".join(f"{number} {status}{'s' * (number != 1 and status != 'ok')}" for status, number in count.items())
    return f"training {can} start here: {counts}"


def _wrapped(head: str, words: str) -> list[str]:
    """`words` after `head`, over several lines where they are long."""
    return textwrap.wrap(
        words, max(WIDTH, len(head) + 40), initial_indent=head, subsequent_indent=" " * len(head),
        break_long_words=False, break_on_hyphens=False,
    ) or [head.rstrip()]  # fmt: skip
