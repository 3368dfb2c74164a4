"""Where documents come from: JSON Lines, plain, gzip or zstd; Parquet; text files; standard input.

`find` turns what people type into a list of `Source`, `read` gives a source in chunks of about CHUNK bytes cut at line
ends, from any position on. A chunk knows its file and lines; nothing here holds more than a chunk, but for a line that
is longer.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_rocm.errors import UsageError

CHUNK = 4 << 20
LONGEST_LINE = 1 << 30
TOO_LONG = f"has a line of over {LONGEST_LINE >> 20} MiB; one JSON object a line is expected"
BLOCK = 64 << 10  # of compressed data; gzip can make a thousand times as much of it
JSON_LINES = (".jsonl", ".ndjson", ".json")
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
IN_FOLDERS = (*JSON_LINES, *(line + more for line in JSON_LINES for more in COMPRESSED), ".parquet")
STDIN = "-"
# A folder's text file is one document, a lone one is cut into many: splits are made of whole documents.
FOLDER_PIECE, FILE_PIECE = 1 << 20, 8 << 10


@dataclass(frozen=True)
class Source:
    """One file, or the part of it that a shard reads.

    `kind`: lines, gzip, zstd, stdin, parquet, or text. `name` is what stamps call it. `start` and `end` are positions
    (see Chunk) and hold for lines and parquet only: a line belongs to the part in which it begins. `optional`: a text
    file that turns out not to be text is passed over.
    """

    path: str
    kind: str
    name: str
    size: int = 0
    mtime: int = 0
    start: int = 0
    end: int | None = None
    optional: bool = False


class Chunk(NamedTuple):
    """Some documents of source number `source`.

    `payload`: lines of JSON as they are in the file, or a list of values. `position`: where the next chunk begins, in
    bytes of the uncompressed file or rows of a Parquet file. `begin`: the position where this reading of the file
    began, and `line` how many lines (rows) after it the chunk begins. `done`: bytes of the file on the disk that have
    been read. `fault`: why the file can't be read further.
    """

    source: int
    payload: bytes | list[Any]
    begin: int
    line: int
    position: int
    done: int
    fault: str | None = None


class Damaged(Exception):
    """The file can't be read beyond what has been given."""


def find(inputs: Sequence[str], key: str = "--input") -> list[Source]:
    """The files that paths, patterns, folders and `-` stand for; a pattern's and a folder's sorted by name.

    In folders: JSON Lines, also compressed, and Parquet. Raises UsageError, naming `key`, where nothing is found.
    """
    found: list[Source] = []
    for word in inputs:
        if word == STDIN:
            found.append(Source(STDIN, "stdin", STDIN))
            continue
        path = os.path.expanduser(word)
        if os.path.isdir(path):
            names = [name for name in _walk(path) if name.endswith(IN_FOLDERS)]
            if not names:
                raise UsageError(f"{key}={word}: the folder holds no {', '.join(IN_FOLDERS[:6])} or .parquet file")
        elif os.path.exists(path):
            names = [path]
        else:
            names = sorted(name for name in glob.glob(path, recursive=True) if not os.path.isdir(name))
            if not names:
                what = "no file matches it" if glob.has_magic(path) else "no such file or folder"
                raise UsageError(f"{key}={word}: {what}. Give JSON Lines (.jsonl, .gz, .zst), Parquet, a folder, or -")
        found += [file(name) for name in names if os.path.exists(name)]  # not where a link points to nothing
    if sum(source.path == STDIN for source in found) > 1:
        raise UsageError(f"{key}: standard input (-) can be read once only")
    return found


def file(path: str, kind: str | None = None, name: str | None = None, optional: bool = False) -> Source:
    """The source for a file, its kind by its ending; a pipe is read as standard input is."""
    facts = os.stat(path)
    known = "parquet" if path.endswith(".parquet") else COMPRESSED.get(os.path.splitext(path)[1], "lines")
    if not os.path.isfile(path):
        known = "stdin"
    return Source(path, kind or known, name or path, facts.st_size, facts.st_mtime_ns, optional=optional)


def _walk(folder: str) -> list[str]:
    """The files below a folder, but for hidden ones and the sidecars of .bin/.idx pairs. A link into a loop ends it."""
    found, seen = [], set()
    for at, folders, files in os.walk(folder, followlinks=True):
        facts = os.stat(at)
        if (facts.st_dev, facts.st_ino) in seen:
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        made = {f"{os.path.splitext(name)[0]}.json" for name in files if name.endswith((".bin", ".idx"))}
        found += [os.path.join(at, name) for name in files if not name.startswith(".") and name not in made]
    return sorted(found)


