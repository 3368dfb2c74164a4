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
from megatron_rocm.platform import startup
from megatron_rocm.platform.process import die_with_parent, write_whole_lines

STATUS = "status.json"
# What a run that does not end well is called there, by what it raised.
ENDED = {"UsageError": "refused", "Diverged": "diverged", "SaveFailed": "unsaved"}


def main(arguments: Sequence[str]) -> int:
    """Train as the file says; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m megatron_rocm.train", description="One process of a run.")
    parser.add_argument("--config", required=True, metavar="RUN.json", help="the resolved run")
    path = Path(parser.parse_args(arguments).config)
    startup.begin()
    die_with_parent()
    write_whole_lines()
    quiet()
    try:
        run = RunConfig.load(path)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: --config {path}: {error}", file=sys.stderr)
        return 2
    return work(run)


def quiet() -> None:
    """Silence warnings that a user can do nothing about."""
    # megatron-core warns of fused kernels that are missing; which layers are used is decided and said already.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # It calls torch by names, and makes checkpoints of a class, that are on their way out.
    warnings.filterwarnings("ignore", message="(`torch.distributed|Please use DTensor)", category=FutureWarning)


def work(run: RunConfig) -> int:
    """Join the run and train."""
    with startup.lean_imports():
        from megatron_rocm.platform import cpu

        on_cpu = cpu.install()
        from megatron_rocm.checkpoint.save import SaveFailed
        from megatron_rocm.train import distributed
        from megatron_rocm.train.loop import Diverged, train

    startup.done("imports")
    try:
        must_be_the_machine(run, on_cpu)
        core_must_agree(run)
        distributed.connect(run)
        distributed.agree(run)
        distributed.form_groups(run)
        startup.done("rendezvous")
        end = train(run)
    except (UsageError, Diverged, SaveFailed) as error:
        usage = isinstance(error, UsageError)
        if distributed.first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        write_status(run, {"outcome": ENDED[type(error).__name__], "message": str(error)})
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


def must_be_the_machine(run: RunConfig, on_cpu: bool) -> None:
    """Raise UsageError where torch sees a GPU and the launcher has found none, or the other way round."""
    found_none = run.hardware.vendor == "cpu"
    if on_cpu and not found_none:
        raise UsageError(
            f"the launcher found a GPU ({run.hardware.arch}), but torch in {sys.executable} sees none: "
            "install the torch of this machine's GPUs, or set TARGET=cpu"
        )
    if found_none and not on_cpu:
        raise UsageError(
            "the run is for a CPU, but torch sees a GPU that the launcher did not find (by the amdgpu driver's "
            "/sys/class/kfd or by nvidia-smi): make these readable here, or set TARGET=cpu to leave the GPU alone"
        )


def core_must_agree(run: RunConfig) -> None:
    """Raise UsageError where megatron-core's own classes refuse what core.<class>.<field>= has set."""
    from megatron_rocm.model.build import ddp_config, optimizer_config, transformer_config

    said = {name: value for name, value in run.core.model_dump().items() if value}
    try:
        transformer_config(run)
        ddp_config(run)
        optimizer_config(run)
    except (ValueError, AssertionError) as error:
        if not said:
            raise
        fields = ", ".join(f"core.{kind}.{name}={value}" for kind, of in said.items() for name, value in of.items())
        raise UsageError(f"megatron-core refuses {fields}: {' '.join(str(error).split())}") from error


def write_status(run: RunConfig, status: dict[str, Any]) -> None:
    """Tell the launcher of this node how the run ended."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    folder = Path(run.launch.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{STATUS}.{os.getpid()}"
    temporary.write_text(json.dumps(status) + "\n")
    temporary.replace(folder / STATUS)
