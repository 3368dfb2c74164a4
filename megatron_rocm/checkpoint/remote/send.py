"""Sending checkpoints to a remote store: a process for each node, which training neither waits for nor dies of.

It is told of a save by a line on stdin, and finds by itself what an earlier run left unsent. Order of a checkpoint:

    files       each node sends its own, STREAMS at a time; after each, .sending/node-N.json in the store tells of it
    manifest    node 0, when the nodes' records together have every file of it
    tracker     node 0: latest_checkpointed_iteration.txt
    retention   node 0 removes what SAVE_KEEP_LAST and SAVE_KEEP_EVERY don't keep; every node its local copies

Memory: 250 MB, of which 90 MB are the interpreter's and libraries', and the rest about five parts (what is read,
fsspec's buffer, the request) of 8 MiB for each of STREAMS files. Files over 75 GB have larger parts: S3 allows 10,000.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rocm.checkpoint import manifest, phases
from megatron_rocm.checkpoint.folder import SENDING as SENDING_NOW
from megatron_rocm.checkpoint.folder import TRACKER, checkpoint_path, kept, named
from megatron_rocm.checkpoint.manifest import MANIFEST, File
from megatron_rocm.checkpoint.remote import retain
from megatron_rocm.checkpoint.remote.held import SENDING, content, folder_name, tracked
from megatron_rocm.checkpoint.remote.held import manifest as remote_manifest
from megatron_rocm.checkpoint.remote.store import STREAMS, Store, StoreError
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.process import die_with_parent, write_whole_lines

# Of an upload, in their order, as phases.mark is told them.
UPLOAD = ("record", "file", "part", "manifest", "tracker", "retention")
SAY_AGAIN = 60.0  # seconds between warnings of a fault that lasts
NICENESS = 10  # training comes first


@dataclass(frozen=True)
class Plan:
    """What a sender is to do. `keep_last` and `keep_every` as in the schema; waits in seconds."""

    address: str
    folder: str
    node: int = 0
    nodes: int = 1
    shared: bool = False  # whether all nodes see the same local folder
    keep_last: int = 0
    keep_every: int = 0
    first_wait: float = 1.0
    longest_wait: float = 60.0


class Damaged(Exception):
    """The local copy is not what was saved: it will not be sent."""


class Sender:
    """What of a local folder is still to be sent, and sending it."""

    def __init__(self, plan: Plan, say: Callable[[str], None] = print) -> None:
        self.plan = plan
        self.root = Path(plan.folder)
        self.say = say
        self.store = Store(plan.address)
        self.pending: dict[int, list[str] | None] = {}  # iteration → this node's files; None: what is there
        self._lock = threading.Lock()
        self._failures = 0
        self._said = 0.0
        self._wait = 0.0

    def find(self) -> None:
        """Take on what an earlier run has left, as far as retention keeps it; of a shared folder node 0 alone does.

        None that is newer than the one that the tracker names: the run goes on from that, and so leaves their course.
        """
        if self.plan.shared and self.plan.node:
            return
        here, latest = local_iterations(self.root), named(self.root / TRACKER)
        for iteration in kept(here, self.plan.keep_last, self.plan.keep_every, latest):
            if latest < 0 or iteration <= latest:
                self.pending.setdefault(iteration, None)

    def saved(self, iteration: int, names: list[str] | None) -> None:
        """A new checkpoint: its files that are this node's, None for all that are there. It is tried at once."""
        self.pending[iteration] = names
        self._said = self._wait = 0.0

    def step(self) -> float:
        """Try what is pending, the newest first; seconds until it is worth trying again."""
        for iteration in sorted(self.pending, reverse=True):
            began = time.monotonic()
            try:
                with contextlib.suppress(OSError):  # without the note retention could remove it meanwhile
                    (self.root / SENDING_NOW).write_text(str(iteration))
                size = self._advance(iteration)
            except StoreError as error:
                return self._failed(iteration, error)
            except (OSError, UsageError, Damaged) as error:
                self.pending.pop(iteration, None)
                if checkpoint_path(self.root, iteration).is_dir():  # and not removed by retention meanwhile
                    self.say(f"warning: checkpoint {iteration} is not sent to {self.plan.address}: {error}")
                continue
            if size is None:  # other nodes are still at it
                self._wait = min(max(self._wait * 2, self.plan.first_wait), 10.0, self.plan.longest_wait)
                continue
            self.pending.pop(iteration, None)
            self._sent(iteration, size, time.monotonic() - began)
        return self._wait

    def _failed(self, iteration: int, error: Exception) -> float:
        self._failures += 1
        self._wait = min(max(self._wait * 2, self.plan.first_wait), self.plan.longest_wait)
        if time.monotonic() - self._said > SAY_AGAIN or not self._said:
            self._said = time.monotonic()
            self.say(
                f"warning: checkpoint {iteration} is not sent yet: {error}. Training goes on, the checkpoint is in "
                f"{self.root}; trying again in {self._wait:.0f} s, and from then on"
            )
        return self._wait * random.uniform(0.7, 1.0)  # nodes that failed together don't come back together

    def _sent(self, iteration: int, size: int, seconds: float) -> None:
        tries = f", after {self._failures} failed tries" if self._failures else ""
        self._failures, self._said, self._wait = 0, 0.0, 0.0
        if size:
            self.say(
                f"sent checkpoint {iteration} to {self.plan.address}: {size / 1e9:.2f} GB in {seconds:.1f} s{tries}"
            )
        try:
            self._tidy(iteration)
        except (StoreError, OSError) as error:
            self.say(f"warning: old checkpoints are not removed: {error}; the next save tries again")

    def _advance(self, iteration: int) -> int | None:
        """Send what is missing of a checkpoint: the bytes sent; None where other nodes have to send theirs first."""
        folder, remote = checkpoint_path(self.root, iteration), folder_name(iteration)
        known = manifest.read(folder)
        if known is None:
            raise Damaged(f"{folder} has no {MANIFEST}")
        own = self._own(iteration, folder, known)
        there = remote_manifest(self.store, iteration)
        if there is not None:
            if there == known and content(self.store, iteration) is not None:
                self._name(iteration)
                return 0
            # Of an earlier course of the run, which these files now replace.
            self.store.remove(f"{remote}/{MANIFEST}")
        size = self._send_files(iteration, folder, own)
        if self.plan.node:
            return size
        if not self._all_there(iteration, known):
            return None
        phases.mark("manifest")
        self.store.write(f"{remote}/{MANIFEST}", (folder / MANIFEST).read_bytes())
        self._name(iteration)
        for node in self.store.children(f"{remote}/{SENDING}"):
            self.store.remove(f"{remote}/{SENDING}/{node}")
        return size

    def _own(self, iteration: int, folder: Path, known: Mapping[str, File]) -> dict[str, File]:
        """This node's files of a checkpoint, which are to be as the manifest says."""
        names = self.pending[iteration]
        if names is None:
            names = [name for name in known if (folder / name).is_file()]
        own = {name: known[name] for name in names if name in known}
        for name, file in own.items():
            if (folder / name).stat().st_size != file.size:
                raise Damaged(f"{folder / name} is damaged: it has other than the manifest's {file.size} bytes")
        return own

    def _send_files(self, iteration: int, folder: Path, own: Mapping[str, File]) -> int:
        """Send those files that this node's record in the store does not have; their bytes."""
        remote = folder_name(iteration)
        record = f"{remote}/{SENDING}/node-{self.plan.node}.json"
        done = _record(self.store.read(record))
        # What an earlier course has sent under these names is overwritten, so its record goes first.
        done = {name: file for name, file in done.items() if own.get(name) == file}
        phases.mark("record")
        self.store.write(record, _written(done))

        def one(name: str) -> None:
            phases.mark("file")
            file = self.store.send(folder / name, f"{remote}/{name}", lambda: phases.mark("part"))
            if file != own[name]:
                raise Damaged(f"{folder / name} is damaged: its bytes are not those of the manifest")
            with self._lock:
                done[name] = file
                self.store.write(record, _written(done))

        missing = [name for name in own if name not in done]
        with ThreadPoolExecutor(STREAMS) as pool:
            list(pool.map(one, missing))
        return sum(own[name].size for name in missing)

    def _all_there(self, iteration: int, known: Mapping[str, File]) -> bool:
        """Whether the nodes' records together have every file of the manifest, and the store has each with its size.

        Raises StoreError where it has not: the files are then sent again.
        """
        remote, done = folder_name(iteration), dict[str, File]()
        for name in self.store.children(f"{remote}/{SENDING}"):
            for path, file in _record(self.store.read(f"{remote}/{SENDING}/{name}")).items():
                if known.get(path) == file:
                    done[path] = file
        if len(done) < len(known):
            return False
        sizes = self.store.sizes(remote)
        wrong = [name for name, file in known.items() if sizes.get(name) != file.size]
        if wrong:
            for name in self.store.children(f"{remote}/{SENDING}"):
                self.store.remove(f"{remote}/{SENDING}/{name}")
            raise StoreError(f"{self.plan.address}/{remote}: the store has lost {', '.join(wrong[:3])}")
        return True

    def _name(self, iteration: int) -> None:
        """Have the tracker name it, unless a newer one is named that is no older course's."""
        if self.plan.node:
            return
        there = tracked(self.store)
        if there == iteration:
            return
        if there is None or there < iteration or named(self.root / TRACKER) == iteration:
            phases.mark("tracker")
            self.store.write(TRACKER, str(iteration).encode())

    def _tidy(self, iteration: int) -> None:
        """Retention, in the store and here."""
        plan = self.plan
        phases.mark("retention")
        if not plan.node:
            retain.retain(self.store, plan.keep_last, plan.keep_every, self.pending)
        if plan.shared and plan.node:
            return
        is_sent = lambda one: one not in self.pending and content(self.store, one) is not None  # noqa: E731
        sent, given_up = retain.prune(self.root, local_iterations(self.root), is_sent, plan.keep_last, plan.keep_every)
        for one in (*sent, *given_up):
            self.pending.pop(one, None)
        if given_up:
            self.say(f"warning: {self.root} is nearly full: removed {given_up}, which could not be sent")


