"""A MediaWiki XML dump to JSON Lines, as a stream, on all CPUs, and from where it stood after a kill.

The format is that of https://www.mediawiki.org/xml/export-0.11.xsd.
"""

from __future__ import annotations

import bz2
import json
import os
import time
import urllib.parse
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any
from xml.parsers import expat

from megatron_rocm.data.wikitext import plain
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import sync_folder

READ, BLOCK = 1 << 18, 1 << 20  # compressed and plain bytes at a time
BATCH = 1 << 20  # characters of markup for a worker at a time
SAVE_EVERY = 10.0  # seconds
SHOWING_NOTHING = ("6", "14")  # the namespaces File and Category
ALWAYS_HIDDEN = ("file", "image", "category", "media")
LEFT_OUT = ("redirects", "of other namespaces", "not wikitext", "without text", "unreadable")
STATE_FORMAT = 1


@dataclass
class Counts:
    """What became of a dump's pages."""

    articles: int = 0
    text_bytes: int = 0
    left_out: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LEFT_OUT, 0))


@dataclass(frozen=True)
class Site:
    """`base` is the address that titles are appended to; `hidden` the words for File and Category, lower case."""

    base: str = ""
    hidden: tuple[str, ...] = ALWAYS_HIDDEN


@dataclass(frozen=True)
class _Place:
    """A point between two pages: a byte at which a bz2 stream (or the file) begins, and the pages after it."""

    byte: int
    pages: int


def extract(source: Path, output: Path, workers: int) -> Counts:
    """Write the articles of `source` (.xml.bz2 or .xml) to `output`, which appears when it is whole.

    Raises UsageError for a dump that is truncated or damaged, and where the disk is full.
    """
    partial = output.with_name(f"{output.name}.partial")
    notes = output.with_name(f"{output.name}.partial.json")
    stamp = [STATE_FORMAT, source.name, source.stat().st_size]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as out, open(source, "rb") as file:
            _hold(out, output)
            if output.exists():
                partial.unlink()
                return Counts()
            run = _Extraction(file, source, out, notes, stamp)
            counts = run.all(workers)
            os.replace(partial, output)
    except OSError as error:
        raise UsageError(
            f"{output}: can't be written ({error.strerror}). Check space and permissions; the same command then goes "
            "on where it stood"
        ) from None
    except BrokenProcessPool:
        raise UsageError(
            f"{output}: a worker was killed, most likely for lack of memory. Give fewer --workers; the same command "
            "then goes on where it stood"
        ) from None
    notes.unlink(missing_ok=True)
    sync_folder(output.parent)
    return counts


def _hold(out: IO[bytes], output: Path) -> None:
    import fcntl

    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{output}: another process is writing it. Wait for that one") from None
    except OSError:
        pass  # a file system without locks


