"""The text of INPUT: a folder, a text file, JSON Lines or Parquet, or what every machine with Python has."""

from __future__ import annotations

import codecs
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_rocm.data import documents, source
from megatron_rocm.data.source import Source
from megatron_rocm.errors import UsageError

SKIPPED_FOLDERS = {"__pycache__"}
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
DEFAULT_MB = 16  # of the default corpus; prepared in well under a minute on two cores


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order. `limit` is in bytes of text."""

    name: str
    sources: list[Source]
    limit: int | None


def find(input: str | None, max_mb: float | None) -> Corpus:
    """The corpus of INPUT; None is the Python standard library and its documentation. Raises UsageError without one."""
    limit = None if max_mb is None else int(max_mb * 1e6)
    if input is None:
        files = [entry for root, suffixes in _default_roots() for entry in _walk(root, suffixes, NOT_STDLIB)]
        if not files:
            raise UsageError("INPUT is needed: this Python has no sources. Give a folder, text or JSON Lines file")
        sources = [_source(path, name, optional=True) for path, name in files]
        return Corpus("the Python standard library", sources, int(DEFAULT_MB * 1e6) if limit is None else limit)
    path = Path(input).expanduser()
    if not path.exists():
        raise UsageError(f"INPUT={input}: no such file or folder. Give a folder, a text file or a JSON Lines file")
    # Resolved: the same data named another way is the same data.
    path = path.resolve()
    if not path.is_dir():
        return Corpus(input, [_source(path, str(path), optional=False)], limit)
    sources = [_source(file, name, optional=True) for file, name in _walk(path, (), set())]
    if not sources:
        raise UsageError(f"INPUT={input}: the folder holds no files. Give one with text or JSON Lines files")
    return Corpus(input, sources, limit)


def texts(sources: list[Source], key: str = "text") -> Iterator[str]:
    """Every document that is not empty and has no fault, one after the other."""
    for number, one in enumerate(sources):
        for chunk in source.read(number, one, 0, key):
            yield from filter(None, documents.texts(chunk.payload, key)[0])


def _source(path: Path, name: str, optional: bool) -> Source:
    # A .json among a folder's text files is a text file, and only what says so is compressed JSON Lines.
    lone = (*source.JSON_LINES, *source.COMPRESSED, ".parquet")
    known = path.name.endswith(tuple(end for end in source.IN_FOLDERS if end != ".json") if optional else lone)
    return source.file(str(path), None if known else "text", name, optional)


def _default_roots() -> Iterator[tuple[Path, tuple[str, ...]]]:
    yield Path(sysconfig.get_path("stdlib")), (".py",)
    for folder in sorted(Path(sys.base_prefix, "share", "doc").glob("python3*")):
        yield folder, (".rst", ".rst.txt")


def _walk(root: Path, suffixes: tuple[str, ...], skipped: set[str]) -> list[tuple[Path, str]]:
    """Regular files in an order that has nothing to do with their names.

    The validation split is made of the last documents, and must be a fair sample.
    """
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS | skipped and not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and name.endswith(suffixes or "") and path.is_file():
                found.append((path, path.relative_to(root).as_posix()))
    return sorted(found, key=lambda entry: hashlib.sha1(os.fsencode(entry[1])).digest())


def not_text(path: Path) -> str | None:
    """Why a file is not text; None where it is."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                if b"\0" in block:
                    return f"is binary: a zero byte at {at + block.index(0):,}"
                decoder.decode(block)
                at += len(block)
        decoder.decode(b"", final=True)
    except OSError as error:
        return f"can't be read: {error.strerror}"
    except UnicodeDecodeError:
        return f"is not UTF-8 text, in the mebibyte from byte {at:,} on"
    return None


def pieces(path: Path, size: int, position: int = 0) -> Iterator[bytes]:
    """A text file from `position` on in pieces of about `size` bytes, cut after an empty line, else after a line."""
    rest = b""
    with open(path, "rb") as file:
        file.seek(position)
        while block := file.read(size):
            rest += block
            if len(rest) < size:
                continue
            empty_line = rest.rfind(b"\n\n")
            cut = empty_line + 2 if empty_line >= 0 else rest.rfind(b"\n") + 1
            if not cut and len(rest) > 16 * size:
                # No line ends here: cut between two characters.
                cut = next(at for at in range(len(rest) - 1, 0, -1) if rest[at] & 0xC0 != 0x80)
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
    if rest:
        yield rest
