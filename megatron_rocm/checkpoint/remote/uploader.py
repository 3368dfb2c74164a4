"""A run's side of sending: starts the process that does it (send.py), tells it of saves, waits for it at the end.

Nothing here waits for the store or raises: a run never waits for its uploads before its end, and never dies of them.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rocm.checkpoint.remote.send import Plan

MORE = 15.0  # seconds beyond the limit until a sender that says nothing is killed


class Uploader:
    """The sender of this node. One rank of each node has one."""

    def __init__(self, plan: Plan, limit: float, say: Callable[[str], None] = print) -> None:
        """Starts sending what an earlier run has left. `limit`: seconds that sending may take after the run's end."""
        self._plan, self._limit, self._say = plan, limit, say
        self._orders: queue.Queue[dict[str, Any]] = queue.Queue()
        # The sender dies with the thread that starts it (process.die_with_parent), which is therefore none of a save's.
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def saved(self, folder: Path, names: Sequence[str] | None = None) -> None:
        """A checkpoint has its final name; `names` are this node's files in it, None for all that are there."""
        iteration = int(folder.name.removeprefix("iter_"))
        self._orders.put({"saved": iteration, "names": None if names is None else list(names)})

    def close(self) -> None:
        """Wait until all is sent, for at most the limit; what is not sent then is said."""
        self._orders.put({"end": self._limit})
        self._thread.join()

    def _serve(self) -> None:
        sender = self._start()
        while "end" not in (order := self._orders.get()):
            if not _told(sender, order):
                sender = self._again()
                _told(sender, order)
        if not self._ended(sender, order) and not self._ended(self._again(), order):
            self._say(f"warning: not all in {self._plan.folder} is sent to {self._plan.address}; the next run sends it")

    def _ended(self, sender: subprocess.Popen[bytes] | None, order: dict[str, Any]) -> bool:
        """Tell it to end and wait for that; False where it dies instead. It has said what it could not send."""
        if sender is None or not _told(sender, order):
            return False
        try:
            return sender.wait(self._limit + MORE) in (0, 1)
        except subprocess.TimeoutExpired:
            sender.kill()
            sender.wait()
            return False

    def _again(self) -> subprocess.Popen[bytes] | None:
        """Another sender, which finds by itself what is to be sent."""
        self._say("warning: the process that sends checkpoints has ended; it is started again")
        return self._start()

    def _start(self) -> subprocess.Popen[bytes] | None:
        words = [sys.executable, "-m", "megatron_rocm.checkpoint.remote.send", json.dumps(asdict(self._plan))]
        try:
            return subprocess.Popen(words, stdin=subprocess.PIPE)
        except OSError as error:
            self._say(f"warning: no process to send checkpoints could be started: {error.strerror}")
            return None


def _told(sender: subprocess.Popen[bytes] | None, order: dict[str, Any]) -> bool:
    """Whether the sender lives and was told."""
    if sender is None or sender.poll() is not None:
        return False
    assert sender.stdin
    with contextlib.suppress(BrokenPipeError):
        sender.stdin.write(json.dumps(order).encode() + b"\n")
        sender.stdin.flush()
        return True
    return False
