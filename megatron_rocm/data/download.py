"""One file over HTTP, whole or not at all: goes on where it stood, waits out a bad server, checks what arrived.

While a download runs, PATH.partial grows beside a PATH.partial.json that says which version of the file it is a part
of; PATH itself appears when every byte is there and the checksum, if one is known, is right.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

from megatron_rocm import __version__
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import sync_folder

BLOCK = 1 << 20
SAY_EVERY = 10.0  # seconds
RETRIED = {408, 425, 429, 500, 502, 503, 504}
GONE = (404, 410)
EXPLANATIONS: dict[int, str] = {
    **dict.fromkeys((401, 403), "access is refused. A gated or private file needs HF_TOKEN, and its licence accepted"),
    **dict.fromkeys(GONE, "there is no such file. Check the name, the date or the revision"),
}
T = TypeVar("T")


class NotThere(UsageError):
    """The server says that it has no such file."""


@dataclass(frozen=True)
class Patience:
    """How long a bad server is borne with. Waits double from `first_wait` to `longest_wait`, in seconds.

    `attempts` is the number in a row that bring no byte; before the first byte of all it is `first_attempts`, because
    a machine without a network should hear so soon. `stall` is the time without a byte after which a connection is
    given up.
    """

    stall: float = 60.0
    attempts: int = 9
    first_attempts: int = 4
    first_wait: float = 1.0
    longest_wait: float = 60.0


PATIENCE = Patience()


class _Retry(Exception):
    """Something that time may mend. `after` is the wait that the server asked for, in seconds."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class _SameHost(urllib.request.HTTPRedirectHandler):
    """A token is for the host it was given to: the hub sends its large files from another one."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        old_place, place = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if new is not None and (old_place.scheme, old_place.netloc) != (place.scheme, place.netloc):
            new.remove_header("Authorization")
        return new


def download(
    url: str,
    path: str | Path,
    *,
    size: int | None = None,
    digest: str | None = None,
    headers: Mapping[str, str] | None = None,
    patience: Patience = PATIENCE,
) -> bool:
    """Have the file at `url` as `path`; False where it already was.

    `size` in bytes and `digest` ("sha256:…", "sha1:…", "md5:…") are checked where given. A `path` that is there is
    taken for whole if its size is right; `verify` reads it again. Raises UsageError where the server refuses, stays
    away, or has another file, and where the disk is full; what arrived is kept for the next call, unless it is wrong.
    """
    path = Path(path)
    if path.exists():
        if size is not None and path.stat().st_size != size:
            raise UsageError(
                f"{path}: has {path.stat().st_size:,} bytes, {url} has {size:,}. It was made by something else: move it"
            )
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _Partial(path, url, size, digest, headers or {}, patience) as partial:
            # Another process may have finished it while this one came to the lock.
            if path.exists():
                return False
            partial.fill()
            partial.finish()
    except OSError as error:
        way_out = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Check the folder's permissions"
        raise UsageError(
            f"{path}: can't be written ({error.strerror}). {way_out}; the same command then goes on where it stood"
        ) from None
    return True


def verify(path: str | Path, digest: str) -> None:
    """Raise UsageError unless the file's bytes have this "algorithm:hex" digest."""
    algorithm, _, expected = digest.partition(":")
    hasher = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            hasher.update(block)
    if hasher.hexdigest() != expected:
        raise UsageError(
            f"{path}: is damaged, its {algorithm} is {hasher.hexdigest()} and not {expected}. Remove it, and run the "
            "same command again"
        )


def read(
    url: str, *, headers: Mapping[str, str] | None = None, patience: Patience = PATIENCE, limit: int = 1 << 26
) -> bytes:
    """A small file's bytes, with the patience of `download`. Raises UsageError likewise."""

    def once() -> bytes:
        with _open(url, headers or {}, patience.stall) as response:
            try:
                whole = response.read(limit + 1)
            except (OSError, http.client.HTTPException) as error:
                raise _Retry(_reason(error)) from None
            if len(whole) > limit:
                raise UsageError(f"{url}: has more than {limit:,} bytes, which is not what was looked for")
            # http.client raises IncompleteRead only where it was asked for all that there is.
            if response.length:
                raise _Retry(f"the answer ended {response.length:,} bytes early")
        return whole

    return _patiently(url, once, lambda: 0, patience)


