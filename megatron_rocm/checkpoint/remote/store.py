"""One address of a remote store: small objects whole, large files in parts, in bounded memory, by fsspec.

Whatever a library raises becomes a StoreError, one readable line without secrets.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_rocm.checkpoint.manifest import BLOCK, File
from megatron_rocm.config.address import checked, shown
from megatron_rocm.errors import UsageError

PART = 8 << 20  # bytes of a part, and of a range that is read
MOST_PARTS = 9_000  # of one object: S3 allows 10,000
STREAMS = 4  # files that are sent at a time, and ranges that are read at a time

# Scheme → (package that fsspec needs for it, what to install).
PACKAGES = {
    "s3": ("s3fs", "pip install 'megatron-rocm[s3]'"),
    "s3a": ("s3fs", "pip install 'megatron-rocm[s3]'"),
    "gs": ("gcsfs", "pip install 'megatron-rocm[gs]'"),
    "gcs": ("gcsfs", "pip install 'megatron-rocm[gs]'"),
    "abfs": ("adlfs", "pip install adlfs"),
    "az": ("adlfs", "pip install adlfs"),
}
REFUSED = (400, 401, 403, 404)  # of HTTP: asking again soon changes nothing
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
# Seconds until a silent server counts as a fault; whoever calls tries again, so botocore does not.
_S3: dict[str, Any] = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 1}}}
OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3}


class StoreError(Exception):
    """The store did not do what it was asked for; a later try may succeed, less likely so where it is `refused`."""

    def __init__(self, message: str, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class DamagedFile(Exception):
    """A file whose bytes are not those of its manifest."""


def require(variable: str, address: str) -> None:
    """Raise UsageError unless the address is sound and the library for it is installed."""
    scheme = checked(variable, address).partition("://")[0]
    package, way_out = PACKAGES.get(scheme, ("fsspec", "pip install fsspec"))
    if importlib.util.find_spec("fsspec") is None or importlib.util.find_spec(package) is None:
        raise UsageError(f"{variable}={address}: the Python package {package} is missing: {way_out}")
    from fsspec.registry import known_implementations, registry

    if scheme not in known_implementations and scheme not in registry:
        raise UsageError(
            f"{variable}={address}: no {scheme}:// is known; s3, gs, abfs, sftp and file are some that are"
        )


class Store:
    """The objects below an address, named by their paths relative to it."""

    def __init__(self, address: str) -> None:
        """Connects at first use. Raises UsageError for an address or a library that will not do."""
        require("address", address)
        import fsspec

        self.address = checked("address", address)
        self._scheme = self.address.partition("://")[0]
        self._root = str(fsspec.get_filesystem_class(self._scheme)._strip_protocol(self.address)).rstrip("/")

    @functools.cached_property
    def _fs(self) -> Any:
        import fsspec

        options = OPTIONS.get(self._scheme, {})
        return fsspec.filesystem(self._scheme, skip_instance_cache=True, use_listings_cache=False, **options)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def children(self, folder: str = "") -> list[str]:
        """Names directly in a folder, sorted; none where it does not exist."""
        with _faults(self._where(folder), "listing it"):
            try:
                found = self._fs.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []
        return sorted({str(path).rstrip("/").rsplit("/", 1)[-1] for path in found} - {""})

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every object below a folder, by its path in that folder."""
        root = self._path(folder)
        with _faults(self._where(folder), "listing it"):
            try:
                found = self._fs.find(root, detail=True)
            except FileNotFoundError:
                return {}
        cut = len(self._fs._strip_protocol(root).rstrip("/")) + 1
        return {path[cut:]: int(info["size"]) for path, info in found.items() if len(path) > cut}

    def read(self, name: str) -> bytes | None:
        """A small object; None where it does not exist."""
        with _faults(self._where(name), "reading it"):
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """A small object, whole or not at all (with file://, by a rename)."""
        with _faults(self._where(name), "writing it"):
            path = self._path(name)
            self._make_folder(path)
            if self._is_local():
                temporary = f"{path}.{os.getpid()}.partial"
                self._fs.pipe_file(temporary, content)
                os.replace(temporary, path)
            else:
                self._fs.pipe_file(path, content)

    def remove(self, name: str) -> None:
        """An object, which need not be there."""
        with _faults(self._where(name), "removing it"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def remove_all(self, folder: str) -> None:
        """Everything below a folder."""
        for name in self.sizes(folder):
            self.remove(f"{folder}/{name}")
        if self._is_local():
            with _faults(self._where(folder), "removing it"), contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._path(folder), recursive=True)

    def send(self, source: Path, name: str, part_done: Callable[[], None] = lambda: None) -> File:
        """Write a file in parts of PART bytes; what was sent. Holds about five parts at a time.

        Raises StoreError; the parts sent until then are taken back, as far as the store still answers. OSError where
        the source can't be read.
        """
        hashing, size = hashlib.sha256(), source.stat().st_size
        part = max(PART, -(-size // MOST_PARTS))
        with source.open("rb", buffering=0) as file:
            with _faults(self._where(name), "writing it"):
                path = self._path(name)
                self._make_folder(path)
                target = self._fs.open(path, "wb", block_size=part)
            sent = 0
            try:
                while block := _read_exactly(file, part):
                    hashing.update(block)
                    with _faults(self._where(name), "writing it"):
                        target.write(block)
                    sent += len(block)
                    part_done()
                with _faults(self._where(name), "writing it"):
                    target.close()
            except BaseException:
                _abandon(target)
                raise
        return File(sent, f"sha256:{hashing.hexdigest()}")

    def receive(self, name: str, target: Path, expected: File) -> None:
        """Read an object into a new file, going on where an earlier try was cut; `target` appears when it is whole.

        `expected.digest` may be empty: then its size alone is compared. Raises DamagedFile where the object's bytes are
        other ones, StoreError, or OSError where the file can't be written.
        """
        partial = target.with_name(target.name + ".part")
        target.parent.mkdir(parents=True, exist_ok=True)
        for again in (False, True):
            hashing = hashlib.sha256()
            with partial.open("ab") as file:
                if file.tell() > expected.size or again:
                    file.truncate(0)
                begin = _hash_into(hashing, partial)
                for block in self.ranges(name, expected.size, begin):
                    file.write(block)
                    hashing.update(block)
                file.flush()
                os.fsync(file.fileno())
                complete = file.tell() == expected.size
            if complete and expected.digest in ("", f"sha256:{hashing.hexdigest()}"):
                partial.replace(target)
                return
        partial.unlink()
        raise DamagedFile(f"{self._where(name)} is not as it was written: its checksum differs")

    def ranges(self, name: str, size: int, begin: int = 0) -> Iterator[bytes]:
        """The object's bytes from `begin` on, in order, STREAMS ranges of PART bytes being read at a time.

        Ends early where the object is shorter.
        """

        def one(start: int) -> bytes:
            with _faults(self._where(name), "reading it"):
                return bytes(self._fs.cat_file(self._path(name), start=start, end=min(start + PART, size)))

        with ThreadPoolExecutor(STREAMS) as pool:
            starts = iter(range(begin, size, PART))
            waiting = [pool.submit(one, start) for start, _ in zip(starts, range(STREAMS), strict=False)]
            try:
                while waiting:
                    block = waiting.pop(0).result()
                    yield block
                    if (start := next(starts, None)) is not None:
                        waiting.append(pool.submit(one, start))
            finally:
                for future in waiting:
                    future.cancel()

    def _where(self, name: str) -> str:
        return f"{self.address}/{name}" if name else self.address

    def _is_local(self) -> bool:
        return self._scheme in ("file", "local")

    def _make_folder(self, path: str) -> None:
        """Only stores that have folders need them; S3 would take it for making a bucket."""
        if self._scheme not in PACKAGES:
            self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)


def _read_exactly(file: Any, count: int) -> bytearray | memoryview:
    """The next `count` bytes, fewer at the end of the file."""
    block = bytearray(count)
    view, filled = memoryview(block), 0
    while filled < count and (got := file.readinto(view[filled:])):
        filled += got
    return view[:filled]


def _hash_into(hashing: Any, path: Path) -> int:
    """Hash a file; its size."""
    size = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            hashing.update(block)
            size += len(block)
    return size


def _abandon(target: Any) -> None:
    """Take back what was written of an open file: closing it would give half of it its name."""
    with contextlib.suppress(Exception):
        target.discard()
    with contextlib.suppress(AttributeError):  # some stores' files are plain ones, which close as they are
        target.closed = True


@contextlib.contextmanager
def _faults(where: str, doing: str) -> Iterator[None]:
    """Every exception as a StoreError."""
    try:
        yield
    except (UsageError, StoreError):
        raise
    except Exception as error:
        status = _status(error)
        refused = status in REFUSED or type(error).__name__ in NO_CREDENTIALS
        raise StoreError(f"{where}: {doing} failed: {_reason(error, status)}", refused) from None


def _status(error: BaseException) -> int | None:
    """HTTP's, of an exception of s3fs or gcsfs."""
    answer = getattr(error.__cause__ or error, "response", None)
    answer = answer if isinstance(answer, dict) else {}
    return answer.get("ResponseMetadata", {}).get("HTTPStatusCode") or getattr(error, "code", None)


def _reason(error: BaseException, status: int | None) -> str:
    """What went wrong, in one line without secrets."""
    text = getattr(error, "strerror", None) or str(error)
    words = " ".join(str(text).split())[:200] or type(error).__name__
    return shown(f"HTTP {status}, {words}" if status else f"{type(error).__name__}: {words}")
