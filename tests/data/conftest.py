from __future__ import annotations

import http.server
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from web import Web

from megatron_rocm.data.indexed import IndexedWriter
from megatron_rocm.data.tokenizer import TokenizerInfo, train_bpe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A Hugging Face hub small enough for a test: open/tokenizer, gated/…, and nothing else.

    Serves the files of `folder` as the repository open/tokenizer; remembers the requests' Authorization.
    """

    def __init__(self, folder: Path) -> None:
        hub = self
        self.tokens: set[str | None] = set()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.tokens.add(self.headers.get("Authorization"))
                parts = self.path.strip("/").split("/")
                if parts[0] == "gated":
                    return self.answer(403, {"X-Error-Code": "GatedRepo"}, b"")
                if parts[0] != "open":
                    return self.answer(404, {"X-Error-Code": "RepoNotFound"}, b"")
                file = folder / parts[-1]
                if not file.is_file():
                    return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
                self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{file.name}"'}, file.read_bytes())

            do_GET = do_HEAD

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="session")
def text() -> str:
    """What the tokenizer `bpe` was trained on."""
    return "Ünïcode, 日本\n" + Path(__file__).read_text()


@pytest.fixture(scope="session")
def bpe(tmp_path_factory, text) -> TokenizerInfo:
    """A trained tokenizer of 320 ids."""
    return train_bpe([text], 320, tmp_path_factory.mktemp("tokenizer") / "bpe")


@pytest.fixture(scope="session")
def hub(bpe):
    """A running hub with `bpe` as open/tokenizer."""
    hub = Hub(Path(bpe.model))
    yield hub
    hub.close()


@pytest.fixture
def write_data():
    """Write documents (lists of ids) as PREFIX.bin/.idx; `tokenizer` adds the sidecar that `prepare` would write."""

    def write(prefix, documents, vocab_size=320, tokenizer=None):
        with IndexedWriter(prefix, vocab_size) as writer:
            for document in documents:
                writer.add(np.array(document, np.uint32), np.array([len(document)]))
            sidecar = None
            if tokenizer is not None:
                sidecar = {
                    "format": 1,
                    "tokenizer": asdict(tokenizer),
                    "documents": writer.documents,
                    "tokens": writer.tokens,
                    "bytes": 0,
                    "source": {},
                }
            writer.finalize(sidecar)
        return str(prefix)

    return write


@pytest.fixture
def web():
    """A running web server that fails as it is told; its `pages` are empty."""
    web = Web()
    yield web
    web.close()
