"""Kill training with kill -9 again and again while it saves at every second step; see what is left each time.

    python tests/checkpoint/killer.py FOLDER --kills 200 [--seed N] [--bare SHARE] [--set FIELD=JSON] [--upload PHASE]

Two processes train. A kill waits for one of the save's phases, in which the process is then held, or falls at a random
moment. After each the tracker must name a whole checkpoint, every byte of it, and the next start must go on from there;
at the end the losses must be those of an undisturbed run. Each kill is told with the phases it fell in, and at the end
how many fell in each; one that none fell in is a failure. --set changes the run. With a remote store (`save`, `local`,
which is FOLDER/checkpoints if not set) --upload names the phases of the sending process to be hit as well; it is not
held in them. --bare is the share of kills after which the next start finds no local copies.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads must not be forked
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nursery  # noqa: E402
from support import environment, free_port, losses, metrics, tiny_run  # noqa: E402

from megatron_rocm.checkpoint import manifest, phases, remote  # noqa: E402
from megatron_rocm.checkpoint.folder import TRACKER, checkpoint_path  # noqa: E402
from megatron_rocm.checkpoint.remote.held import newest  # noqa: E402
from megatron_rocm.checkpoint.remote.store import Store  # noqa: E402
from megatron_rocm.config.address import is_remote  # noqa: E402
from megatron_rocm.config.schema import RunConfig  # noqa: E402

RANKS = 2
FIELDS: dict[str, Any] = {
    "dp": RANKS, "distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
    "dtype": "bf16", "save_interval": 2, "keep_last": 3,
}  # fmt: skip
ENDLESS = 10**6  # steps
HELD = 60.0  # seconds: longer than the killer needs
PATIENCE = 120.0  # seconds for a phase to be reached
FIRST_RANKS = {"manifest", "rename", "name", "prune"}  # phases of rank 0 alone


def hold(show: Callable[[str], None], wanted: str, chance: random.Random) -> Callable[[str], None]:
    """A listener that stops the process for good in the phase `wanted`, of the first or second save; in `write` after
    some of the file is written."""
    left = chance.choice((0, 1))
    until_held = chance.randrange(1, 40) if wanted == "write" else 0
    write = manifest.HashingFile.write

    def held_within(file: manifest.HashingFile, data: Any) -> int:
        nonlocal until_held
        written = write(file, data)
        until_held -= 1
        if until_held == 0:
            show(wanted)
            time.sleep(HELD)
        return written

    def listen(phase: str) -> None:
        nonlocal left
        if not wanted or phase != wanted:  # the end of a phase is told as ""
            show(phase or "training")
        elif left:
            left -= 1
        elif until_held:
            manifest.HashingFile.write = held_within  # type: ignore[method-assign]
        else:
            show(phase)
            time.sleep(HELD)

    return listen


class Killer:
    """Starts the run's processes, by forks of this one, and ends them."""

    def __init__(self, folder: Path, chance: random.Random, fields: dict[str, Any]) -> None:
        self.folder, self.chance = folder, chance
        self.fields = {**FIELDS, **fields}
        self.saved = Path(fields.get("local", folder / "checkpoints"))
        if is_remote(fields.get("save", "")):
            self.fields["local"] = str(self.saved)
        self.phases = folder / "phases"
        self.phases.mkdir(exist_ok=True)

    def run(self, name: str, steps: int, *, save: bool) -> RunConfig:
        fields = {"save": str(self.saved), **self.fields}
        if not save:
            fields = {name: value for name, value in fields.items() if name not in ("save", "local")}
        return tiny_run(self.folder / name, train_iters=steps, **fields)

    def start(self, run: RunConfig, said: Path, held: tuple[int, str] | None = None) -> list[int]:
        """Process ids by rank; the phase of rank `held[0]` is held in `held[1]`."""
        folder = Path(run.launch.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        run.save(folder / "run.json")
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS)}
        order = {
            "program": ["-m", "megatron_rocm.train", "--config", str(folder / "run.json")],
            "env": environment(**where, **{phases.FOLDER: str(self.phases)}), "cwd": str(folder), "said": str(said),
        }  # fmt: skip
        children = []
        seed = self.chance.random()
        for rank in range(RANKS):
            child = os.fork()
            if not child:
                os.setsid()
                nursery.die_with_parent()
                show = phases.shown_in(self.phases)
                show("start")
                wanted = held[1] if held and held[0] == rank else ""
                phases.listener = hold(show, wanted, random.Random(f"{seed} {rank}"))
                nursery.become(order, rank)
                os._exit(0)
            children.append(child)
        return children

    def phase(self, child: int) -> str:
        try:
            return (self.phases / str(child)).read_text().strip()
        except FileNotFoundError:
            return ""

    def uploads(self, children: list[int]) -> set[str]:
        """Phases that processes which the children have started are in."""
        others = {int(path.name) for path in self.phases.iterdir()} - set(children)
        return {f"upload {phase}" for phase in map(self.phase, others) if phase}

    def kill(self, children: list[int], held: tuple[int, str] | None, longest: float) -> list[str]:
        """kill -9, in the phase held or awaited or within `longest` seconds; the phases of the processes then."""
        if held:
            end = time.monotonic() + PATIENCE
            uploads = held[1].startswith("upload")
            while held[1] not in (self.uploads(children) if uploads else [self.phase(children[held[0]])]):
                assert time.monotonic() < end, f"{held[1]} was not reached within {PATIENCE:g} seconds"
                assert not os.waitpid(children[held[0]], os.WNOHANG)[0], "training has ended by itself"
                time.sleep(0.001)
            time.sleep(0 if uploads else self.chance.uniform(0, 0.02))
        else:
            time.sleep(self.chance.uniform(0, longest))
        found = []
        for child in self.chance.sample(children, RANKS):  # not always the same first
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):  # before its setsid it has no group
                os.kill(child, signal.SIGKILL)
            time.sleep(self.chance.choice((0, 0, 0.05)))
        for child in children:
            status = os.waitpid(child, 0)[1]
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"training has ended by itself: {status}"
            found.append(self.phase(child))
        found += self.uploads(children)
        for path in self.phases.iterdir():
            path.unlink()
        return found

    def finish(self, run: RunConfig, said: Path) -> None:
        for child in self.start(run, said):
            assert os.waitpid(child, 0)[1] == 0, said.read_text()

    def whole(self) -> int:
        """The iteration that the next start goes on from, all of whose checkpoint is there; 0 where there is none."""
        return max(self.here(), self.sent())

    def sent(self) -> int:
        """The iteration of the remote store's newest checkpoint; 0 where there is none, or no store."""
        if not is_remote(address := self.fields.get("save", "")):
            return 0
        answer, tell = os.pipe()
        child = os.fork()
        if not child:  # asking a store starts threads
            found = newest(Store(address))
            wrong = remote.faults(address, found[0], full=True) if found else []
            os.write(tell, (wrong[0] if wrong else str(found[0] if found else 0)).encode())
            os._exit(0)
        os.close(tell)
        os.waitpid(child, 0)
        with os.fdopen(answer) as told:
            text = told.read()
        assert text.isdigit(), f"{address}: {text}"
        return int(text)

    def lose_disk(self) -> int:
        """Have the next start be one on a bare machine; what it goes on from."""
        shutil.rmtree(self.saved, ignore_errors=True)
        return self.sent()

    def here(self) -> int:
        """The iteration that the local tracker names; 0 where it names none yet."""
        tracker = self.saved / TRACKER
        if not tracker.exists():
            return 0
        iteration = int(tracker.read_text())
        path = checkpoint_path(self.saved, iteration)
        assert manifest.read(path), f"{path} has no manifest"
        wrong = manifest.faults(path, full=True)
        assert not wrong, f"{path}: {wrong}"
        return iteration


