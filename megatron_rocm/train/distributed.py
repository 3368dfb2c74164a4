"""The processes of a run find each other, agree that they have the same run, and make megatron-core's groups."""

from __future__ import annotations

import datetime
import hashlib
import os
import random
import socket
from collections import defaultdict

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.train import meeting

# A rank may wait this long for another in a collective: for a slow disk or a dataset's index, not for a dead peer
# (torchrun notices those).
COLLECTIVE_TIMEOUT = 1800  # seconds

_store: list[dist.Store] = []  # where the processes met, once they have


def connect(run: RunConfig) -> None:
    """Join the other processes, within run.launch.rdzv_timeout seconds. Raises UsageError where that can't be."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.set_num_threads(run.hardware.threads)
    gpu = run.hardware.vendor != "cpu"
    if gpu:
        torch.cuda.set_device(local_rank)
    seconds = run.launch.rdzv_timeout
    where = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
    if run.parallel.nnodes > 1:
        name, address = meeting.interface(run)
        where += f", over {name} ({address})"
    unreachable = UsageError(
        f"node {run.launch.node_rank} could not reach the master at {where} within {seconds} seconds: "
        "is the run started on node 0, are MASTER_ADDR and MASTER_PORT right, is the port open?"
    )
    absent = (
        f"not all of the run's {run.parallel.world_size} processes have reached the master at {where} within "
        f"{seconds} seconds: start the run on every node, NODE_RANK 0 to {run.parallel.nnodes - 1}"
    )
    wait = datetime.timedelta(seconds=seconds)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=wait))  # type: ignore[attr-defined]
    except Exception as error:  # rank 0 may keep the store itself, and then waits there for the others
        raise (UsageError(absent) if os.environ["RANK"] == "0" else unreachable) from error
    store.set_timeout(wait)
    _store.append(store)
    try:
        everyone(store, "joined", rank, world_size)
    except Exception as error:
        raise UsageError(absent + _missing(store, run)) from error
    meeting.meet(store, run, rank)
    with meeting.deadline(max(meeting.SLOWEST, seconds), run, rank):
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=max(COLLECTIVE_TIMEOUT, run.checkpoint.save_timeout)),
        )
        # NCCL connects in the first collective, which may never end; gloo has done so by now.
        dist.all_reduce(torch.zeros(1, device="cuda" if gpu else "cpu"))
        if gpu:
            torch.cuda.synchronize()


def store() -> dist.Store:
    """Where the processes met: what one sets there all can read, from any thread."""
    return _store[0]


def first_to_say(message: str) -> bool:
    """Whether this rank is to print the message: one of those that have it, or one per node where none is connected."""
    if _store:
        try:
            return _store[0].add(f"said/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
        except dist.DistError:
            pass  # the process that keeps the store is gone
    return os.environ.get("LOCAL_RANK", "0") == "0"


def everyone(store: dist.Store, what: str, rank: int, world_size: int) -> None:
    """Wait until all ranks have come here; raises where the store's timeout is over."""
    store.set(f"{what}/{rank}", "")
    store.wait([f"{what}/{other}" for other in range(world_size)])


def _missing(store: dist.Store, run: RunConfig) -> str:
    """Which nodes have processes that did not join; "" where the store is gone as well."""
    per_node = run.parallel.gpus_per_node
    try:
        ranks = [rank for rank in range(run.parallel.world_size) if not store.check([f"joined/{rank}"])]
    except dist.DistError:
        return ""
    nodes = ", ".join(map(str, dict.fromkeys(rank // per_node for rank in ranks)))
    return f". {len(ranks)} are missing, of node {nodes}: see its log" if ranks else ""


def agree(run: RunConfig) -> None:
    """Raise UsageError on every rank unless all have the same run."""
    mine = (run.hash, run.launch.node_rank, socket.gethostname())
    all_of_them: list[tuple[str, int, str]] = [mine] * dist.get_world_size()
    dist.all_gather_object(all_of_them, mine)
    holders: dict[str, list[str]] = defaultdict(list)
    for rank, (digest, node, host) in enumerate(all_of_them):
        holders[digest].append(f"rank {rank} on node {node} ({host})")
    if len(holders) > 1:
        listed = "; ".join(f"{digest}: {', '.join(ranks)}" for digest, ranks in holders.items())
        raise UsageError(
            f"the processes have different runs: {listed}. "
            "Start the same command with the same variables on every node; only NODE_RANK differs"
        )


def form_groups(run: RunConfig) -> None:
    """Make megatron-core's process groups, seed the random generators and say whether kernels must be deterministic."""
    parallel = run.parallel
    mpu.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        num_distributed_optimizer_instances=parallel.hsdp_replicas if parallel.hsdp else 1,
        create_gloo_process_groups=False,
    )
    seed = run.training.seed
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.use_deterministic_algorithms(run.training.deterministic)


def leave() -> None:
    """Undo `connect` and `form_groups`, as far as they came."""
    if dist.is_initialized():
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