def _patiently(url: str, once: Callable[[], T], position: Callable[[], int], patience: Patience) -> T:
    """Call `once` until it does not raise _Retry, or too often without a change of `position`."""
    failures, moved, before = 0, False, position()
    while True:
        try:
            return once()
        except _Retry as retry:
            if (now := position()) != before:
                failures, moved, before = 0, True, now
            failures += 1
            if failures >= (patience.attempts if moved else patience.first_attempts):
                raise UsageError(
                    f"{url}: gave up after {failures} attempts: {retry}. Check the network and the proxy; the same "
                    "command goes on where this one stood"
                ) from None
            wait = min(patience.first_wait * 2 ** (failures - 1), patience.longest_wait)
            # Many machines that lost one server come back at different moments.
            wait = max(min(retry.after, patience.longest_wait), wait * random.uniform(0.5, 1.0))
            print(f"  {url}: {retry}; again in {wait:.0f} s", flush=True)
            time.sleep(wait)


def _open(url: str, headers: Mapping[str, str], stall: float) -> http.client.HTTPResponse:
    sent = {"User-Agent": f"megatron-rocm/{__version__}", "Accept-Encoding": "identity", **headers}
    try:
        request = urllib.request.Request(url, headers=sent)
        return urllib.request.build_opener(_SameHost).open(request, timeout=stall)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in RETRIED:
            asked = error.headers.get("Retry-After") or ""
            raise _Retry(f"HTTP {error.code}", float(asked) if asked.isdecimal() else 0.0) from None
        if error.code == 416:
            raise _Beyond(error.headers.get("Content-Range") or "") from None
        what = EXPLANATIONS.get(error.code, "the server does not give it. Open the address in a browser")
        raise (NotThere if error.code in GONE else UsageError)(f"{url}: HTTP {error.code}: {what}") from None
    except ValueError as error:
        raise UsageError(f"{url}: is not an address ({error})") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise UsageError(
                f"{url}: the server's certificate is not trusted ({reason.verify_message}). "
                "Name your proxy's certificates in SSL_CERT_FILE"
            ) from None
        raise _Retry(_reason(error)) from None


class _Beyond(Exception):
    """HTTP 416: nothing from there on. The argument is the answer's Content-Range."""


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", error)
    if isinstance(inner, TimeoutError):
        return "no byte came for too long"
    return str(inner) or type(inner).__name__


def _validator(response: http.client.HTTPResponse) -> str | None:
    """What names this version of the file; a weak ETag does not, it promises equal meaning, not equal bytes."""
    etag = response.headers.get("ETag") or ""
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


