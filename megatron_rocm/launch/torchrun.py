"""torchrun, with signals handed on to the workers and failures told in one line.

    python -m megatron_rocm.launch.torchrun <torchrun's own arguments>

torchrun's own answer to SIGTERM is a traceback, status 1 and the workers' death after 30 s, whatever they are saving.
Here SIGTERM, SIGINT and SIGHUP reach the workers once, and the agent waits for them however long they take; SIGUSR1,
which asks for a save, is handed on as well.
The agent runs in a thread of its own: there torch installs no handlers of its own, in any of its versions, and a
signal is answered even while the agent waits for other nodes inside C++.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from megatron_rocm.platform import route
from megatron_rocm.platform.process import PARENT, die_with_parent, write_whole_lines

# A signal to a process group, or from Slurm to every process, arrives twice: directly and from the launcher.
SAME_SIGNAL = 1.0
# torch's agent waits 30 s before it kills; a crash that is one failure's cause comes at the same time.
AGENTS_GRACE = 10.0
# From the launcher: GPUs that torch has to see, and the file it tees the output to.
GPUS = "MEGATRON_ROCM_GPUS"
LOG = "MEGATRON_ROCM_LOG"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun. Returns the first failed worker's exit status (128 + n for signal n), 2 for a failed rendezvous."""
    die_with_parent()
    write_whole_lines()
    os.environ[PARENT] = str(os.getpid())
    stop = Stop()
    stop.install()
    return Agent(list(sys.argv[1:] if arguments is None else arguments), stop).run()