def stamp(sources: Sequence[Source], times: bool = True) -> str:
    """Changes with the order, name or size of any file, and with `times` also with its time."""
    facts = [(one.name if times else os.path.basename(one.name), one.size, times and one.mtime) for one in sources]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def shard(sources: Sequence[Source], index: int, count: int) -> list[Source]:
    """The part `index` of `count`, by bytes on the disk: the same on every machine, and in order.

    Plain JSON Lines are cut anywhere, Parquet at row groups; a compressed or text file goes whole to the part in
    which its middle lies.
    """
    total = sum(source.size for source in sources)
    low, high = total * index // count, total * (index + 1) // count
    mine, at = [], 0
    for source in sources:
        begin, at = at, at + source.size
        if source.kind == "lines":
            start, end = max(low - begin, 0), min(high - begin, source.size)
            if start < end:
                mine.append(replace(source, start=start, end=end))
        elif source.kind == "parquet":
            rows, groups = _row_groups(source.path)
            inside = [number for number, middle in enumerate(groups) if low <= begin + middle * source.size < high]
            if inside:
                mine.append(replace(source, start=rows[inside[0]], end=rows[inside[-1] + 1]))
        elif low <= begin + source.size // 2 < high or (not source.size and low <= begin < high):
            mine.append(source)
    return mine


def read(number: int, source: Source, position: int, column: str, size: int = CHUNK) -> Iterator[Chunk]:
    """The chunks of source `number` from `position` on. What can't be read is the last chunk's `fault`."""
    position = begin = max(position, source.start)
    line = done = 0
    try:
        for payload, after, done in READERS[source.kind](source, position, column, size):
            if not line:
                begin = after - len(payload)  # a shard's part may begin in mid-line
            position = after
            yield Chunk(number, payload, begin, line, position, done)
            line += line_ends(payload) if isinstance(payload, bytes) else len(payload)
    except Damaged as damage:
        yield Chunk(number, b"", begin, line, position, done, str(damage))
    except OSError as error:
        yield Chunk(number, b"", begin, line, position, done, f"can't be read: {error.strerror or error}")


def line_ends(payload: bytes) -> int:
    """How many lines end in it; twice as fast as bytes.count."""
    return int(np.count_nonzero(np.frombuffer(payload, np.uint8) == ord("\n")))


Part = tuple["bytes | list[Any]", int, int]  # payload, position and bytes done after it


def _lines(source: Source, position: int, _: str, size: int) -> Iterator[Part]:
    end = source.size if source.end is None else source.end
    with open(source.path, "rb", buffering=0) as raw:
        at, wanted = _line_start(raw, position), size
        while at < end:
            # What follows the last line end is read again with the next chunk: cheaper than to put it in front of that.
            block = os.pread(raw.fileno(), wanted, at)
            last = at + len(block) >= end  # then the line in which the part ends is the last one
            cut = (block.find(b"\n", max(end - 1 - at, 0)) if last else block.rfind(b"\n")) + 1
            if not cut and len(block) == wanted:
                if wanted > LONGEST_LINE:
                    raise Damaged(TOO_LONG)
                wanted *= 2
                continue
            if not block:
                return
            cut, wanted = cut or len(block), size
            at += cut
            yield block[:cut], at, at - source.start


def _line_start(raw: Any, position: int) -> int:
    """The first line that begins at `position` or after it."""
    if not position:
        return 0
    raw.seek(at := position - 1)
    while block := raw.read(BLOCK):
        cut = block.find(b"\n") + 1
        if cut:
            return at + cut
        at += len(block)
    return at


def _stream(source: Source, position: int, _: str, size: int) -> Iterator[Part]:
    """Compressed files and standard input: what comes before `position` is read and let go."""
    with _raw(source) as raw:
        at = 0

        def blocks() -> Iterator[bytes]:
            nonlocal at
            for block in DECODERS[source.kind](raw):
                skip = min(max(position - at, 0), len(block))
                at += skip
                if skip < len(block):
                    yield block[skip:]

        for payload in _whole_lines(blocks(), size):
            at += len(payload)
            yield payload, at, raw.tell() if source.size else at


def _raw(source: Source) -> Any:
    if source.path == STDIN:
        try:
            return os.fdopen(os.dup(0), "rb", buffering=0)
        except OSError:
            raise UsageError("--input=-: there is no standard input; give files") from None
    return open(source.path, "rb", buffering=0)


