"""Writing what a power cut must not undo."""

from __future__ import annotations

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Have the names in `folder`, renamed ones too, on disk before going on."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Have the file's content on disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
