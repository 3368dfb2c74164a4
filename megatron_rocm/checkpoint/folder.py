"""Megatron-LM's folder layout: `iter_0000100/` and so on; `latest_checkpointed_iteration.txt` names the newest.

Needs no torch, so that launchers and tools can ask too.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import sync_folder

TRACKER = "latest_checkpointed_iteration.txt"
PARTIAL = ".partial"  # ends the name of a folder that is being written
WHOLE = "metadata.json"  # megatron-core writes it last


def checkpoint_path(root: str | Path, iteration: int) -> Path:
    """Where the checkpoint after `iteration` steps lies."""
    return Path(root) / f"iter_{iteration:07d}"


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


def find(run: RunConfig) -> Path | None:
    """The checkpoint `run` goes on from; None where it starts anew. Raises UsageError for one that is not there."""
    if run.checkpoint.save and (path := latest(run.checkpoint.save)):
        return path
    if not run.checkpoint.load:
        return None
    if os.path.isfile(Path(run.checkpoint.load) / WHOLE):  # one checkpoint's own folder
        return Path(run.checkpoint.load)
    path = latest(run.checkpoint.load)
    if not path:
        raise UsageError(
            f"LOAD_CKPT_PATH={run.checkpoint.load}: there is no checkpoint, as it has no {TRACKER}. "
            "Name a folder that SAVE_CKPT_PATH has named before, or one iteration's folder in it"
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


def remove_partial(root: str | Path) -> list[Path]:
    """Remove what killed saves left in `root`; which folders these were."""
    found = sorted(Path(root).glob(f"iter_*{PARTIAL}"))
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return found