def _whole_lines(blocks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Blocks of any size made into chunks of about `size` that end with a line; a fault comes after all whole lines."""
    held: list[bytes] = []
    bytes_held = 0
    fault = None
    try:
        for block in blocks:
            held.append(block)
            bytes_held += len(block)
            cut = block.rfind(b"\n") + 1
            if bytes_held >= size and cut:
                held[-1] = block[:cut]
                yield b"".join(held)
                held, bytes_held = [block[cut:]], len(block) - cut
            elif bytes_held > LONGEST_LINE:
                raise Damaged(TOO_LONG)
    except Damaged as damage:
        fault = damage
    rest = b"".join(held)
    if fault:
        rest = rest[: rest.rfind(b"\n") + 1]
    if rest:
        yield rest
    if fault:
        raise fault


def _blocks(raw: Any) -> Iterator[bytes]:
    while block := raw.read(1 << 20):
        yield block


def _inflate(raw: Any, decoder: Callable[[], Any], faults: tuple[Any, ...], what: str) -> Iterator[bytes]:
    """All members of a compressed file. Raises Damaged where it is cut off or broken."""
    current, open_member = decoder(), False
    empty, padded = True, False
    while block := raw.read(BLOCK):
        empty = False
        if padded and not open_member:
            block = block.lstrip(b"\0")
        while block:
            try:
                text = current.decompress(block)
            except faults as error:
                raise Damaged(f"is damaged: its {what} data can't be decompressed further ({error})") from None
            open_member, block = True, b""
            if current.eof:
                # Padding with zeros may follow a member (gzip manual, "Advanced usage").
                block, padded = current.unused_data.lstrip(b"\0"), True
                current, open_member = decoder(), False
            if text:
                yield text
    if open_member or empty:
        raise Damaged(f"is truncated: its {what} data ends before its end mark")


def _gzip(raw: Any) -> Iterator[bytes]:
    try:
        from isal import isal_zlib

        return _inflate(raw, lambda: isal_zlib.decompressobj(31), (isal_zlib.error, zlib.error, EOFError), "gzip")
    except ImportError:
        return _inflate(raw, lambda: zlib.decompressobj(31), (zlib.error, EOFError), "gzip")


def _zstd(raw: Any) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise UsageError("--input: reading .zst files needs zstandard: pip install zstandard") from None
    # Windows of up to 2 GiB: what `zstd --long=31` writes.
    decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return _inflate(raw, decoder.decompressobj, (zstandard.ZstdError,), "zstd")


def _text(source: Source, position: int, _: str, size: int) -> Iterator[Part]:
    from megatron_rocm.data.corpus import not_text, pieces

    fault = not_text(Path(source.path))
    if fault:
        raise Damaged(fault)
    held: list[str] = []
    begin = position
    for piece in pieces(Path(source.path), FOLDER_PIECE if source.optional else FILE_PIECE, position):
        held.append(piece.decode("utf-8-sig" if not position else "utf-8"))
        position += len(piece)
        if position - begin >= size:
            yield held, position, position
            held, begin = [], position
    if held:
        yield held, position, position


def _parquet(source: Source, position: int, column: str, size: int) -> Iterator[Part]:
    import pyarrow as arrow

    table = _open_parquet(source.path)
    if column not in table.schema_arrow.names:
        raise Damaged(f"has no column `{column}`; it has {', '.join(table.schema_arrow.names[:20])}")
    end = table.metadata.num_rows if source.end is None else source.end
    row = 0
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        first, row = row, row + group.num_rows
        if row <= position or first >= end or not group.num_rows:
            continue
        sizes = (group.column(at) for at in range(group.num_columns))
        held = sum(one.total_uncompressed_size for one in sizes if one.path_in_schema.split(".")[0] == column)
        rows = max(1, min(group.num_rows, size * group.num_rows // max(held, 1)))
        try:
            for batch in table.iter_batches(rows, row_groups=[number], columns=[column]):
                skip = max(position - first, 0)
                first += len(batch)
                if skip < len(batch):
                    yield batch.column(0).slice(skip).to_pylist(), first, source.size * first // max(end, 1)
        except (arrow.ArrowException, OSError) as error:
            raise Damaged(f"is damaged in row group {number}: {error}") from None


def _open_parquet(path: str) -> Any:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UsageError(f"--input={path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (arrow.ArrowException, OSError) as error:
        raise Damaged(f"is no whole Parquet file: {error}") from None


def _row_groups(path: str) -> tuple[list[int], list[float]]:
    """The first row of each row group and the number of rows, and where each group's middle lies, from 0 to 1."""
    try:
        metadata = _open_parquet(path).metadata
    except Damaged as damage:
        raise UsageError(f"--input={path}: {damage}. Get the file again") from None
    rows = [0]
    for number in range(metadata.num_row_groups):
        rows.append(rows[-1] + metadata.row_group(number).num_rows)
    middles = [(low + high) / 2 / max(rows[-1], 1) for low, high in zip(rows[:-1], rows[1:], strict=True)]
    return rows, middles


READERS: dict[str, Callable[[Source, int, str, int], Iterator[Part]]] = {
    "lines": _lines,
    "gzip": _stream,
    "zstd": _stream,
    "stdin": _stream,
    "parquet": _parquet,
    "text": _text,
}
DECODERS: dict[str, Callable[[Any], Iterator[bytes]]] = {"gzip": _gzip, "zstd": _zstd, "stdin": _blocks}


@functools.lru_cache(maxsize=8)
def lines_before(source: Source, position: int) -> int:
    """How many lines (rows, for Parquet) of the whole file come before `position`: found by reading it again."""
    if not position or source.kind in ("parquet", "text"):
        return position
    counted = 0
    whole = replace(source, start=0, end=None)
    for payload, at, _ in READERS[source.kind](whole, 0, "", CHUNK):
        assert isinstance(payload, bytes)
        if at >= position:
            return counted + line_ends(payload[: len(payload) - (at - position)])
        counted += line_ends(payload)
    return counted
