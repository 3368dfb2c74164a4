"""Local folders like those that a run saves, for tests of sending and fetching."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_rocm.checkpoint import manifest
from megatron_rocm.checkpoint.folder import checkpoint_path, set_latest
from megatron_rocm.checkpoint.manifest import MANIFEST

FEW = {"__0_0.distcp": 100_000, "__1_0.distcp": 70_000, "common.pt": 300, "metadata.json": 20}


def save(root: Path, iteration: int, sizes: dict[str, int] | None = None) -> Path:
    """A whole checkpoint of random bytes, which the tracker names."""
    folder = checkpoint_path(root, iteration)
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in (sizes or FEW).items():
        with open(folder / name, "wb") as file:
            for begin in range(0, size, 1 << 24):
                file.write(os.urandom(min(1 << 24, size - begin)))
    names = [path.name for path in folder.iterdir() if path.name != MANIFEST]
    manifest.write(folder, manifest.described(folder, *names))
    set_latest(root, iteration)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