class _Partial:
    """PATH.partial, held by this process alone, and what is known of the file that it is the beginning of."""

    def __init__(
        self,
        path: Path,
        url: str,
        size: int | None,
        digest: str | None,
        headers: Mapping[str, str],
        patience: Patience,
    ) -> None:
        self._path, self._url, self._headers, self._patience = path, url, headers, patience
        self._partial = path.with_name(f"{path.name}.partial")
        self._notes = path.with_name(f"{path.name}.partial.json")
        self._expected, self._digest = size, digest
        self._size = size
        self._validator: str | None = None
        self._pieces = 0  # answers that the bytes came in

    def __enter__(self) -> _Partial:
        self._file: IO[bytes] = open(self._partial, "ab")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UsageError(f"{self._path}: another process is downloading it. Wait for that one") from None
        except OSError:
            pass  # a file system without locks
        self._at = self._file.tell()
        with suppress(OSError, ValueError, KeyError, TypeError):
            notes = json.loads(self._notes.read_bytes())
            if notes["url"] == self._url and self._expected in (None, notes["size"]):
                self._validator, self._size = notes["validator"], notes["size"]
                self._pieces = int(self._at > 0)
        if not self._pieces:
            self._restart()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._at == 0:
            self._partial.unlink(missing_ok=True)
            self._notes.unlink(missing_ok=True)

    def fill(self) -> None:
        """Have all bytes, with the right checksum, in the partial file."""
        while True:
            _patiently(self._url, self._receive, lambda: self._at, self._patience)
            if self._digest is None:
                return
            try:
                verify(self._partial, self._digest)
                return
            except UsageError as error:
                joined = self._pieces > 1
                self._restart()
                if not joined:
                    said = str(error).split(": ", 1)[1].split(". ")[0]
                    raise UsageError(
                        f"{self._url}: what arrived {said}. The file there is not the one that was announced: try "
                        "again later, or another mirror"
                    ) from None
            # The parts were of two files, or the disk lost some of them: all of it again, once.
            print(f"  {self._url}: its parts don't fit together; from the beginning again", flush=True)

    def finish(self) -> None:
        os.fsync(self._file.fileno())
        os.replace(self._partial, self._path)
        self._notes.unlink(missing_ok=True)
        sync_folder(self._path.parent)

    def _restart(self) -> None:
        self._file.truncate(0)
        self._at, self._pieces = 0, 0
        self._validator, self._size = None, self._expected

    def _receive(self) -> None:
        """One request for what is missing."""
        if self._at and self._at == self._size:
            return
        # Without either, two versions could be joined and nobody would know.
        if self._at and not (self._validator or self._digest):
            self._restart()
        headers = dict(self._headers)
        if self._at:
            headers["Range"] = f"bytes={self._at}-"
            if self._validator:
                headers["If-Range"] = self._validator
        try:
            response = _open(self._url, headers, self._patience.stall)
        except _Beyond as beyond:
            self._restart()
            raise _Retry(f"the part is not of the file there ({beyond})") from None
        with response:
            self._begin(response)
            self._copy(response)

    def _begin(self, response: http.client.HTTPResponse) -> None:
        """Make sure that the answer's bytes belong after those that are there, or begin anew."""
        length = response.headers.get("Content-Length") or ""
        if response.status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range") or "")
            same = found and int(found[1]) == self._at and found[2] in ("*", str(self._size or found[2]))
            if not same or (self._validator and _validator(response) not in (None, self._validator)):
                self._restart()
                raise _Retry("the server sent a part of something else")
            if found and found[2] != "*":
                self._size = int(found[2])
        else:
            if self._at:
                print(f"  {self._url}: has changed, or can't be had in parts; from the beginning", flush=True)
                self._restart()
            self._size = int(length) if length.isdecimal() else self._expected
            if self._expected is not None and self._size != self._expected:
                raise UsageError(
                    f"{self._url}: the server has {self._size:,} bytes where {self._expected:,} were announced. It is "
                    "not that file, or a proxy answers in its place"
                )
            if self._size is None and self._digest is None and not response.chunked:
                raise UsageError(f"{self._url}: the server does not tell the size, so a cut would go unseen")
            self._remember(response)
        self._pieces += 1
        missing = (self._size or 0) - self._at
        free = shutil.disk_usage(self._path.parent).free
        if missing > free:
            raise UsageError(
                f"{self._path}: {missing / 1e9:,.1f} GB are still to come and {free / 1e9:,.1f} GB are free there"
            )

    def _remember(self, response: http.client.HTTPResponse) -> None:
        self._validator = _validator(response)
        notes = {"url": self._url, "validator": self._validator, "size": self._size}
        self._notes.write_text(json.dumps(notes) + "\n")

    def _copy(self, response: http.client.HTTPResponse) -> None:
        began = said = time.monotonic()
        first = self._at
        while True:
            try:
                block = response.read1(BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise _Retry(_reason(error)) from None
            if not block:
                break
            self._file.write(block)
            self._file.flush()  # after a kill, too, it is there
            self._at += len(block)
            if self._size is not None and self._at > self._size:
                self._restart()
                raise _Retry(f"more than the {self._size or 0:,} bytes that were announced came")
            if (now := time.monotonic()) - said > SAY_EVERY:
                said = now
                print(self._progress((self._at - first) / (now - began)), flush=True)
        if self._size is not None and self._at < self._size:
            raise _Retry(f"the answer ended at byte {self._at:,} of {self._size:,}")

    def _progress(self, speed: float) -> str:
        line = f"  {self._path.name}: {self._at / 1e6:,.0f}"
        if self._size is None:
            return f"{line} MB, {speed / 1e6:.1f} MB/s"
        minutes = (self._size - self._at) / max(speed, 1.0) / 60
        return f"{line} of {self._size / 1e6:,.0f} MB, {speed / 1e6:.1f} MB/s, {minutes:,.0f} min left"
