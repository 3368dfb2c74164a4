"""Which checkpoint a run goes on from. Needs no torch, so that launchers can ask too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from megatron_rocm.checkpoint import manifest
from megatron_rocm.checkpoint.folder import PARTIAL, TRACKER, WHOLE, checkpoint_path, iteration_of
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError

RELEASE = "release"  # Megatron-LM's name of a checkpoint that is of no iteration
PARTS = (WHOLE, ".metadata", "common.pt")  # that every torch_dist checkpoint has


class Choice(NamedTuple):
    """Checkpoints to go on from, best first; which of them are whole is still to be seen."""

    paths: tuple[Path, ...] = ()
    resumes: bool = False  # they are this run's own, so that all of the state is taken
    notes: tuple[str, ...] = ()


def candidates(run: RunConfig) -> Choice:
    """What SAVE_CKPT_PATH holds, else LOAD_CKPT_PATH; none where the run starts anew.

    Raises UsageError where LOAD_CKPT_PATH holds nothing that can be loaded.
    """
    save, load = run.checkpoint.folder, run.checkpoint.source
    if save and (choice := newest_first(save)).paths:
        unread = f"LOAD_CKPT_PATH={run.checkpoint.load} is not read: SAVE_CKPT_PATH holds checkpoints to go on from"
        return choice._replace(resumes=True, notes=(*choice.notes, *[unread] * bool(load and load != save)))
    if not load:
        return Choice()
    if is_one(Path(load)):
        return Choice((Path(load),))
    choice = newest_first(load)
    if not choice.paths:
        _refuse_legacy(Path(load))
        raise UsageError(
            f"LOAD_CKPT_PATH={load}: there is no checkpoint, as it has no {TRACKER}. "
            "Name a folder that SAVE_CKPT_PATH has named before, or one iteration's folder in it"
        )
    return choice


def is_one(path: Path) -> bool:
    """Whether a folder is one checkpoint's own, damaged or not: none of checkpoints, nor one that is being written."""
    named = os.path.isdir(path) and iteration_of(path) >= 0
    return named or (os.path.isfile(path / WHOLE) and not path.name.endswith(PARTIAL))


def newest_first(root: str | Path) -> Choice:
    """The checkpoints of a folder, from the one that the tracker names downwards; all, where it names none."""
    root = Path(root)
    there = {iteration_of(path): path for path in root.glob("iter_*") if iteration_of(path) >= 0}
    tracker = root / TRACKER
    try:
        text = tracker.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        text = ""
    except (OSError, UnicodeDecodeError):
        text = "what can't be read"
    if text == RELEASE:
        return Choice((root / RELEASE,))
    if text.isascii() and text.isdigit() and len(text) < 19:
        there.setdefault(int(text), checkpoint_path(root, int(text)))  # missing, which is to be told
        return Choice(tuple(there[number] for number in sorted(there, reverse=True) if number <= int(text)))
    paths = tuple(there[number] for number in sorted(there, reverse=True))
    if not paths and text:
        raise UsageError(
            f"{tracker} should hold the number of an iteration, not {text[:40]!r}; remove it to start anew"
        )
    says = f"holds {text[:40]!r} instead of an iteration" if text else "is missing"
    return Choice(paths, notes=(f"warning: {tracker} {says}: the newest whole checkpoint is taken",) if paths else ())


def flaws(path: Path) -> list[str]:
    """What is wrong with a checkpoint as far as its files' names and sizes tell, a line each.

    Raises UsageError for one in Megatron-LM's older format.
    """
    _refuse_legacy(path)
    if not os.path.isdir(path):
        return ["the folder is missing"]
    try:
        if not any(path.iterdir()):
            return ["the folder is empty"]
        missing = [f"{name} is missing" for name in PARTS if not (path / name).is_file()]
        return missing or manifest.faults(path, full=False)
    except UsageError as error:
        return [str(error)]
    except OSError as error:
        return [f"the folder can't be read: {error.strerror}"]


def find(run: RunConfig) -> Path | None:
    """The checkpoint that `run` goes on from as far as names and sizes tell; None where it starts anew.

    Raises UsageError where there are checkpoints and none is whole.
    """
    choice = candidates(run)
    wrong: list[str] = []
    for path in choice.paths:
        found = flaws(path)
        if not found:
            return path
        wrong.append(damaged(path, found))
    if wrong:
        raise UsageError(none_whole(wrong))
    return None


def damaged(path: Path, found: list[str]) -> str:
    """Say what is wrong with a checkpoint."""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"the checkpoint {path} is damaged: {found[0]}{more}"


def none_whole(wrong: list[str]) -> str:
    """Say that no checkpoint can be used, of `wrong`, each what `damaged` says of it."""
    return (
        f"{'; '.join(wrong)}. No whole one is left to go on from. `megatron-rocm checkpoint verify` tells more; "
        "copy a whole one there, name another folder, or remove what is there to start anew"
    )


def _refuse_legacy(path: Path) -> None:
    for folder in (path, *path.glob("iter_*"), path / RELEASE):
        if os.path.isdir(folder) and any(folder.glob("mp_rank_*")):
            raise UsageError(
                f"{folder} is in Megatron-LM's `torch` format, which only its own trainer reads, in one layout: "
                "load it there and save it with --ckpt-format torch_dist"
            )
