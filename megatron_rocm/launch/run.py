"""A resolved run, started: folder, lock, log, torchrun, and how to go on afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from megatron_rocm.config.address import is_remote
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.launch import preflight, torchrun
from megatron_rocm.launch.command import command, config_file, log_file
from megatron_rocm.launch.dry_run import short
from megatron_rocm.launch.lock import NAME, Lock
from megatron_rocm.platform import startup
from megatron_rocm.platform.process import PARENT, make_importable
from megatron_rocm.resolve import Resolution

# What may still come out of the pipe once the agent is gone, in seconds: a stray grandchild can hold it open.
DRAIN = 5.0


def launch(resolution: Resolution) -> int:
    """Train on this node and return the training's exit status.

    Raises UsageError before any process is started.
    """
    run = resolution.config
    preflight.check(run)
    preflight.folders(run)
    locks = _locks(run)
    try:
        run.save(config_file(run))
        log = Log(log_file(run), show=run.launch.tee_output)
    except OSError as error:
        raise UsageError(
            f"LOG_DIR={run.launch.log_dir}: {error.filename2 or error.filename or 'a file there'} can't be written: "
            f"{error.strerror}; remove it, or choose another LOG_DIR or EXP_NAME"
        ) from None
    log.say(short(resolution), *(lock.note for lock in locks if lock.note))
    log.say(f"log: {log.path}", *([] if run.launch.tee_output else ["TEE_OUTPUT=0: it goes there only"]), always=True)
    started = time.time()
    status = _Agent(command(run), environment(resolution, log.path), [lock.fd for lock in locks], log).wait()
    log.say(*_ending(run, status, resolution.request.command(), started), always=True)
    log.close()
    for lock in locks:
        lock.release()
    return status


def _locks(run: RunConfig) -> list[Lock]:
    rank = run.launch.node_rank
    if rank != 0:  # SAVE_CKPT_PATH is node 0's to hold, as it is shared; so may LOG_DIR be
        return [Lock(Path(run.launch.log_dir), "LOG_DIR", f"{NAME}_node{rank}")]
    named = {Path(run.launch.log_dir).resolve(): "LOG_DIR"}
    if run.checkpoint.folder:
        variable = "LOCAL_CKPT_PATH" if is_remote(run.checkpoint.save) else "SAVE_CKPT_PATH"
        named.setdefault(Path(run.checkpoint.folder).resolve(), variable)
    return [Lock(folder, variable) for folder, variable in named.items()]


def environment(resolution: Resolution, log: Path) -> dict[str, str]:
    """The environment of the run's processes, whose output goes to `log`."""
    run = resolution.config
    values = {**os.environ, **{name: value for name, (value, _) in resolution.environment.items()}}
    for name in [name for name, (value, _) in resolution.environment.items() if not value]:
        del values[name]  # an empty setting is an unset one
    make_importable(values)
    values[PARENT] = str(os.getpid())
    values[startup.CLOCK] = f"{startup.born()} {startup.now()}"
    values[torchrun.LOG] = str(log)
    values[torchrun.GPUS] = str(run.parallel.gpus_per_node if run.hardware.vendor != "cpu" else 0)
    return values


class Log:
    """The run's log: whole lines to the file and, where wanted, to standard output."""

    def __init__(self, path: Path, show: bool) -> None:
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._show = show
        self._lock = threading.RLock()  # a signal handler may write while its own thread does

    def say(self, *texts: str, always: bool = False) -> None:
        """The launcher's own lines; `always` shows them with TEE_OUTPUT=0 too."""
        self._write("".join(f"{text}\n" for text in texts if text).encode(), self._show or always)

    def copy(self, source: BinaryIO) -> None:
        """Everything from `source`, until it ends."""
        pending = b""
        while chunk := os.read(source.fileno(), 1 << 16):
            pending += chunk
            end = pending.rfind(b"\n") + 1
            if end:
                self._write(pending[:end], self._show)
                pending = pending[end:]
        if pending:
            self._write(pending + b"\n", self._show)

    def close(self) -> None:
        self._file.close()

    def _write(self, lines: bytes, show: bool) -> None:
        with self._lock:
            with contextlib.suppress(OSError):  # a full disk: training that nobody logs beats a pipe that nobody reads
                self._file.write(lines)
            if not show:
                return
            try:
                sys.stdout.buffer.write(lines)
                sys.stdout.buffer.flush()
            except OSError:  # the reader or the terminal is gone: training goes on, and so does the file
                self._show = False
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Agent:
    """The torchrun process: started, fed signals, waited for."""

    def __init__(self, words: list[str], environment: Mapping[str, str], keep: list[int], log: Log) -> None:
        self.log = log
        self.stopped_by = 0
        # A session of its own: Ctrl-C in a terminal then arrives once, through `_handle`.
        self.process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            pass_fds=keep, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout
        self._reader = threading.Thread(target=log.copy, args=(self.process.stdout,), daemon=True)
        self._reader.start()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        signal.signal(signal.SIGUSR1, self._save)

    def _save(self, number: int, frame: FrameType | None) -> None:
        if self.process.returncode is None:
            os.kill(self.process.pid, number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.stopped_by = not self.stopped_by, self.stopped_by or number
        if self.process.returncode is None:
            os.kill(self.process.pid, signal.SIGTERM)
        if first:  # said last: a terminal that is held by Ctrl-S must not hold the signal
            name = signal.Signals(number).name
            self.log.say(f"megatron-rocm: {name}: the run finishes its step, saves and ends", always=True)

    def wait(self) -> int:
        """The agent's exit status, 128 + n where signal n ended it."""
        status = self.process.wait()
        self._reader.join(DRAIN)
        if self.stopped_by and status in (-signal.SIGTERM, 128 + signal.SIGTERM):
            return 128 + self.stopped_by
        return 128 - status if status < 0 else status


def _ending(run: RunConfig, status: int, again: str, started: float) -> list[str]:
    """The last lines: what came of it, and how to go on."""
    told: dict[str, Any] = {}
    file = Path(run.launch.log_dir) / "status.json"
    if file.is_file() and file.stat().st_mtime >= started - 1:
        told = json.loads(file.read_text())
    if status == 0 and told.get("outcome") == "finished":
        return [f"finished; everything is in {run.launch.log_dir}"]
    if status == 0:
        # The trainer has said where it stopped; what was typed is known here alone.
        return ["to go on:", f"  {again}"] if told.get("outcome") == "stopped" and told["checkpoint"] else []
    lines = [f"training ended with exit status {status}; log: {log_file(run)}"]
    if run.checkpoint.folder and (Path(run.checkpoint.folder) / "latest_checkpointed_iteration.txt").is_file():
        lines += ["to go on from the last checkpoint:", f"  {again}"]
    return lines
