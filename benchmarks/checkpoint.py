#!/usr/bin/env python3
"""How long training waits for a save, in the background and not, and how long a resume takes.

    python benchmarks/checkpoint.py [--small] [--rounds 3] [--folder FOLDER]

Two processes train a Llama (BF16, data parallel, distributed optimizer) and save it in turn in each of these ways, with
steps between. All write the same values, each process its share:

    megatron-rocm               ASYNC_SAVE=1, the default: copied to host memory, then written by a thread
    megatron-rocm, ASYNC_SAVE=0 training waits until it is on disk
    megatron-core, async        its torch_dist strategy with FullyParallelSaveStrategyWrapper and AsyncCallsQueue
    megatron-core               the same, not async

`waited` is the seconds that the step's thread spends in the call that saves; the first save of each kind, which plans,
stands apart. `whole` are the seconds until the checkpoint has its name and is on disk (megatron-core's has no
checksums, nor syncs names). `step` is a step's time while a checkpoint is written, `undisturbed` while none
is: on a CPU the writer takes a core from training, on a GPU it does not. Medians over rounds and steps. `resume` reads
every byte twice, once for its checksum, from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANKS = 2
STEPS = 4  # after each save
# layers, hidden, feed-forward, heads, vocabulary, sequence length
SHAPES = {False: (8, 1024, 2816, 16, 32000, 256), True: (4, 256, 704, 4, 8000, 128)}
Save = Callable[[], Callable[[], None]]  # begins one; what it returns waits for its end


def work(small: bool, rounds: int, root: Path) -> None:
    """One of the processes; rank 0 prints what it has measured."""
    from megatron_rocm.config import read
    from megatron_rocm.platform import cpu, machine
    from megatron_rocm.resolve import resolve

    layers, hidden, ffn, heads, vocabulary, length = SHAPES[small]
    keys = {
        "MODEL_SIZE": "tiny", "GPUS_PER_NODE": RANKS, "TP": 1, "BS": RANKS, "SEQ_LENGTH": length, "PRECISION": "bf16",
        "TOTAL_ITERS": 10**6, "SAVE_CKPT_PATH": root / "saved", "LOG_DIR": root, "SAVE_KEEP_LAST": 1,
    }  # fmt: skip
    request = read("llama3", [f"{key}={value}" for key, value in keys.items()], {})
    run = resolve(request, machine.find(request.text("TARGET"), {}), {}).config
    cpu.install()
    import torch
    import torch.distributed as dist

    from megatron_rocm.checkpoint.load import resume
    from megatron_rocm.checkpoint.save import Saver, prepare
    from megatron_rocm.train import distributed, loop, step

    sizes = {
        "num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": heads,
        "num_query_groups": heads, "kv_channels": hidden // heads, "vocab_size": vocabulary,
        "padded_vocab_size": vocabulary, "tied_embeddings": False,
    }  # fmt: skip
    run = run.model_copy(update={"model": run.model.model_copy(update=sizes)})
    distributed.connect(run)
    distributed.form_groups(run)
    state = loop.build(run)
    step.prepare(run, state)
    prepare(run)
    train_data, _ = loop.open_data(run)
    batches = loop.open_batches(run, state, train_data)

    def ours(background: bool) -> Save:
        settings = run.checkpoint.model_copy(update={"async_save": background})
        saver = Saver(run.model_copy(update={"checkpoint": settings}), root / "saved")

        def save() -> Callable[[], None]:
            saver.save(state)
            return saver.close

        return save

    ways: dict[str, Save] = {
        "megatron-rocm": ours(True),
        "megatron-rocm, ASYNC_SAVE=0": ours(False),
        "megatron-core, async": theirs(run, state, root / "theirs", background=True),
        "megatron-core": theirs(run, state, root / "theirs", background=False),
    }

    def train() -> float:
        dist.barrier()
        began = time.perf_counter()
        step.train_step(run, state, batches)
        return time.perf_counter() - began

    found: dict[str, Any] = {name: {"waited": [], "whole": [], "step": [], "undisturbed": []} for name in ways}
    for _ in range(2):
        train()
    for _ in range(rounds + 1):
        for name, save in ways.items():
            dist.barrier()
            began = time.perf_counter()
            wait = save()
            found[name]["waited"].append(time.perf_counter() - began)
            if "ASYNC_SAVE=0" not in name and name != "megatron-core":
                found[name]["step"].append(train())
            wait()
            found[name]["whole"].append(time.perf_counter() - began)
            found[name]["undisturbed"] += [train() for _ in range(STEPS)]
    size = sum(file.stat().st_size for file in next((root / "saved").glob("iter_*")).iterdir())
    dist.barrier()
    began = time.perf_counter()
    resume(run, state)
    found["resume"] = time.perf_counter() - began
    found["bytes"] = size
    found["torch"] = torch.__version__
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    distributed.leave()


def theirs(run: Any, state: Any, folder: Path, *, background: bool) -> Save:
    """megatron-core's own way, as Megatron-LM goes it with --ckpt-fully-parallel-save and --async-save."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from megatron_rocm.checkpoint.state import sharded

    group = mpu.get_data_parallel_group(with_context_parallel=True)
    inner = TorchDistSaveShardedStrategy("torch_dist", 1)
    inner.use_cached_ckpt_structure = True
    strategy = FullyParallelSaveStrategyWrapper(inner, group, do_cache_distribution=True)
    queue = AsyncCallsQueue()
    first = True

    def save() -> Callable[[], None]:
        nonlocal first
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()
        with state.whole_parameters():
            request = dist_checkpointing.save(
                sharded(state), str(folder), strategy, validate_access_integrity=first, async_sharded_save=background
            )
        first = False
        if request:
            queue.schedule_async_request(request)
        return lambda: queue.maybe_finalize_async_calls(blocking=True) and None

    return save


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="0.1 GB instead of 2.3")
    parser.add_argument("--rounds", type=int, default=3, help="of each way, after a first (default: %(default)s)")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to use (default: %(default)s)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.small, args.rounds, args.worker)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="checkpoint-") as name:
        found = measured(args, Path(name))
    print(f"{found['bytes'] / 1e9:.2f} GB in {RANKS} processes; {os.cpu_count()} cores; torch {found['torch']}\n")
    print("| | waited, first save, s | waited, s | whole, s | step, s | undisturbed, s |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, values in found.items():
        if isinstance(values, dict):
            later = [statistics.median(values[what][1:]) for what in ("waited", "whole")]
            steps = [
                f"{statistics.median(values[what]):.2f}" if values[what] else "" for what in ("step", "undisturbed")
            ]
            print(f"| {name} | {values['waited'][0]:.2f} | {later[0]:.2f} | {later[1]:.2f} | {' | '.join(steps)} |")
    print(f"\nresume: {found['resume']:.2f} s, {found['bytes'] / found['resume'] / 1e9:.2f} GB/s")
    return 0


def measured(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """What rank 0 has found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, "--worker", str(root), "--rounds", str(args.rounds), *["--small"] * args.small]
    workers = [
        subprocess.Popen(
            words, env={**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        said = workers[0].communicate()[0]
        if any(worker.wait() for worker in workers):
            raise SystemExit("a process has failed")
    finally:
        for worker in workers:
            worker.kill()
    return json.loads(said.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