class Stop:
    """Signals to the agent: the first goes to the workers, the second waits on, the third kills them."""

    def __init__(self) -> None:
        self.signal = 0
        self.count = 0
        self._last = -SAME_SIGNAL

    def install(self) -> None:
        """Handle SIGUSR1, SIGTERM and SIGINT; SIGHUP too unless it is ignored, as under nohup."""
        signal.signal(signal.SIGUSR1, self._save)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _save(self, number: int, frame: FrameType | None) -> None:
        self._send([pid for pid in children() if _catches(pid, number)], number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last < SAME_SIGNAL:
            return
        self._last = now
        self.count += 1
        self.signal = self.signal or number
        workers = children()
        if self.count == 1:
            self._send(workers, signal.SIGTERM)
            if not workers:
                self._leave("stopped before any worker was started")
        elif self.count == 2:
            _say(f"still waiting for {len(workers)} workers to save and end; one more signal kills them")
        else:
            self._send(workers, signal.SIGKILL)
            self._leave(f"killed {len(workers)} workers")

    def _send(self, workers: list[int], number: int) -> None:
        for pid in workers:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def _leave(self, text: str) -> None:
        _say(text)
        os._exit(128 + self.signal)


class Agent:
    """One call of torch.distributed.run in a thread, and what came of it."""

    def __init__(self, arguments: list[str], stop: Stop) -> None:
        self.arguments = arguments
        self.stop = stop
        self.status = 1

    def run(self) -> int:
        thread = threading.Thread(target=self._guarded, name="agent", daemon=True)
        thread.start()
        while thread.is_alive():  # a join without a timeout would not let signals in on every platform
            thread.join(1.0)
        return self.status

    def _guarded(self) -> None:
        with _quiet():
            from torch.distributed import run
            from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        try:
            options = run.parse_args(self.arguments)
            if complaint := _missing_gpus():
                _say(complaint)
                self.status = 2
                return
            # `run.main` is this within torch's `record`, which only writes error files for an outer scheduler.
            run.run(options)
            self.status = 0
        except ChildFailedError as error:
            self.status = self._failed(error.failures)
        except SystemExit as error:  # --help, a wrong option
            self.status = error.code if isinstance(error.code, int) else 0
        except (RuntimeError, OSError) as error:  # torch's DistError, a TimeoutError; others are faults of ours
            self.status = 2
            _say(_rendezvous_failed(options, error))

    def _failed(self, failures: Mapping[int, Any]) -> int:
        """Say which worker failed first and return the status to exit with."""
        earliest = min(failure.timestamp for failure in failures.values())
        rank, first = min(
            failures.items(),
            key=lambda item: (_order(item[1].exitcode, item[1].timestamp - earliest), item[1].timestamp, item[0]),
        )
        if self.stop.count and -first.exitcode in (signal.SIGTERM, signal.SIGINT):
            _say("stopped before training began")
            return 128 + self.stop.signal
        how = (
            f"was killed by {signal.Signals(-first.exitcode).name}"
            if first.exitcode < 0
            else f"ended with exit status {first.exitcode}"
        )
        hint = " (out of host memory? see `dmesg`)" if first.exitcode == -signal.SIGKILL else ""
        log = f"; its output is in {os.environ[LOG]}" if LOG in os.environ else ""
        _say(f"rank {rank} (process {first.pid}) {how}{hint}{log}")
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


def _order(exitcode: int, after: float) -> int:
    """Causes before consequences: a usage error, a crash, an error that a lost peer may have caused, our own signals.

    `after` is how many seconds after the first failure this one came. Once a worker has failed, the agent sends the
    others SIGTERM and, to those that don't end within its grace, SIGKILL.
    """
    if exitcode == 2:
        return 0
    if exitcode < 0:
        ours = exitcode == -signal.SIGTERM or (exitcode == -signal.SIGKILL and after > AGENTS_GRACE)
        return 3 if ours else 1
    return 2


def children() -> list[int]:
    """Process ids of this process's own children, over all of its threads (proc(5), /proc/pid/task/tid/children)."""
    found = []
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children") as file:
                found += [int(pid) for pid in file.read().split()]
        except FileNotFoundError:
            continue
    return found


def _catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal (proc(5), SigCgt): one that has just begun would die of it."""
    try:
        with open(f"/proc/{pid}/status") as file:
            mask = next(int(line.split()[1], 16) for line in file if line.startswith("SigCgt:"))
    except (FileNotFoundError, StopIteration):
        return False
    return bool(mask >> (number - 1) & 1)


class _quiet:
    """Load torch without the reports that a line of ours replaces; LOGLEVEL and TORCH_CPP_LOG_LEVEL bring them back."""

    def __enter__(self) -> None:
        self._added = [name for name in ("TORCH_CPP_LOG_LEVEL",) if name not in os.environ]
        for name in self._added:
            os.environ[name] = "FATAL"

    def __exit__(self, *error: object) -> None:
        for name in self._added:  # read by C++ when torch is loaded; the workers' own level stays as it was
            del os.environ[name]
        if "LOGLEVEL" not in os.environ:
            logging.disable(logging.ERROR)


def _missing_gpus() -> str:
    """A complaint where torch sees fewer GPUs than processes are to start; "" where it sees enough."""
    wanted = int(os.environ.get(GPUS, "0"))
    if not wanted:
        return ""
    import torch

    seen = torch.cuda.device_count()
    if seen >= wanted:
        return ""
    build = torch.version.hip or torch.version.cuda
    built = f"built for {'ROCm' if torch.version.hip else 'CUDA'} {build}" if build else "built for the CPU"
    return (
        f"GPUS_PER_NODE={wanted}, but torch {torch.__version__} ({built}) sees {seen}: "
        "install the torch of this machine's GPUs, or set GPUS_PER_NODE or *_VISIBLE_DEVICES"
    )


def _rendezvous_failed(options: Any, error: Exception) -> str:
    """What went wrong where, and what this node's network says of it."""
    rank, master, port = options.node_rank, options.master_addr, int(options.master_port)
    where = f"MASTER_ADDR={master} MASTER_PORT={port}"
    reason = " ".join(str(error).split("\nException raised")[0].split())
    if rank == 0 and ("EADDRINUSE" in reason or "already in use" in reason):
        return f"{where}: the port is in use on this machine; choose another MASTER_PORT"
    tried = route.tried(master, port, is_master=rank == 0)
    if rank != 0:
        what = f"node rank {rank} can't reach node 0 there within RDZV_TIMEOUT seconds"
        ask = "Is node 0 started, is the name right on this machine, does a firewall close the port?"
    elif "clients joined" in reason:
        last = int(options.nnodes) - 1 if options.nnodes.isdigit() else "N-1"
        what = f"not all of NNODES={options.nnodes} nodes arrived within RDZV_TIMEOUT seconds"
        ask = f"Is one launch per node started, NODE_RANK=0 to {last}? Does a firewall here close the port?"
    else:
        what = "node 0 can't reach itself there"
        ask = "MASTER_ADDR must be a name or address of node 0"
    return f"{where}: {what}; {tried}. {ask} ({reason})"


def _say(text: str) -> None:
    os.write(2, f"megatron-rocm: {text}\n".encode())  # one write: also called from a signal handler


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # at once: the agent's thread and torch's store may hang on in C++