class _Extraction:
    def __init__(self, file: IO[bytes], source: Path, out: IO[bytes], notes: Path, stamp: list[Any]) -> None:
        self._file, self._source, self._out, self._notes, self._stamp = file, source, out, notes, stamp
        self._place, self._site, self._counts, written = _Place(0, 0), Site(), Counts(), 0
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(notes.read_bytes())
            if state["stamp"] == stamp and state["written"] <= out.tell():
                self._place, self._counts = _Place(**state["place"]), Counts(**state["counts"])
                self._site = Site(state["site"]["base"], tuple(state["site"]["hidden"]))
                written = state["written"]
        out.truncate(written)
        self._written = written

    def all(self, workers: int) -> Counts:
        saved = time.monotonic()
        running: deque[tuple[_Place, Future[tuple[bytes, Counts]]]] = deque()
        with ProcessPoolExecutor(workers) as pool:
            try:
                for batch, place in self._batches():
                    running.append((place, pool.submit(_lines, batch, self._site)))
                    if len(running) > 2 * workers:
                        self._write(*running.popleft())
                    if time.monotonic() - saved > SAVE_EVERY:
                        self._save()
                        saved = time.monotonic()
                while running:
                    self._write(*running.popleft())
            finally:
                pool.shutdown(cancel_futures=True)
        self._out.flush()
        os.fsync(self._out.fileno())
        return self._counts

    def _write(self, place: _Place, future: Future[tuple[bytes, Counts]]) -> None:
        lines, counts = future.result()
        self._out.write(lines)
        self._written += len(lines)
        self._counts.articles += counts.articles
        self._counts.text_bytes += counts.text_bytes
        for what, number in counts.left_out.items():
            self._counts.left_out[what] += number
        self._place = place

    def _save(self) -> None:
        self._out.flush()
        os.fsync(self._out.fileno())
        state = {
            "stamp": self._stamp,
            "place": asdict(self._place),
            "written": self._written,
            "counts": asdict(self._counts),
            "site": asdict(self._site),
        }
        fresh = self._notes.with_name(f"{self._notes.name}.new")
        fresh.write_text(json.dumps(state) + "\n")
        os.replace(fresh, self._notes)
        done = 100 * self._file.tell() / self._stamp[2]
        print(
            f"  {self._counts.articles:,} articles, {self._written / 1e6:,.0f} MB written, {done:.1f} % read",
            flush=True,
        )

    def _batches(self) -> Iterator[tuple[list[dict[str, str]], _Place]]:
        """Pages from self._place on, and the place after each batch."""
        byte, passed, skip = self._place.byte, 0, self._place.pages
        xml = _Xml(begun=byte > 0)
        batch: list[dict[str, str]] = []
        size = 0
        tail = b""
        try:
            for block, boundary in _blocks(self._file, byte, self._source.suffix == ".bz2"):
                tail = (tail + block)[-64:]
                xml.feed(block)
                if xml.site is not None:
                    self._site, xml.site = xml.site, None
                for page in xml.take():
                    passed += 1
                    if passed <= skip:
                        continue
                    batch.append(page)
                    size += len(page["text"])
                    if size > BATCH:
                        yield batch, _Place(byte, passed)
                        batch, size = [], 0
                # A dump that was compressed in pieces of equal size has streams that end amid a page.
                if boundary is not None and tail.rstrip().endswith((b"</page>", b"</siteinfo>")):
                    if batch:
                        yield batch, _Place(boundary, 0)
                        batch, size = [], 0
                    byte, passed, skip = boundary, 0, 0
            xml.close()
        except (expat.ExpatError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UsageError(
                f"{self._source}: is damaged or truncated, near byte {self._file.tell():,}: {error}. Remove it, and "
                "run the same command again"
            ) from None
        if batch:
            yield batch, _Place(byte, passed)


def _blocks(file: IO[bytes], at: int, compressed: bool) -> Iterator[tuple[bytes, int | None]]:
    """Plain blocks from byte `at` on; at the end of a bz2 stream, an empty one and where the next stream begins."""
    file.seek(at)
    if not compressed:
        while block := file.read(BLOCK):
            yield block, None
        return
    rest = b""
    while True:
        rest = rest or file.read(READ)
        if not rest:
            return
        stream = bz2.BZ2Decompressor()
        while not stream.eof:
            if stream.needs_input and not rest and not (rest := file.read(READ)):
                raise EOFError("it ends amid a bz2 stream")
            block = stream.decompress(rest, BLOCK)
            rest = b""
            if block:
                yield block, None
        rest = stream.unused_data
        yield b"", file.tell() - len(rest)


class _Xml:
    """Pages from the XML as it comes in. `begun`: what is fed starts after the root element's start."""

    def __init__(self, begun: bool) -> None:
        self.site: Site | None = None
        self._pages: list[dict[str, str]] = []
        self._page: dict[str, str] = {}
        self._path: list[str] = []
        self._words: list[str] | None = None
        self._base = ""
        self._hidden = list(ALWAYS_HIDDEN)
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters
        if begun:
            self._parser.Parse(b"<mediawiki>")

    def feed(self, block: bytes) -> None:
        self._parser.Parse(block)

    def close(self) -> None:
        self._parser.Parse(b"", True)

    def take(self) -> list[dict[str, str]]:
        taken, self._pages = self._pages, []
        return taken

    # Element → the page's field that its text becomes; an element of the same name elsewhere is something else.
    FIELDS = {
        ("page", "title"): "title",
        ("page", "ns"): "ns",
        ("page", "id"): "id",
        ("page", "revision", "model"): "model",
        ("page", "revision", "text"): "text",
    }

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._path.append(name)
        where = tuple(self._path[1:])
        if where == ("page",):
            self._page = {}
        elif where == ("page", "redirect"):
            self._page["redirect"] = attributes.get("title", "")
        elif where == ("siteinfo", "namespaces", "namespace"):
            self._words = [] if attributes.get("key") in SHOWING_NOTHING else None
        elif where in self.FIELDS or where == ("siteinfo", "base"):
            self._words = []

    def _end(self, name: str) -> None:
        where = tuple(self._path[1:])
        self._path.pop()
        text = "".join(self._words) if self._words is not None else None
        if where in self.FIELDS and text is not None:
            self._page[self.FIELDS[where]] = text
        elif where == ("siteinfo", "base") and text is not None:
            self._base = text.rsplit("/", 1)[0] + "/"
        elif where == ("siteinfo", "namespaces", "namespace") and text:
            self._hidden.append(text.lower())
        elif where == ("siteinfo",):
            self.site = Site(self._base, tuple(self._hidden))
        elif where == ("page",):
            self._pages.append({"text": "", **self._page})
        if where in self.FIELDS or where[:1] == ("siteinfo",):
            self._words = None

    def _characters(self, text: str) -> None:
        if self._words is not None:
            self._words.append(text)


def _lines(pages: list[dict[str, str]], site: Site) -> tuple[bytes, Counts]:
    """The lines of a batch of pages; runs in a worker."""
    counts = Counts()
    lines = []
    for page in pages:
        title = page.get("title", "")
        left_out = _not_an_article(page)
        if left_out is None:
            try:
                text = plain(page["text"], site.hidden)
                left_out = None if text else "without text"
            except ValueError:
                left_out = "unreadable"
        if left_out is not None:
            counts.left_out[left_out] += 1
            continue
        url = site.base + urllib.parse.quote(title.replace(" ", "_"), safe="/:@!$*(),;~'")
        line = {"id": page.get("id", ""), "url": url, "title": title, "text": text}
        lines.append(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        counts.articles += 1
        counts.text_bytes += len(text.encode())
    return b"".join(lines), counts


def _not_an_article(page: dict[str, str]) -> str | None:
    if page.get("ns") != "0":
        return "of other namespaces"
    if "redirect" in page:
        return "redirects"
    return None if page.get("model", "wikitext") == "wikitext" else "not wikitext"