def local_iterations(root: Path) -> list[int]:
    """Of the checkpoints in a local folder that have their final name and a manifest, ascending."""
    found = (path.parent.name.removeprefix("iter_") for path in root.glob(f"iter_*/{MANIFEST}"))
    return sorted(int(number) for number in found if number.isascii() and number.isdigit())


def _record(text: bytes | None) -> dict[str, File]:
    """Files of a node's record; none where it is damaged: they are then sent again."""
    try:
        return {name: File(**of) for name, of in json.loads(text or b"{}").items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _written(done: Mapping[str, File]) -> bytes:
    return json.dumps({name: asdict(file) for name, file in done.items()}).encode()


def serve(sender: Sender, lines: Iterable[str]) -> None:
    """Send until told to end and all is sent.

    Lines are JSON: {"saved": iteration, "names": …} or {"end": seconds that sending may still take}, after which the
    process ends with status 1, as it does where the lines end without a word.
    """
    orders: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        told_to_end = False
        for line in lines:
            order = json.loads(line)
            orders.put(order)
            if "end" in order:
                told_to_end = True
                _end_after(order["end"], sender)
        if not told_to_end:
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    sender.find()
    wait, ending = 0.0, False
    while True:
        busy = bool(sender.pending)
        with contextlib.suppress(queue.Empty):
            order = orders.get(timeout=wait) if busy or ending else orders.get()
            wait = 0.0
            if "saved" in order:
                sender.saved(order["saved"], order["names"])
            else:
                ending = True
            continue  # there may be more
        if not sender.pending:
            return
        wait = sender.step()
        phases.mark("")


def _end_after(seconds: float, sender: Sender) -> None:
    """End this process when the time is over, saying what is not sent."""

    def end() -> None:
        left = sorted(sender.pending)
        if left:
            sender.say(
                f"warning: not sent to {sender.plan.address} within {seconds:g} seconds (UPLOAD_TIMEOUT): checkpoint "
                f"{', '.join(map(str, left))}. It is in {sender.root}; the same command started here again sends it"
            )
        os._exit(1 if left else 0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def main() -> int:
    """`python -m megatron_rocm.checkpoint.remote.send PLAN.json`, with orders as lines of JSON on stdin."""
    die_with_parent()
    write_whole_lines()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # the run's, which tells us its end
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    try:
        serve(Sender(Plan(**json.loads(sys.argv[1])), lambda text: print(text, flush=True)), sys.stdin)
    except UsageError as error:
        print(f"warning: checkpoints are not sent: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
