"""`python -m megatron_rocm.parity.worker --plan PLAN.json`: one process that measures layouts of one world size.

Exit status: 0 when all are measured, 2 for a mistake that the user can put right, 1 for everything else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.process import die_with_parent, write_whole_lines

REFERENCE = "transformers"  # no layout
ALONE = "one-process"  # the layout whose gradients the others' are compared to
RESULT = "result.json"


@dataclass(frozen=True)
class Plan:
    """What the processes of one start do. `runs` are layouts' names; `folder` has a folder for each, with its run."""

    folder: str
    steps: int
    runs: tuple[str, ...]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        fields = json.loads(Path(path).read_text())
        return cls(fields["folder"], fields["steps"], tuple(fields["runs"]))

    def run_file(self, name: str) -> Path:
        """What a layout has resolved to."""
        return Path(self.folder) / name / "run.json"

    def result(self, name: str) -> Path:
        """Where rank 0 puts what came of a layout."""
        return Path(self.folder) / name / RESULT

    @property
    def gradients(self) -> Path:
        """The folder of the first step's gradients in one process."""
        return Path(self.folder) / "gradients"


def main(arguments: Sequence[str]) -> int:
    """Measure the plan's layouts one after the other."""
    parser = argparse.ArgumentParser(prog="python -m megatron_rocm.parity.worker", description="One process of parity.")
    parser.add_argument("--plan", required=True, metavar="PLAN.json")
    plan = Plan.load(parser.parse_args(arguments).plan)
    die_with_parent()
    write_whole_lines()
    from megatron_rocm.platform import cpu
    from megatron_rocm.train import process

    process.quiet()
    on_cpu = cpu.install()
    from megatron_rocm.parity.measure import forget, measure, measure_references
    from megatron_rocm.train import distributed

    runs = {name: RunConfig.load(plan.run_file(name)) for name in plan.runs}
    first = next(iter(runs.values()))
    try:
        process.must_be_the_machine(first, on_cpu)
        for run in runs.values():
            process.core_must_agree(run)
        distributed.connect(first)
        for name, run in runs.items():
            if name == ALONE:
                found, reference = measure_references(run, plan.steps, plan.gradients)
                results = {REFERENCE: reference, ALONE: found}
            else:
                results = {name: measure(run, plan.steps, plan.gradients)}
            if os.environ["RANK"] == "0":
                for of, result in results.items():
                    result.save(plan.result(of))
            forget()
    except UsageError as error:
        if distributed.first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    distributed.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
