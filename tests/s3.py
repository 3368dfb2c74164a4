"""A real S3 server process (moto) on loopback, behind a proxy that makes it fail on request."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from support import free_port

SECRET = "s3cr3t-key-that-no-log-may-show"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "checkpoints"


@dataclass
class Fault:
    """What happens to requests whose `METHOD path?query` matches: `times` of them, then it is over.

    `does`: a status with which they are refused, `cut` (the connection breaks in the middle of the body), `cut answer`,
    `hang` (no answer until the fault is lifted, and then the connection breaks), or `slow` (a second each).
    """

    pattern: str
    does: int | str
    times: float = float("inf")
    met: int = 0


@dataclass
class S3:
    """The server's address as a client sees it, what it was asked for, and the faults that are in force."""

    port: int
    behind: int
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def fails(self, pattern: str, does: int | str, times: float = float("inf")) -> Fault:
        self.faults.append(Fault(pattern, does, times))
        return self.faults[-1]

    def heal(self) -> None:
        self.faults.clear()

    def fault_of(self, request: str) -> Fault | None:
        self.requests.append(request)
        for fault in self.faults:
            if fault.met < fault.times and re.search(fault.pattern, request):
                fault.met += 1
                return fault
        return None


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    """Its first true answer; fails where none comes in time."""
    end = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return answer


@contextlib.contextmanager
def server() -> Iterator[S3]:
    """Run both, with BUCKET made."""
    behind = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(behind)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **CREDENTIALS},
    )
    proxy = None
    try:
        wait_for(lambda: _answers(behind) or process.poll())
        request = urllib.request.Request(f"http://127.0.0.1:{behind}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request).close()
        proxy = _Proxy(("127.0.0.1", 0), _Handler)
        proxy.s3 = S3(proxy.server_address[1], behind)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy.s3
    finally:
        if proxy:
            proxy.s3.heal()
            proxy.shutdown()
            proxy.server_close()
        process.kill()
        process.wait()


def fixture() -> Any:
    """A pytest fixture of one server for a file of tests; each test gets it whole and with its environment set."""

    @pytest.fixture(scope="module")
    def running_s3() -> Iterator[S3]:
        with server() as s3:
            yield s3

    @pytest.fixture
    def s3(running_s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
        running_s3.requests.clear()
        for name, value in running_s3.environment.items():
            monkeypatch.setenv(name, value)
        yield running_s3
        running_s3.heal()

    return running_s3, s3


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=1).close()
        return True
    return False


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    s3: S3

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is nothing to tell of."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def log_message(self, *_: Any) -> None:
        pass

    def _relay(self) -> None:
        s3, length = self.server.s3, int(self.headers.get("Content-Length", 0))
        fault = s3.fault_of(f"{self.command} {self.path}")
        does = fault.does if fault else ""
        if does == "cut":
            self.rfile.read(length // 2)
            return self._break()
        body = self.rfile.read(length)
        if isinstance(does, int):
            return self._refuse(does)
        if does == "slow":
            time.sleep(1)
        if does == "hang":
            while fault in s3.faults:
                time.sleep(0.05)
            return self._break()
        back = http.client.HTTPConnection("127.0.0.1", s3.behind)
        back.request(self.command, self.path, body, dict(self.headers))
        answer = back.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(content)))
        self.end_headers()
        if does == "cut answer":
            self.wfile.write(content[: len(content) // 2])
            return self._break()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _relay  # noqa: N815

    def _refuse(self, status: int) -> None:
        code = {403: "QuotaExceeded", 500: "InternalError", 507: "InsufficientStorage"}[status]
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} says the proxy</Message></Error>"
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def _break(self) -> None:
        """Reset the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


if __name__ == "__main__":  # run a command with the server: python tests/s3.py COMMAND …
    with server() as running:
        sys.exit(subprocess.run(sys.argv[1:], env={**os.environ, **running.environment}).returncode)
