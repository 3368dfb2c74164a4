"""`megatron-rocm checkpoint …`: what checkpoint folders hold, whether it is as it was written, and what may go."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_rocm.checkpoint import choose, manifest
from megatron_rocm.checkpoint.folder import (
    PARTIAL,
    TRACKER,
    checkpoint_path,
    checkpoints,
    iteration_of,
    remove,
    surplus,
)
from megatron_rocm.config.address import checked, is_remote, shown
from megatron_rocm.errors import UsageError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.removeprefix('megatron-rocm ')}: {message}; `{self.prog} --help` shows the usage")


@dataclass(frozen=True)
class Entry:
    """A checkpoint folder, as far as names and sizes tell."""

    path: str
    iteration: int | None
    saved: str | None  # time of its last file, ISO 8601; this and the count of files are not asked of a store
    bytes: int
    files: int | None
    latest: bool  # the tracker names it
    whole: bool
    faults: list[str]


def main(arguments: Sequence[str]) -> int:
    """Run a sub-command. Returns its exit status: of `verify` 1 where something is damaged, of `diff` 1 where the two
    differ. Raises UsageError."""
    parser = _Parser(prog="megatron-rocm checkpoint", description="Look at checkpoints, check them, remove old ones.")
    commands = parser.add_subparsers(metavar="ls|show|verify|diff|prune", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str, what: str = "DIR") -> _Parser:
        command: Any = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        command.set_defaults(run=run)
        command.add_argument("folder", metavar=what, help="SAVE_CKPT_PATH of a run, or an iter_… folder in it")
        command.add_argument("--json", action="store_true", help="print JSON")
        return command

    newest = "which one (default: the newest whole one)"
    add("ls", _ls, "list checkpoints: iteration, time, size, and whether names and sizes are right")
    show = add("show", _show, "show what a checkpoint holds: position, layout, settings")
    show.add_argument("--iteration", type=int, metavar="N", help=newest)
    show.add_argument("--tensors", action="store_true", help="list every tensor")
    verify = add("verify", _verify, "read checkpoints again and compare every byte with its checksum")
    verify.add_argument("--iteration", type=int, metavar="N", help="which one (default: all)")
    diff = add("diff", _diff, "show in what two checkpoints differ: settings, position, tensors", "A")
    diff.add_argument("other", metavar="B", nargs="?", help="the other one (default: A's newest two are compared)")
    diff.add_argument("--values", action="store_true", help="read the tensors and compare their values")
    prune = add("prune", _prune, "remove old checkpoints, never the newest whole one nor a damaged one")
    prune.add_argument("--keep-last", type=int, metavar="K", default=1, help="keep the newest K (default: 1)")
    prune.add_argument("--keep-every", type=int, metavar="N", default=0, help="keep those of every Nth iteration too")
    prune.add_argument("--dry-run", action="store_true", help="say what would go")
    args = parser.parse_args(arguments)
    for said in (args.folder, getattr(args, "other", None) or ""):
        if said and is_remote(said):
            checked("checkpoint", said)
            if args.run not in (_ls, _show, _verify):
                raise UsageError(
                    f"checkpoint: {said} is an address, of which `ls`, `show` and `verify` tell; name a folder, such "
                    "as the LOCAL_CKPT_PATH of its run"
                )
    return int(args.run(args))


def _folders(root: Path) -> list[Path]:
    """The checkpoints in `root`, whole or not, oldest first; `root` itself where it is one. Raises UsageError."""
    if choose.is_one(root):
        return [root]
    if not root.is_dir():
        raise UsageError(f"{root}: there is no such folder")
    found = sorted((path for path in root.glob("iter_*") if iteration_of(path) >= 0), key=iteration_of)
    found += [path for path in (root / choose.RELEASE,) if path.is_dir()]
    if not found:
        raise UsageError(f"{root}: no checkpoint here; name the SAVE_CKPT_PATH of a run, which holds iter_… folders")
    return found


def _one(root: Path, iteration: int | None) -> Path:
    """The checkpoint of an iteration, or the newest whole one. Raises UsageError."""
    folders = _folders(root)
    if iteration is not None:
        path = root if iteration_of(root) == iteration else checkpoint_path(root, iteration)
        if path not in folders:
            there = ", ".join(str(number) if (number := iteration_of(of)) >= 0 else of.name for of in folders)
            raise UsageError(f"{root}: no checkpoint of iteration {iteration}; there is {there}")
        return path
    for path in (*(path for path in choose.newest_first(root).paths if path in folders), *reversed(folders)):
        if not choose.flaws(path):
            return path
    raise UsageError(f"{root}: no whole checkpoint here; `megatron-rocm checkpoint ls` tells what is wrong")


def _entry(path: Path) -> Entry:
    files, saved = [], None
    for file in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):  # a link to nowhere; or a run is removing it just now
            found = file.stat()
            saved = max(saved or 0, found.st_mtime)
            files += [found.st_size] if stat.S_ISREG(found.st_mode) else []
    number = iteration_of(path)
    try:
        named = (path.parent / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        named = ""
    faults = choose.flaws(path)
    time = datetime.datetime.fromtimestamp(saved).isoformat(" ", "seconds") if saved else None
    latest = bool(named) and named in (str(number), path.name)
    return Entry(
        str(path), number if number >= 0 else None, time, sum(files), len(files), latest, not faults, faults
    )  # fmt: skip


def _remote(address: str) -> list[Entry]:
    """The checkpoints of a remote store. Raises UsageError where it has none or does not answer."""
    from megatron_rocm.checkpoint.remote.held import folder_name, listing

    root = shown(address).rstrip("/")
    entries = [
        Entry(
            f"{root}/{folder_name(one.iteration)}", one.iteration, None, one.size, None, one.latest, one.whole,
            [] if one.whole else ["it is not whole, or is being sent"],
        )
        for one in listing(address)
    ]  # fmt: skip
    if not entries:
        raise UsageError(f"{shown(address)}: no checkpoint here; name the SAVE_CKPT_PATH of a run")
    return entries


def _ls(args: argparse.Namespace) -> int:
    root = Path(args.folder)
    remote = is_remote(args.folder)
    entries = _remote(args.folder) if remote else [_entry(path) for path in _folders(root)]
    partial = [] if remote else sorted(str(path) for path in root.glob(f"iter_*{PARTIAL}"))
    if args.json:
        print(json.dumps({"checkpoints": [asdict(entry) for entry in entries], "partial": partial}, indent=1))
        return 0
    print(f"{'iteration':>12}  {'saved':<19}  {'size':>9}  {'files':>5}  state")
    for entry in entries:
        name = choose.RELEASE if entry.iteration is None else f"{entry.iteration:,}"
        state = "whole" if entry.whole else f"damaged: {'; '.join(entry.faults[:3])}"
        state += ", latest" if entry.latest else ""
        print(f"{name:>12}  {entry.saved or '':<19}  {size(entry.bytes):>9}  {entry.files or '':>5}  {state}")
    for path in partial:
        print(f"{path}: being written, or left by a save that was killed; the next run removes it")
    return 0


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _verify(args: argparse.Namespace) -> int:
    results = []
    for path, faults, how in (_verified_there if is_remote(args.folder) else _verified)(args.folder, args.iteration):
        results.append({"path": path, "whole": not faults, "faults": faults, "checked": how})
        if not args.json:
            print("\n".join([f"{path}: {'damaged' if faults else 'whole'} ({how})", *(f"  {it}" for it in faults)]))
    if args.json:
        print(json.dumps({"checkpoints": results}, indent=1))
    return int(any(not result["whole"] for result in results))


def _verified(folder: str, iteration: int | None) -> Iterator[tuple[str, list[str], str]]:
    """Of each checkpoint, or one: where it is, what is wrong with it, how that was found."""
    root = Path(folder)
    for path in _folders(root) if iteration is None else [_one(root, iteration)]:
        yield (str(path), *_faults(path))


def _verified_there(address: str, iteration: int | None) -> Iterator[tuple[str, list[str], str]]:
    """`_verified` of a remote store, whose checkpoints are read where they are."""
    from megatron_rocm.checkpoint import remote
    from megatron_rocm.checkpoint.remote.held import folder_name, split

    root, own = split(address)
    wanted = iteration if iteration is not None else own
    numbers = [one.iteration for one in remote.listing(root)] if wanted is None else [wanted]
    if not numbers:
        raise UsageError(f"{address}: no checkpoint here; name the SAVE_CKPT_PATH of a run")
    for number in numbers:
        yield (
            f"{root}/{folder_name(number)}",
            remote.faults(root, number, full=True),
            "every byte, against the manifest",
        )


def _faults(path: Path) -> tuple[list[str], str]:
    """What is wrong with a checkpoint, every byte read; and how that was found."""
    found = choose.flaws(path)
    if found:
        return found, "names and sizes"
    files = manifest.read(path)
    if files is not None:
        total = sum(file.size for file in files.values())
        return manifest.faults(path, full=True), f"{len(files)} files, {size(total)}, against its manifest"
    from megatron_rocm.checkpoint.contents import structural_faults

    return structural_faults(path), "it has no manifest: the checksums within its files"


def _show(args: argparse.Namespace) -> int:
    from megatron_rocm.checkpoint import contents

    if is_remote(args.folder):
        return _show_there(args)
    path = _one(Path(args.folder), args.iteration)
    found = contents.contents(path)
    if args.json:
        print(json.dumps({**asdict(_entry(path)), **found}, indent=1, default=str))
    else:
        print("\n".join(contents.shown(path, found, tensors=args.tensors)))
    return 0


def _show_there(args: argparse.Namespace) -> int:
    """`_show` of a remote store, of which the files that describe a checkpoint are fetched."""
    from megatron_rocm.checkpoint import contents, remote

    with tempfile.TemporaryDirectory() as folder:
        path = remote.fetch(
            args.folder, args.iteration, folder, choose.PARTS, lambda line: print(line, file=sys.stderr)
        )
        found = contents.contents(path)
    if args.json:
        print(json.dumps({"path": args.folder, **found}, indent=1, default=str))
    else:
        print("\n".join(contents.shown(args.folder, found, tensors=args.tensors)))
    return 0


def _diff(args: argparse.Namespace) -> int:
    from megatron_rocm.checkpoint import contents

    first = Path(args.folder)
    if args.other:
        pair = [_one(first, None), _one(Path(args.other), None)]
    else:
        pair = [path for path in _folders(first) if not choose.flaws(path)][-2:]
        if len(pair) < 2:
            raise UsageError(
                f"checkpoint diff {first}: there are no two whole checkpoints here; name the other one too"
            )
    a, b = pair
    found = contents.differences(a, b, values=args.values)
    if args.json:
        print(json.dumps({"a": str(a), "b": str(b), **found}, indent=1, default=str))
    else:
        print("\n".join(contents.told(a, b, found)))
    return int(any(found.values()))


def _prune(args: argparse.Namespace) -> int:
    if args.keep_last < 1 or args.keep_every < 0:
        raise UsageError(f"checkpoint prune: --keep-last {args.keep_last} must be at least 1, --keep-every at least 0")
    root = Path(args.folder)
    if choose.is_one(root):
        raise UsageError(f"checkpoint prune {root}: this is one checkpoint; name the folder that holds it")
    damaged = [path for path in _folders(root) if choose.flaws(path)]
    gone = surplus(root, args.keep_last, args.keep_every)
    try:
        for path in gone if not args.dry_run else ():
            remove(path)
    except OSError as error:
        raise UsageError(f"{root}: can't be pruned: {os.strerror(error.errno or 0)} ({error.filename})") from None
    kept = [path for path in checkpoints(root) if path not in gone]
    if args.json:
        lists = {"removed": gone, "kept": kept, "damaged": damaged}
        print(json.dumps({name: [str(path) for path in paths] for name, paths in lists.items()}, indent=1))
        return 0
    for path in gone:
        print(f"{'would remove' if args.dry_run else 'removed'} {path}")
    print(
        f"kept {', '.join(path.name for path in kept)}" if kept else "there is no whole checkpoint; nothing is removed"
    )
    for path in damaged:
        print(f"left {path}, which is damaged: neither counted nor removed")
    return 0
