"""One process of a run, from its configuration file to its exit status."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.process import die_with_parent, write_whole_lines

STATUS = "status.json"


def main(arguments: Sequence[str]) -> int:
    """Train as the file says; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m megatron_rocm.train", description="One process of a run.")
    parser.add_argument("--config", required=True, metavar="RUN.json", help="the resolved run")
    path = Path(parser.parse_args(arguments).config)
    die_with_parent()
    write_whole_lines()
    # megatron-core warns of fused kernels that are missing; which layers are used is decided and said already.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # It calls torch by names, and makes checkpoints of a class, that are on their way out.
    warnings.filterwarnings("ignore", message="(`torch.distributed|Please use DTensor)", category=FutureWarning)
    try:
        run = RunConfig.load(path)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: --config {path}: {error}", file=sys.stderr)
        return 2
    return work(run)


def work(run: RunConfig) -> int:
    """Join the run and train."""
    from megatron_rocm.platform import cpu

    cpu.install()
    from megatron_rocm.train import distributed
    from megatron_rocm.train.loop import Diverged, train

    try:
        distributed.connect(run)
        distributed.agree(run)
        distributed.form_groups(run)
        end = train(run)
    except (UsageError, Diverged) as error:
        usage = isinstance(error, UsageError)
        if distributed.first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        write_status(run, {"outcome": "refused" if usage else "diverged", "message": str(error)})
        return 2 if usage else 1
    write_status(
        run,
        {
            "outcome": end.outcome,
            "iteration": end.iteration,
            "train_iters": run.training.train_iters,
            "checkpoint": str(end.checkpoint) if end.checkpoint else None,
        },
    )
    distributed.leave()
    return 0


def write_status(run: RunConfig, status: dict[str, Any]) -> None:
    """Tell the launcher of this node how the run ended."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    folder = Path(run.launch.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{STATUS}.{os.getpid()}"
    temporary.write_text(json.dumps(status) + "\n")
    temporary.replace(folder / STATUS)
