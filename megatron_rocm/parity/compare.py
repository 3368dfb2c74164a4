"""The layouts of a plan, each trained a few steps, and the verdict on them."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.launch import preflight
from megatron_rocm.launch.command import command
from megatron_rocm.launch.run import environment
from megatron_rocm.parity import table
from megatron_rocm.parity.layouts import Planned
from megatron_rocm.parity.table import Row
from megatron_rocm.parity.verdict import differences, tolerance
from megatron_rocm.parity.worker import ALONE, REFERENCE, Plan
from megatron_rocm.resolve import Resolution

WORKER = "megatron_rocm.parity.worker"
LOG = "parity.log"
RESULTS = "parity.json"
POLL = 0.2  # seconds between looks for a result
TAIL = 12  # lines shown of what failed processes have said

Runs = Mapping[str, Resolution]  # by layout
Measured = dict[str, Any]  # as the worker writes it


class Refused(Exception):
    """The processes say that the user has made a mistake."""


def compare(planned: Sequence[Planned], steps: int, folder: Path) -> int:
    """Measure, print the table meanwhile, and leave all numbers in `folder` as RESULTS. The exit status."""
    runs = _alike({one.layout.name: one.resolution for one in planned if one.resolution})
    alone = runs[ALONE].config
    preflight.writable("LOG_DIR", folder)
    preflight.check(_placed(alone, folder, ALONE))
    print("\n".join(table.head(alone, steps)), flush=True)
    rows: list[Row] = []
    measured: dict[str, Measured] = {}
    gradients = Plan(str(folder), steps, ()).gradients
    shutil.rmtree(gradients, ignore_errors=True)  # of a comparison that was killed
    try:
        for row in _rows(runs, steps, folder, measured):
            rows.append(row)
            print(row, flush=True)
    except Refused as error:
        print(f"\n{error}")
        return 2
    finally:
        shutil.rmtree(gradients, ignore_errors=True)
    rows += [Row(one.layout.name, table.SKIPPED, note=one.refused) for one in planned if not one.resolution]
    print("".join(f"{line}\n" for line in table.skipped(rows)), end="")
    numbers = [{**asdict(row), **measured.get(row.layout, {})} for row in rows]
    (folder / RESULTS).write_text(json.dumps({"steps": steps, "layouts": numbers}, indent=1) + "\n")
    print("\n".join(table.tail(alone, steps, rows)))
    print(f"every step and parameter: {folder / RESULTS}")
    return 1 if any(row.verdict in table.BAD for row in rows) else 0


def _rows(runs: Runs, steps: int, folder: Path, measured: dict[str, Measured]) -> Iterator[Row]:
    """A row for each layout as soon as it is measured, which fills `measured`."""
    for names in _starts(runs):
        left = list(names)
        while left:
            for name in _measure(tuple(left), runs, steps, folder):
                left.remove(name)
                measured[name] = json.loads(Plan(str(folder), steps, ()).result(name).read_text())
                if name == REFERENCE:
                    yield Row(name, "", note="what one process is compared to")
                else:
                    yield _judged(name, measured, runs[name].config)
            if left:  # what was measured last has failed
                yield Row(left[0], table.CRASHED, note=f"see {folder / LOG}\n{_said(folder)}")
                if ALONE in left:
                    return
                del left[0]


def _alike(runs: Runs) -> Runs:
    """With as many CPU threads each: a kernel divides its sums among them, and so rounds otherwise with more."""
    threads = min(resolution.config.hardware.threads for resolution in runs.values())
    alike = {}
    for name, resolution in runs.items():
        run = resolution.config
        hardware = run.hardware.model_copy(update={"threads": threads})
        alike[name] = replace(resolution, config=run.model_copy(update={"hardware": hardware}))
    return alike


def _starts(runs: Runs) -> list[list[str]]:
    """Layouts by what their processes have in common: number and environment. Starting processes costs 10 s."""
    starts: dict[Any, list[str]] = {}
    for name, resolution in runs.items():
        settings = tuple(sorted((key, value) for key, (value, _) in resolution.environment.items()))
        starts.setdefault((resolution.config.parallel.world_size, settings), []).append(name)
    next(iter(starts.values())).insert(0, REFERENCE)  # beside one process, which comes first
    return list(starts.values())


def _measure(names: Sequence[str], runs: Runs, steps: int, folder: Path) -> Iterator[str]:
    """Start processes for these layouts; each one's name when its result is there. Ends early where they fail."""
    plan = Plan(str(folder), steps, tuple(name for name in names if name != REFERENCE))
    first = runs[plan.runs[0]]
    for name in names:
        plan.result(name).parent.mkdir(parents=True, exist_ok=True)
        plan.result(name).unlink(missing_ok=True)
        if name != REFERENCE:
            run = _placed(runs[name].config, folder, name)
            run.save(plan.run_file(name))
    plan.save(folder / "plan.json")
    words = command(_placed(first.config, folder, plan.runs[0]), WORKER, "--plan", str(folder / "plan.json"))
    with open(folder / LOG, "ab") as log:
        process = subprocess.Popen(
            words, env=environment(first, folder / LOG), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        for name in names:
            while not plan.result(name).is_file():
                if process.poll() is not None and not plan.result(name).is_file():
                    if process.returncode == 2:
                        raise Refused(_said(folder))
                    return
                time.sleep(POLL)
            yield name
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _placed(run: RunConfig, folder: Path, name: str) -> RunConfig:
    """The run with a folder of its own and a port that is free."""
    where = {"log_dir": str((folder / name).resolve()), "master_port": preflight.free_port()}
    return run.model_copy(update={"launch": run.launch.model_copy(update=where)})


def _judged(name: str, measured: Mapping[str, Measured], run: RunConfig) -> Row:
    apart = differences(measured[name], measured[REFERENCE if name == ALONE else ALONE], tolerance(run))
    return Row(name, table.OK if apart.agree else table.MISMATCH, apart)


def _said(folder: Path) -> str:
    """The end of the log."""
    return "\n".join(f"  | {line}" for line in (folder / LOG).read_text(errors="replace").splitlines()[-TAIL:])
