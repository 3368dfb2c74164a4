"""Start runs with something planted in them, by planted.py, and read what they leave."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from support import ROOT, execute

from megatron_rocm.config.schema import RunConfig


def plant(
    kind: str, rank: int, layer: int = 0, module: str = "", value: float = math.nan, sample: int = 9, **more: Any
) -> Any:
    """The plan of a fault in the step that trains on `sample`."""
    return {"kind": kind, "rank": rank, "layer": layer, "module": module, "value": value, "sample": sample, **more}


def planted(plans: dict[str, dict[str, Any]], *runs: RunConfig) -> None:
    """Train the runs in one start of processes; the plan of each goes by its folder's name."""
    files = []
    for run in runs:
        folder = Path(run.launch.log_dir)
        folder.mkdir(parents=True)
        run.save(folder / "run.json")
        if folder.name in plans:
            (folder / "plan.json").write_text(json.dumps(plans[folder.name]))
        files.append(str(folder / "run.json"))
    execute(runs[0], str(ROOT / "tests" / "planted.py"), *files, timeout=400)


def left(run: RunConfig, file: str) -> Any:
    return json.loads((Path(run.launch.log_dir) / file).read_text())


def told(run: RunConfig) -> str:
    return (Path(run.launch.log_dir) / "told.txt").read_text()
