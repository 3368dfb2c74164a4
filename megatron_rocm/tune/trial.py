"""Products tried in a process of their own, which has the environment of training and reads the same tuning file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from megatron_rocm.errors import UsageError
from megatron_rocm.launch import run as launched
from megatron_rocm.platform.settings import environment
from megatron_rocm.resolve import Resolution
from megatron_rocm.tune.shapes import Gemm

SECONDS = 600  # for torch to be imported and the first kernel to be loaded
SECONDS_EACH = 120  # for a product over all inputs; what takes longer hangs
NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Ruling:
    """Whether a product came out right, and why not."""

    right: bool
    why: str = ""


@dataclass(frozen=True)
class Answer:
    """What a trial brought. `rulings` are of the products it came to; `library` and `revision` are hipBLASLt's."""

    rulings: dict[str, Ruling] = field(default_factory=dict)
    library: str = ""
    revision: str = ""
    results: tuple[tuple[str, ...], ...] = ()  # TunableOp's: operator, parameters, kernel
    log: str = ""  # hipBLASLt's, with mask 32: every product with the kernel it ran


class Trials:
    """Tries products of a resolved run, with files in `folder`."""

    def __init__(self, resolution: Resolution, folder: Path) -> None:
        self.resolution = resolution
        self.folder = folder

    def __call__(
        self, what: Literal["judge", "try"], gemms: Sequence[Gemm], tuning: str = "0", more: Mapping[str, str] = NONE
    ) -> Answer:
        """Judge products or multiply once, with GEMM_TUNING=`tuning` and `more` variables.

        A kernel that kills its process or hangs is wrong; products after it are not in the answer. Raises UsageError
        where no product can be tried at all.
        """
        task, said, log, printed = (self.folder / name for name in ("task.json", "answer.jsonl", "log", "printed"))
        for old in (said, log):
            old.unlink(missing_ok=True)
        task.write_text(json.dumps({"what": what, "gemms": [asdict(gemm) for gemm in gemms]}))
        variables = {**self._environment(tuning, log, printed), **more}
        words = [sys.executable, "-m", "megatron_rocm.tune.worker", str(task), str(said)]
        try:
            status = _start(words, variables, printed, SECONDS + SECONDS_EACH * len(gemms))
            how = f"its process was killed by {signal.Signals(-status).name}" if status < 0 else ""
        except subprocess.TimeoutExpired:
            how = "it hangs"
        return self._read(said, log, how, printed)

    def _environment(self, tuning: str, log: Path, printed: Path) -> dict[str, str]:
        """The run's own environment with this GEMM_TUNING, and a log of every kernel that hipBLASLt runs."""
        resolution, request = self.resolution, self.resolution.request
        run = resolution.config.model_copy(
            update={"launch": resolution.config.launch.model_copy(update={"gemm_tuning": tuning})}
        )
        settings = environment(run, resolution.machine, dict(os.environ), request.exports)
        variables = launched.environment(replace(resolution, config=run, environment=settings), printed)
        variables.pop("HIPBLASLT_LOG_LEVEL", None)  # where it is set, the mask has no effect
        return {**variables, "HIPBLASLT_LOG_MASK": "32", "HIPBLASLT_LOG_FILE": str(log)}

    def _read(self, said: Path, log: Path, how: str, printed: Path) -> Answer:
        whole = said.read_text().split("\n")[:-1] if said.exists() else []  # less a line that a kill cut short
        lines: list[dict[str, Any]] = [json.loads(line) for line in whole]
        told = {
            name: value for line in lines for name, value in line.items() if name not in ("begun", "done", "verdict")
        }
        if "refused" in told:
            raise UsageError(told["refused"])
        done = {line["done"]: line.get("verdict", {"right": True, "why": ""}) for line in lines if "done" in line}
        rulings = {key: Ruling(verdict["right"], verdict["why"]) for key, verdict in done.items()}
        open_ = [line["begun"] for line in lines if "begun" in line and line["begun"] not in done]
        if open_ and how:
            rulings[open_[0]] = Ruling(False, how)
        if not rulings:
            words = printed.read_text().strip().splitlines()[-1:] or ["it says nothing"]
            raise UsageError(f"matrix products can't be tried on this machine: {how or words[0]}")
        return Answer(
            rulings,
            told.get("library", ""),
            told.get("revision", ""),
            tuple(tuple(row) for row in told.get("results", ())),
            log.read_text(errors="replace") if log.exists() else "",
        )


def _start(words: list[str], variables: dict[str, str], printed: Path, timeout: float) -> int:
    """Run a process to its end; its exit status, -n where signal n ended it."""
    with open(printed, "w") as output:
        done = subprocess.run(
            words, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=timeout
        )
    return done.returncode
