"""Which samples a rank gets: global batch s of a run is samples [s·BS, (s+1)·BS), in every layout."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from torch.utils.data import DataLoader, Dataset

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.model.llama import core

Batch = dict[str, torch.Tensor]


class Indices:
    """Endless micro batches of sample indices for one data parallel rank, from sample `start` of the data on.

    Each micro batch of the step takes MBS·DP consecutive samples, MBS of them for each rank.
    """

    def __init__(self, start: int, micro_batch_size: int, rank: int, ranks: int) -> None:
        self.first = start + rank * micro_batch_size
        self.size = micro_batch_size
        self.stride = micro_batch_size * ranks

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first
        while True:
            yield list(range(first, first + self.size))
            first += self.stride


class Recorded:
    """An iterator of micro batches that keeps what it has handed out, so that a step can be computed again."""

    def __init__(self, source: Iterator[Batch]) -> None:
        self.source = source
        self.seen: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.seen.append(next(self.source))
        return self.seen[-1]


def loaders(run: RunConfig) -> int:
    """Processes that read ahead for this one. None on a CPU, whose cores they would share with it."""
    return 0 if run.hardware.vendor == "cpu" else 2


def _heed_parent_alone(loader: int) -> None:
    """Have this process end by a signal from its parent alone.

    Whoever stops a run may signal all of its processes, and the training process still needs its samples to finish the
    step. Just ignored, signals would leave it waiting for this process at its own end.
    """
    numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # for all threads that are still to come too

    def wait() -> None:
        while signal.sigwaitinfo(numbers).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def micro_batches(run: RunConfig, dataset: Dataset[Any], start: int, chunk: torch.nn.Module) -> Iterator[Batch] | None:
    """This rank's micro batches for one model chunk; None where nothing in it looks at tokens.

    Tokens are embedded, needed for the loss, or tell attention where documents end.

    A batch has tokens, labels, loss_mask and position_ids of shape [MBS, sequence].
    """
    stage = core(chunk)
    if not (stage.pre_process or stage.post_process or run.data.reset_attention_mask):
        return None
    indices = Indices(
        start, run.training.micro_batch_size, mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    )
    gpu = run.hardware.vendor != "cpu"
    workers = loaders(run)
    loader = DataLoader(
        dataset,
        batch_sampler=indices,  # type: ignore[arg-type]  # any iterable of lists does
        num_workers=workers,
        pin_memory=gpu,
        persistent_workers=workers > 0,
        worker_init_fn=_heed_parent_alone,
        generator=torch.Generator(),  # not the global one: a resumed run draws from that where the first left off
    )
    return iter(loader)
