"""A run whose ranks each are a node of their own, with a disk of its own: `python nodes.py FOLDER RUN.json`.

LOCAL_CKPT_PATH is relative, to FOLDER/node<rank> here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.train import process

folder, file = sys.argv[1:]
rank = int(os.environ["RANK"])
run = RunConfig.load(file)
here = Path(folder) / f"node{rank}"
here.mkdir(parents=True, exist_ok=True)
os.chdir(here)
os.environ["LOCAL_RANK"] = "0"
process.quiet()
sys.exit(process.work(run.model_copy(update={"launch": run.launch.model_copy(update={"node_rank": rank})})))
