"""The manifest of a checkpoint folder: every other file in it, with its size and a checksum of its bytes.

Needs no torch, so that launchers and tools can ask too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import sync_folder

MANIFEST = "manifest.json"
BLOCK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class File:
    """What is known of a file: bytes, and `sha256:` with 64 hex digits."""

    size: int
    digest: str


def read(folder: str | Path) -> dict[str, File] | None:
    """The files of a checkpoint by their paths in `folder`; None where it has no manifest, as Megatron-LM's have none.

    Raises UsageError where the manifest is damaged.
    """
    path = Path(folder) / MANIFEST
    try:
        text = path.read_text()
        files = {name: File(**fields) for name, fields in json.loads(text)["files"].items()}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UsageError(f"{path} is damaged: it does not say which files the checkpoint has") from None
    if not files:
        raise UsageError(f"{path} is damaged: it names no file")
    if not all(_sound(name, file) for name, file in files.items()):
        raise UsageError(f"{path} is damaged: it names a file outside its folder, or a size or checksum is none")
    return files


def _sound(name: str, file: File) -> bool:
    inside = bool(name) and not os.path.isabs(name) and ".." not in Path(name).parts
    sized = isinstance(file.size, int) and file.size >= 0
    return inside and sized and isinstance(file.digest, str) and file.digest.startswith("sha256:")


def write(folder: str | Path, files: Mapping[str, File]) -> None:
    """Write the manifest, whole and on disk; `files` by their paths in `folder`."""
    path = Path(folder) / MANIFEST
    content: dict[str, Any] = {"version": 1, "files": {name: asdict(files[name]) for name in sorted(files)}}
    temporary = path.with_name(f".{MANIFEST}.{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def faults(folder: str | Path, full: bool, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint's files, a line each: none missing, none of another size and, where `full`, every
    byte as it was written. A checkpoint without a manifest has none to find. Raises UsageError for a damaged manifest.

    `share` (k, n) looks at the k-th of n shares of the files, of about as many bytes each.
    """
    found = []
    files = sorted((read(folder) or {}).items(), key=lambda item: -item[1].size)
    for name, expected in files[share[0] :: share[1]]:
        path = Path(folder) / name
        try:
            size = path.stat().st_size
            if size != expected.size:
                found.append(f"{name} has {size} bytes instead of {expected.size}")
            elif full and digest(path) != expected.digest:
                found.append(f"{name} is not as it was written: its checksum differs")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} can't be read: {error.strerror}")
    return found


def digest(path: str | Path) -> str:
    """The checksum of a file's bytes."""
    found = hashlib.sha256()
    block = memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            found.update(block[:count])
    return f"sha256:{found.hexdigest()}"


def described(folder: str | Path, *names: str) -> dict[str, File]:
    """What a manifest says of small files that are there already; they are read."""
    return {name: File((Path(folder) / name).stat().st_size, digest(Path(folder) / name)) for name in names}


class HashingFile(BufferedIOBase):
    """A new file that is hashed as it is written, from its beginning to its end; `done` is what a manifest says of it.

    `close` has it on disk. `fault` is what the disk refused the last write with.
    """

    fault: OSError | None = None

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115  # open until close()
        self._hash = hashlib.sha256()
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """All of `data`, whose bytes are hashed without holding the interpreter's lock."""
        with memoryview(data) as view, view.cast("B") as flat:
            begin = 0
            while begin < len(flat):  # a raw file may take less than it is given: 2 GiB at most
                with flat[begin : begin + BLOCK * 64] as block:
                    try:
                        written = self._file.write(block) or 0
                    except OSError as error:
                        self.fault = error
                        raise
                    self._hash.update(block[:written])
                begin += written
            self._size += len(flat)
            return len(flat)

    def tell(self) -> int:
        return self._size

    @property
    def done(self) -> File:
        return File(self._size, f"sha256:{self._hash.hexdigest()}")

    def close(self) -> None:
        if not self.closed:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
                super().close()
