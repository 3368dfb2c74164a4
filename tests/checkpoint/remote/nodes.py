"""A run whose ranks each are a node of their own, with a disk of its own: `python nodes.py FOLDER RUN.json`.

LOCAL_CKPT_PATH is relative, to FOLDER/node<rank> here. The loss of step $NAN_AT is not finite when it is first done.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.train import loop, process
from megatron_rocm.train.faults import Fault

folder, file = sys.argv[1:]
rank = int(os.environ["RANK"])
run = RunConfig.load(file)
here = Path(folder) / f"node{rank}"
here.mkdir(parents=True, exist_ok=True)
os.chdir(here)
os.environ["LOCAL_RANK"] = "0"
if bad := int(os.environ.get("NAN_AT", "0")):
    train_step = loop.train_step

    def step(run: RunConfig, state: Any, batches: Any) -> Any:
        global bad
        result = train_step(run, state, batches)
        if state.iteration == bad:
            bad = 0
            return result._replace(fault=Fault("nan", "rollback", "the lm loss is nan"))
        return result

    loop.train_step = step
process.quiet()
sys.exit(process.work(run.model_copy(update={"launch": run.launch.model_copy(update={"node_rank": rank})})))