def went_on(said: Path) -> int | None:
    """After which iteration the run that has said this went on; 0 for a new one, None where it had not come so far."""
    text = said.read_text() if said.exists() else ""
    if found := re.search(r"going on after iteration (\d+) from", text):
        return int(found[1])
    return 0 if "starting from initial weights" in text else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--upload", nargs="*", default=[])
    parser.add_argument("--bare", type=float, default=0.0)
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    nursery.imports()
    fields = {name: json.loads(value) for name, value in (word.split("=", 1) for word in options.set)}
    chance = random.Random(options.seed)
    killer = Killer(options.folder, chance, fields)
    every = [*phases.SAVE, *(f"upload {phase}" for phase in options.upload)]
    wanted = chance.sample(every, len(every))
    hits: collections.Counter[str] = collections.Counter()
    longest, resumed_from = 10.0, 0
    print(f"seed {options.seed}", flush=True)
    for number in range(1, options.kills + 1):
        phase = wanted.pop() if wanted else chance.choice([*every, *[None] * len(every)])
        held = (0 if phase in FIRST_RANKS else chance.randrange(RANKS), phase) if phase else None
        said = options.folder / f"said{number}.txt"
        began = time.monotonic()
        found = killer.kill(killer.start(killer.run("run", ENDLESS, save=True), said, held), held, longest)
        longest = 1.5 * (time.monotonic() - began) if held else longest
        start = went_on(said)
        assert start in (None, resumed_from), f"went on after {start}, the tracker named {resumed_from}"
        whole = killer.whole()
        assert whole >= resumed_from, f"the tracker named {resumed_from} before and {whole} now"
        hits.update(found)
        if phase and phase not in found:  # a sender had gone on
            wanted.append(phase)
        print(f"kill {number}: {' and '.join(found)}; went on after {start}; whole: iteration {whole}", flush=True)
        lost = chance.random() < options.bare
        resumed_from = killer.lose_disk() if lost else whole
        if lost:
            print(f"the local disk is lost; in the store: iteration {resumed_from}", flush=True)
    steps = resumed_from + 5
    last = options.folder / "said.txt"
    run, undisturbed = killer.run("run", steps, save=True), killer.run("undisturbed", steps, save=False)
    killer.finish(run, last)
    assert went_on(last) == resumed_from
    killer.finish(undisturbed, options.folder / "undisturbed.txt")
    assert losses(run) == losses(undisturbed), "the losses are not those of an undisturbed run"
    assert [row["iteration"] for row in metrics(run)] == list(range(1, steps + 1))
    print(f"{options.kills} kills, {steps} steps, losses as undisturbed; processes killed in each phase:")
    for name, count in sorted(hits.items()):
        print(f"  {name:10} {count}")
    missing = set(every) - hits.keys() if options.kills >= len(every) else set()
    assert not missing, f"no kill fell in {missing}"


if __name__ == "__main__":
    main()
