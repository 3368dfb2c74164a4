"""A web server that serves bytes and, as it is told, fails in the ways that servers fail."""

from __future__ import annotations

import http.server
import re
import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Page:
    """One address. `faults` are taken up one a request; when they are used up the page is served well.

    A fault is a status (503), or a dict of: cut (bytes after which the connection ends), stall (… after which nothing
    more comes), status, headers, body (instead of the content), whole (a range is ignored), shift (a range begins so
    many bytes too late), chunked, nameless (no length at all).
    """

    content: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"1"'})
    faults: list[int | dict[str, Any]] = field(default_factory=list)


class Web:
    """Serves `pages` by path (a Page, or a function of the request handler) and remembers every request."""

    def __init__(self) -> None:
        self.pages: dict[str, Any] = {}
        self.otherwise: Any = None
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        self._closed = threading.Event()
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web.requests.append((self.command, self.path, dict(self.headers)))
                page = web.pages.get(self.path.partition("?")[0], web.otherwise)
                if callable(page):
                    page(self)
                elif page is None:
                    self.reply(404, {}, b"no such page")
                else:
                    web._serve(self, page)

            do_HEAD = do_POST = do_GET

            def reply(self, status: int, headers: dict[str, str], body: bytes, sent: int | None = None) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[:sent])
                self.close_connection = sent is not None

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def put(self, path: str, content: bytes, *faults: int | dict[str, Any], **headers: str) -> Page:
        self.pages[path] = Page(content, headers or {"ETag": '"1"'}, list(faults))
        return self.pages[path]

    def ranges(self, path: str) -> list[str | None]:
        """The Range of each request for `path`."""
        return [headers.get("Range") for _, asked, headers in self.requests if asked.partition("?")[0] == path]

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: Any, page: Page) -> None:
        fault = page.faults.pop(0) if page.faults else {}
        if isinstance(fault, int):
            fault = {"status": fault}
        headers = {**page.headers, **fault.get("headers", {})}
        if "status" in fault:
            return handler.reply(fault["status"], headers, b"")
        content = fault.get("body", page.content)
        first, status = self._first(handler, page, fault), 200
        if first is not None:
            status = 206
            first += fault.get("shift", 0)
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            if first >= len(content):
                return handler.reply(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
        body = content[first or 0 :]
        handler.send_response(status)
        headers.update({} if "nameless" in fault else {"Content-Length": str(len(body))})
        if "chunked" in fault:
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = "chunked"
            body = b"%x\r\n%b\r\n" % (len(body), body) + b"0\r\n\r\n"
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return None
        handler.wfile.write(body[: fault.get("cut", fault.get("stall"))])
        if "stall" in fault:
            handler.wfile.flush()
            self._closed.wait(30)
        if {"cut", "stall", "nameless"} & set(fault):
            handler.close_connection = True

    @staticmethod
    def _first(handler: Any, page: Page, fault: dict[str, Any]) -> int | None:
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "")
        since = handler.headers.get("If-Range")
        unchanged = since is None or since in (page.headers.get("ETag"), page.headers.get("Last-Modified"))
        return int(asked[1]) if asked and unchanged and "whole" not in fault else None
