"""Where text comes from: a folder, a text file, JSON Lines, or what every machine with Python has."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rocm.errors import UsageError

JSON_LINES = (".jsonl", ".ndjson")
# A folder's file is one document, a lone file is cut into many: splits are made of whole documents.
FOLDER_PIECE, FILE_PIECE = 1 << 20, 8 << 10
SKIPPED_FOLDERS = {"__pycache__"}
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
DEFAULT_MB = 16  # of the default corpus; prepared in well under a minute on two cores


@dataclass
class Corpus:
    """Documents in a fixed order. `limit` is in bytes of text; `skipped` counts files without readable UTF-8 text."""

    name: str
    files: list[tuple[Path, str]]  # path, and the name it goes by in the stamp
    lone: bool
    limit: int | None
    skipped: int = field(default=0, init=False)

    @property
    def stamp(self) -> str:
        """Changes with the name, size or time of any file, and with the limit."""
        facts = [(name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path, name in self.files]
        return hashlib.sha256(json.dumps([facts, self.limit]).encode()).hexdigest()

    def texts(self) -> Iterator[str]:
        """Every document that is not empty. Raises UsageError for a bad JSON line and for a lone file without text."""
        self.skipped = 0
        left = self.limit
        for path, _ in self.files:
            for text in self._documents(path):
                if not text:
                    continue
                yield text
                if left is not None:
                    left -= len(text.encode())
                    if left <= 0:
                        return

    def _documents(self, path: Path) -> Iterator[str]:
        if path.suffix in JSON_LINES or (self.lone and path.suffix == ".json"):
            yield from _json_lines(path)
            return
        fault = _not_text(path)
        if fault is None:
            yield from _pieces(path, FILE_PIECE if self.lone else FOLDER_PIECE)
        elif self.lone:
            raise UsageError(f"INPUT={path}: {fault}. Give UTF-8 text, JSON Lines, or a folder of such files")
        else:
            self.skipped += 1


def find(input: str | None, max_mb: float | None) -> Corpus:
    """The corpus of INPUT; None is the Python standard library and its documentation. Raises UsageError without one."""
    limit = None if max_mb is None else int(max_mb * 1e6)
    if input is None:
        files = [entry for root, suffixes in _default_roots() for entry in _walk(root, suffixes, NOT_STDLIB)]
        corpus = Corpus("the Python standard library", files, False, int(DEFAULT_MB * 1e6) if limit is None else limit)
        if not files:
            raise UsageError("INPUT is needed: this Python has no sources. Give a folder, text or JSON Lines file")
    else:
        path = Path(input).expanduser()
        if not path.exists():
            raise UsageError(f"INPUT={input}: no such file or folder. Give a folder, a text file or a JSON Lines file")
        lone = path.is_file()
        # Resolved: the same data named another way is the same data.
        files = [(path.resolve(), str(path.resolve()))] if lone else _walk(path.resolve(), (), set())
        corpus = Corpus(input, files, lone, limit)
        if not files:
            raise UsageError(f"INPUT={input}: the folder holds no files. Give one with text or JSON Lines files")
    return corpus


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


def _not_text(path: Path) -> str | None:
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


def _pieces(path: Path, size: int) -> Iterator[str]:
    """A text file in pieces of about `size` bytes, cut after an empty line, else after a line."""
    rest = b""
    with open(path, "rb") as file:
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
                yield rest[:cut].decode("utf-8-sig")
                rest = rest[cut:]
    yield rest.decode("utf-8-sig")


def _json_lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError(f"`text` is a {type(text).__name__}")
                text.encode()  # an escaped half of a surrogate pair is no text
            except (ValueError, TypeError, KeyError) as error:
                why = "there is no key `text`" if isinstance(error, KeyError) else str(error)
                raise UsageError(
                    f'INPUT={path}: line {number} is not {{"text": "…"}}: {why}. Mend or remove the line'
                ) from None
            yield text
