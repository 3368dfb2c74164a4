"""Megatron-LM's folder layout: `iter_0000100/` and so on; `latest_checkpointed_iteration.txt` names the newest.

Needs no torch, so that launchers and tools can ask too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from megatron_rocm.checkpoint import manifest, phases
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import sync_folder

TRACKER = "latest_checkpointed_iteration.txt"
SENDING = "sending.txt"  # names the iteration that this node is sending to a remote store
PARTIAL = ".partial"  # ends the name of a folder that is being written
WHOLE = "metadata.json"  # megatron-core writes it last


def checkpoint_path(root: str | Path, iteration: int) -> Path:
    """Where the checkpoint after `iteration` steps lies."""
    return Path(root) / f"iter_{iteration:07d}"


def iteration_of(path: Path) -> int:
    """The number in a checkpoint's name; -1 where it is another name."""
    match = re.fullmatch(r"iter_(\d{1,18})", path.name)
    return int(match[1]) if match else -1


def is_whole(path: Path) -> bool:
    """Whether all files that the checkpoint's manifest names are there in their sizes; Megatron-LM's have none."""
    try:
        return os.path.isfile(path / WHOLE) and not manifest.faults(path, full=False)
    except UsageError:
        return False


def checkpoints(root: str | Path, whole: Callable[[Path], bool] = is_whole) -> list[Path]:
    """The whole checkpoints in `root`, newest last."""
    found = [path for path in Path(root).glob("iter_*") if iteration_of(path) >= 0 and whole(path)]
    return sorted(found, key=iteration_of)


def has_manifest(path: Path) -> bool:
    """Whether the checkpoint, of which a node holds a part alone, was written to the end."""
    return (path / manifest.MANIFEST).is_file()


def latest(root: str | Path) -> Path | None:
    """The newest checkpoint in `root`; None where there is none. Raises UsageError where the one named is not there."""
    tracker = Path(root) / TRACKER
    try:
        text = tracker.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{tracker} can't be read: {error}") from None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise UsageError(f"{tracker} should hold the number of an iteration, not {text[:40]!r}")
    path = checkpoint_path(root, int(text))
    if not os.path.isfile(path / WHOLE):
        raise UsageError(
            f"{tracker} names iteration {text}, but {path} is missing or incomplete: write the iteration of a whole "
            f"checkpoint into {TRACKER}, or remove that file to start anew"
        )
    return path


def set_latest(root: str | Path, iteration: int) -> None:
    """Name the newest checkpoint; the file is replaced whole."""
    tracker = Path(root) / TRACKER
    temporary = tracker.with_name(f".{TRACKER}.{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(str(iteration))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(tracker)
    sync_folder(tracker.parent)


def place(partial: Path, final: Path) -> None:
    """Give a checkpoint that is whole and on disk its final name, then name it the newest.

    One of that name is replaced: a damaged one, or one that a killed run had finished but not named. Where the tracker
    names it, that names another or is gone before.
    """
    root = final.parent
    if final.exists():
        if named(root / TRACKER) == iteration_of(final):
            others = [path for path in checkpoints(root) if path != final]
            set_latest(root, iteration_of(others[-1])) if others else (root / TRACKER).unlink()
        remove(final)
    phases.mark("rename")
    partial.rename(final)
    sync_folder(root)
    phases.mark("name")
    set_latest(root, iteration_of(final))


def named(file: Path) -> int:
    """The iteration that a tracker or `SENDING` names; -1 where it names none."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return -1


def remove(path: Path) -> None:
    """Remove a checkpoint; one that is half removed has lost its final name. Raises OSError."""
    doomed = path.with_name(f"{path.name}.removed{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def surplus(root: str | Path, keep_last: int, keep_every: int, whole: Callable[[Path], bool] = is_whole) -> list[Path]:
    """Whole checkpoints but for the last `keep_last`, and those of every `keep_every`th step (0: none is kept for its
    step).

    Never among them are the one that the tracker names, as many before it as are kept (where a run has gone back, newer
    ones are of a course that it has left), the one that is on its way to a remote store, and with `keep_last` 0 any.
    Damaged ones are not counted, so that a whole one is always left, nor among them.
    """
    if not keep_last:
        return []
    root = Path(root)
    found = {iteration_of(path): path for path in checkpoints(root, whole)}
    latest = named(root / TRACKER)
    stay = kept(found, keep_last, keep_every, latest) | {latest, named(root / SENDING)}
    return [path for iteration, path in found.items() if iteration not in stay]


def kept(found: Collection[int], last: int, every: int, latest: int) -> set[int]:
    """Those of the iterations that SAVE_KEEP_LAST and SAVE_KEEP_EVERY keep, where the tracker names `latest`; `last` 0
    keeps all."""
    if not last:
        return set(found)
    newest, course = sorted(found)[-last:], sorted(one for one in found if one <= latest)[-last:]
    return {*newest, *course, *(one for one in found if every and one % every == 0)}


def prune(root: str | Path, keep_last: int, keep_every: int, whole: Callable[[Path], bool] = is_whole) -> list[Path]:
    """Remove `surplus` checkpoints. Which. Raises OSError."""
    removed = surplus(root, keep_last, keep_every, whole)
    for path in removed:
        remove(path)
    return removed


def remove_partial(root: str | Path) -> list[Path]:
    """Remove what killed saves left in `root`; which folders these were."""
    found = sorted(Path(root).glob(f"iter_*{PARTIAL}"))
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return found
