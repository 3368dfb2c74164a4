"""What is executed on a node, and the files of its own that it writes into the run folder."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_rocm.config.schema import RunConfig


def command(run: RunConfig, *program: str) -> list[str]:
    """What is executed on this node: training, or the module and its arguments in `program`."""
    at = run.launch
    return [
        sys.executable, "-m", "megatron_rocm.launch.torchrun",
        "--nnodes", str(run.parallel.nnodes), "--node-rank", str(at.node_rank),
        "--nproc-per-node", str(run.parallel.gpus_per_node),
        "--master-addr", at.master_addr, "--master-port", str(at.master_port),
        "--rdzv-conf", f"timeout={at.rdzv_timeout}",
        "--module", "--", *(program or ("megatron_rocm.train", "--config", str(config_file(run)))),
    ]  # fmt: skip


def config_file(run: RunConfig) -> Path:
    """The resolved configuration that this node's workers read."""
    return Path(run.launch.log_dir) / f"run{_node(run)}.json"


def log_file(run: RunConfig) -> Path:
    """This node's log."""
    return Path(run.launch.log_dir) / f"output_{run.launch.exp_name}{_node(run)}.log"


def _node(run: RunConfig) -> str:
    """Nodes that share a run folder must not share files."""
    return f"_node{run.launch.node_rank}" if run.launch.node_rank else ""
