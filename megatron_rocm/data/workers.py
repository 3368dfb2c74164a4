"""Where chunks are parsed and encoded: threads of this process, or processes."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_rocm.data import documents, encode
from megatron_rocm.data.documents import Fault
from megatron_rocm.data.indexed import token_dtype
from megatron_rocm.data.tokenizer import Encoder

# What holds Python's lock (parsing, strings) is a fifth of the work: with more threads than this they wait for it.
MOST_THREADS = 4
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Task:
    """What to do with a chunk; `eod` None: nothing ends a document."""

    key: str
    eod: int | None
    skip_empty: bool
    vocab_size: int


class Result(NamedTuple):
    """A worker's answer: ids in the type of the file, and of each document its ids and bytes of text."""

    ids: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    faults: list[Fault]


def work(payload: bytes | list[Any], task: Task, encoder: Encoder) -> Result:
    """Parse and encode a chunk."""
    texts, faults = documents.texts(payload, task.key)
    if task.skip_empty:
        texts = [text for text in texts if text]
    sizes = documents.utf8_sizes(texts)
    ids, lengths = encoder.encode_batch(texts, task.eod)
    dtype = token_dtype(task.vocab_size)
    return Result(
        ids.view(dtype) if dtype.itemsize == ids.itemsize else ids.astype(dtype),
        lengths.astype(np.int32),
        np.array(sizes, np.int64),
        faults,
    )


Submit = Callable[[Any], "Future[Result]"]


def pool(workers: int, task: Task, choice: encode.Choice, encoder: Encoder) -> tuple[Executor, Submit]:
    """Threads while Python's lock lets them run side by side, else processes; and how to give them a payload."""
    if workers <= MOST_THREADS:
        threads = ThreadPoolExecutor(workers)
        return threads, lambda payload: threads.submit(work, payload, task, encoder)
    context = multiprocessing.get_context("spawn")
    processes = ProcessPoolExecutor(workers, context, _start_process, (task, choice, os.getpid()))

    def submit(payload: Any) -> Future[Result]:
        with unheard_interrupts():
            return processes.submit(_work_in_process, payload)

    return processes, submit


@contextmanager
def unheard_interrupts() -> Iterator[None]:
    """Processes started here never hear Ctrl-C: it is for the one that starts them, and they are told by it."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # while it starts, it would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(parent: int) -> None:
    """End this process when the process `parent`, which started it, ends, however that comes."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


_in_process: tuple[Task, Encoder]


def _start_process(task: Task, choice: encode.Choice, parent: int) -> None:
    global _in_process
    end_with(parent)  # left alone, it would wait for work for ever
    encode.set_up_process()
    _in_process = task, encode.open_encoder(choice)


def _work_in_process(payload: bytes | list[Any]) -> Result:
    return work(payload, *_in_process)
