"""What tests of whole runs share: a tiny resolved run, and real processes that train it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rocm.cli import main
from megatron_rocm.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[1]

# A Llama that starts to learn the mock data in a few steps; one process, FP32, nothing saved.
TINY: dict[str, dict[str, Any]] = {
    "model": {
        "family": "llama3", "size": "tiny", "title": "Llama for tests", "num_layers": 4, "hidden_size": 64,
        "ffn_hidden_size": 160, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16, "vocab_size": 300,
        "padded_vocab_size": 512, "max_position_embeddings": 64, "rotary_base": 500_000, "rope_scaling": True,
        "rope_scaling_factor": 8.0, "tied_embeddings": False,
    },
    "parallel": {
        "nnodes": 1, "gpus_per_node": 1, "world_size": 1, "tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1,
        "sequence_parallel": False, "fsdp": False, "distributed_optimizer": False, "overlap_grad_reduce": False,
        "overlap_param_gather": False, "count_embedding_and_loss": False,
    },
    "precision": {"dtype": "fp32", "flash_attention": False},
    "training": {
        "micro_batch_size": 1, "global_batch_size": 4, "num_micro_batches": 4, "seq_length": 32, "train_iters": 4,
        "seed": 1234, "recompute": False, "recompute_num_layers": None,
    },
    "optimizer": {"name": "adam", "lr": 3e-3, "min_lr": 3e-4, "lr_warmup_iters": 0, "lr_decay_iters": 100},
    "data": {"blend": None, "split": "99,1,0", "cache_path": None, "tokenizer_model": None, "eod": 1},
    "checkpoint": {"save": None, "load": None},
    "logging": {"tensorboard": False, "wandb": False},
    "launch": {"master_port": 6000, "log_dir": "."},
    "hardware": {"vendor": "cpu", "arch": "x86_64", "gpu_memory": 2**34, "tier": "torch", "threads": 1},
}  # fmt: skip


def tiny_run(log_dir: Path | str = ".", **overrides: Any) -> RunConfig:
    """TINY with fields replaced, each named by its own name or as section__field.

    Sizes that follow from others (world_size, dp, num_micro_batches, gpus_per_node) are made to.
    """
    fields = {section: dict(values) for section, values in TINY.items()}
    fields["launch"]["log_dir"] = str(log_dir)
    for name, value in overrides.items():
        section, _, field = name.rpartition("__")
        fields.setdefault(section or _section(name), {})[field] = value
    parallel, training = fields["parallel"], fields["training"]
    model_size = parallel["tp"] * parallel["pp"] * parallel["cp"]
    parallel["world_size"] = model_size * parallel["dp"]
    parallel["gpus_per_node"] = parallel["world_size"] // parallel["nnodes"]
    training["num_micro_batches"] = training["global_batch_size"] // (training["micro_batch_size"] * parallel["dp"])
    return RunConfig.model_validate(fields)


def _section(field: str) -> str:
    for section, info in RunConfig.model_fields.items():
        if field in info.annotation.model_fields:  # type: ignore[union-attr]
            return section
    raise KeyError(field)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a worker: the package importable, one thread, no launcher's variables."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def start(run: RunConfig, *program: str) -> subprocess.Popen[str]:
    """Start the run under torchrun (its log_dir gets run.json) without waiting; stdout and stderr come together.

    `program` replaces `-m megatron_rocm.train --config run.json`. The processes are a group of their own.
    """
    folder = Path(run.launch.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    run.save(folder / "run.json")
    return subprocess.Popen(
        [
            sys.executable, "-m", "megatron_rocm.launch.torchrun",
            "--nnodes=1", f"--nproc-per-node={run.parallel.world_size}",
            "--master-addr=127.0.0.1", f"--master-port={free_port()}", "--",
            *(program or ("-m", "megatron_rocm.train", "--config", str(folder / "run.json"))),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        cwd=folder,
        start_new_session=True,
    )  # fmt: skip


def execute(run: RunConfig, *program: str, status: int = 0, timeout: float = 120) -> str:
    """Train the run (its log_dir gets run.json) in processes of the nursery, require their status; what they printed.

    `program` replaces `-m megatron_rocm.train --config run.json`.
    """
    folder = Path(run.launch.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    run.save(folder / "run.json")
    said = folder / "said.txt"
    said.unlink(missing_ok=True)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(run.parallel.world_size)}
    words = program or ("-m", "megatron_rocm.train", "--config", str(folder / "run.json"))
    got = in_nursery(words, environment(**where), folder, said, timeout, run.parallel.world_size)
    text = said.read_text() if said.exists() else ""
    assert got == status, f"status {got}\n{text}"
    return text


def in_nursery(
    program: Sequence[str], env: Mapping[str, str], cwd: Path, said: Path, timeout: float = 120, ranks: int = 1
) -> int:
    """Run a program in processes of the nursery, its output to `said`; the first failure's exit status, or 0."""
    order = {
        "program": program,
        "ranks": ranks,
        "env": dict(env),
        "cwd": str(cwd),
        "said": str(said),
        "timeout": timeout,
    }
    nursery = _nursery()
    assert nursery.stdin and nursery.stdout
    answer = ""
    try:
        print(json.dumps(order), file=nursery.stdin, flush=True)
        answer = nursery.stdout.readline()
    finally:
        if not answer:  # a test's time is over, or the nursery has died: the next order must not get this one's answer
            nursery.kill()
            nursery.wait()
            _nursery.cache_clear()
    return int(answer or -9)


@functools.cache
def _nursery() -> subprocess.Popen[str]:
    """Of this process of pytest, with whose end its stdin ends, and so it does."""
    program = str(ROOT / "tests" / "nursery.py")
    return subprocess.Popen(
        [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )


def train_all(*runs: RunConfig) -> None:
    """Train runs of one world size, each in its own log_dir, one after the other in the same processes."""
    for run in runs:
        Path(run.launch.log_dir).mkdir(parents=True, exist_ok=True)
        run.save(Path(run.launch.log_dir) / "run.json")
    files = [str(Path(run.launch.log_dir) / "run.json") for run in runs]
    execute(runs[0], str(ROOT / "tests" / "several.py"), *files, timeout=500)


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 for the launcher and all it started, if they still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def metrics(run: RunConfig) -> list[dict[str, Any]]:
    """The lines of the run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run.launch.log_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(run: RunConfig) -> list[float]:
    """The loss of each iteration, in the order of metrics.jsonl."""
    return [row["lm_loss"] for row in metrics(run) if "lm_loss" in row]


def parity(folder: Path, *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """`megatron-rocm parity` with these words: its exit status, and by layout what it leaves in `folder`."""
    status = main(["parity", f"LOG_DIR={folder}", *words])
    rows = json.loads((folder / "parity.json").read_text())["layouts"]
    return status, {row["layout"]: row for row in rows}
