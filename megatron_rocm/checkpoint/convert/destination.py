"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rocm.checkpoint.folder import WHOLE, iteration_of
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import sync_folder, to_ourselves


@contextmanager
def new_folder(out: Path, size: int, *, source: Path, overwrite: bool, ours: Callable[[Path], str]) -> Iterator[Path]:
    """A folder to fill, which becomes `out` where the block ends well and is removed where not.

    `size` is how many bytes it will at least hold, `source` the folder that is read meanwhile. `ours` says what keeps
    an existing folder from being replaced with `overwrite`, or nothing. Raises UsageError for an existing destination
    and for every OSError of the block.
    """
    out = Path(os.path.realpath(out))
    _refuse(out, Path(os.path.realpath(source)), overwrite, ours)
    partial = out.with_name(f".{out.name}.partial")
    with to_ourselves(str(out), "destination"):
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
            partial.mkdir()
            free = shutil.disk_usage(partial).free
            if size > free:
                raise UsageError(f"{out}: needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: make room")
            yield partial
            sync_folder(partial)
            _put_in_place(partial, out)
        except OSError as error:
            full = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error
            raise UsageError(f"{out}: can't be written ({full}); choose another folder or make room") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _refuse(out: Path, source: Path, overwrite: bool, ours: Callable[[Path], str]) -> None:
    if inside := next((path for path in out.parents if iteration_of(path) >= 0 and (path / WHOLE).is_file()), None):
        raise UsageError(f"{out} lies in a checkpoint, {inside}, and would go when that does: choose another folder")
    if os.path.ismount(out) or out == Path.cwd():
        raise UsageError(f"{out} can't be replaced, as it is mounted or the current folder: name a folder in it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{out} exists and is not empty: choose another folder, or replace it with --overwrite")
    if source == out or out in source.parents:
        raise UsageError(f"{out} holds the source, {source}, and would replace it: choose another folder")
    if reason := ours(out):
        raise UsageError(f"{out} is {reason}: --overwrite replaces no other")


def _put_in_place(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
    else:
        old = out.with_name(f".{out.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    sync_folder(out.parent)
