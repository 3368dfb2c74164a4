from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_rocm.data import download as module
from megatron_rocm.data.download import NotThere, Patience, download, read, verify
from megatron_rocm.errors import UsageError

CONTENT = random.Random(1).randbytes(300_000)
SHA1 = f"sha1:{hashlib.sha1(CONTENT).hexdigest()}"
SOON = Patience(stall=2, attempts=4, first_attempts=3, first_wait=0.01, longest_wait=0.02)


@pytest.fixture
def get(web, tmp_path):
    """Download /file into tmp_path/file; what is asked for may be said."""

    def get(**said):
        return download(f"{web.url}/file", tmp_path / "file", **{"patience": SOON, **said})

    return get


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_whole_file(web, get, tmp_path):
    web.put("/file", CONTENT)
    assert get(size=len(CONTENT), digest=SHA1) is True
    assert (tmp_path / "file").read_bytes() == CONTENT and names(tmp_path) == ["file"]
    assert get(size=len(CONTENT)) is False and len(web.requests) == 1


def test_the_same_name_with_another_size_is_not_taken_for_it(web, get, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=f"has 4 bytes, {web.url}/file has 9.*move it"):
        get(size=9)
    assert (tmp_path / "file").read_text() == "mine"


def test_cuts_and_stalls_go_on_where_they_stopped(web, get, tmp_path, capsys):
    web.put("/file", CONTENT, {"cut": 100_000}, {"stall": 50_000}, {"cut": 1000}, 503, {"cut": 0})
    assert get(digest=SHA1)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert web.ranges("/file") == [None, *(f"bytes={at}-" for at in (100_000, 150_000, *[151_000] * 3))]
    said = capsys.readouterr().out
    assert "ended at byte 100,000 of 300,000; again in" in said and "no byte came for too long" in said


def test_many_short_answers_are_no_reason_to_give_up(web, get, tmp_path):
    web.put("/file", CONTENT, *[{"cut": 10_000}] * 20)
    assert get() and (tmp_path / "file").read_bytes() == CONTENT


def test_the_second_call_goes_on(web, get, tmp_path):
    page = web.put("/file", CONTENT, {"cut": 70_000}, *[503] * 4)
    with pytest.raises(UsageError, match="gave up after 4 attempts: HTTP 503.* goes on where this one stood"):
        get()
    assert names(tmp_path) == ["file.partial", "file.partial.json"]
    assert (tmp_path / "file.partial").read_bytes() == CONTENT[:70_000]
    page.faults.clear()
    assert get() and (tmp_path / "file").read_bytes() == CONTENT
    assert web.ranges("/file")[-1] == "bytes=70000-" and names(tmp_path) == ["file"]


def test_nothing_is_left_of_a_download_that_never_began(web, get, tmp_path):
    web.put("/file", CONTENT, *[503] * 3)
    with pytest.raises(UsageError, match="gave up after 3 attempts"):
        get()
    assert names(tmp_path) == []


@pytest.mark.parametrize("headers", [{"ETag": '"2"'}, {"ETag": 'W/"1"'}])
def test_a_file_that_changed_is_not_joined_to_its_old_beginning(web, get, tmp_path, headers):
    first = web.put("/file", b"x" * 300_000, {"cut": 100_000}, *[503] * 4, **{"ETag": '"1"'})
    with pytest.raises(UsageError):
        get()
    first.content, first.headers, first.faults = CONTENT, headers, []
    assert get() and (tmp_path / "file").read_bytes() == CONTENT


def test_without_etag_and_checksum_it_begins_anew(web, get, tmp_path):
    web.put("/file", CONTENT, {"cut": 100_000}, Server="bare")
    assert get() and (tmp_path / "file").read_bytes() == CONTENT
    assert web.ranges("/file") == [None, None]
    os.remove(tmp_path / "file")
    # With a checksum a wrong join would be seen.
    web.put("/file", CONTENT, {"cut": 100_000}, Server="bare")
    assert get(digest=SHA1) and web.ranges("/file")[-1] == "bytes=100000-"


def test_a_date_is_as_good_as_an_etag(web, get):
    web.put("/file", CONTENT, {"cut": 100_000}, **{"Last-Modified": "Sun, 22 Nov 2026 10:00:00 GMT"})
    assert get() and web.requests[-1][2]["If-Range"] == "Sun, 22 Nov 2026 10:00:00 GMT"


@pytest.mark.parametrize("fault", [{"whole": True}, {"shift": 7}, {"headers": {"ETag": '"other"'}}])
def test_a_server_that_is_bad_at_ranges(web, get, tmp_path, fault):
    web.put("/file", CONTENT, {"cut": 100_000}, fault)
    assert get() and (tmp_path / "file").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(web, get, tmp_path):
    page = web.put("/file", b"x" * 400_000, {"cut": 350_000}, *[503] * 4)
    with pytest.raises(UsageError):
        get()
    page.content, page.faults = CONTENT, []  # shorter, and the server says the same ETag: 416
    assert get() and (tmp_path / "file").read_bytes() == CONTENT
    assert web.ranges("/file")[-2:] == ["bytes=350000-", None]


def test_parts_that_do_not_fit_are_fetched_once_more(web, get, tmp_path, capsys):
    page = web.put("/file", CONTENT, {"cut": 100_000, "body": b"x" * 300_000})
    assert get(digest=SHA1) and (tmp_path / "file").read_bytes() == CONTENT
    assert "don't fit together" in capsys.readouterr().out and web.ranges("/file") == [None, "bytes=100000-", None]
    # A second time it is the server's fault.
    os.remove(tmp_path / "file")
    page.content = b"y" * 300_000
    with pytest.raises(UsageError, match="what arrived is damaged, its sha1 is .* not the one that was announced"):
        get(digest=SHA1)
    assert names(tmp_path) == []


def test_a_page_in_the_files_place_is_refused_before_it_is_read(web, get, tmp_path):
    web.put("/file", b"<html>Log in to the network</html>")
    with pytest.raises(UsageError, match="has 34 bytes where 300,000 were announced.*proxy"):
        get(size=300_000)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "words"), [(404, "no such file"), (410, "no such file"), (401, "HF_TOKEN"), (403, "HF_TOKEN"), (400, "")]
)
def test_refusals_are_told_at_once(web, get, tmp_path, status, words):
    web.put("/file", CONTENT, *[status] * 2)
    with pytest.raises(UsageError, match=f"^{web.url}/file: HTTP {status}: .*{words}") as error:
        get()
    assert len(web.requests) == 1 and names(tmp_path) == [] and isinstance(error.value, NotThere) == (status > 403)


def test_no_server(tmp_path):
    with pytest.raises(UsageError, match="gave up after 3 attempts: .*refused.*Check the network"):
        download("http://127.0.0.1:9/file", tmp_path / "file", patience=SOON)
    with pytest.raises(UsageError, match="is not an address"):
        download("file", tmp_path / "file", patience=SOON)


def test_unknown_size(web, get, tmp_path):
    web.put("/file", CONTENT, {"chunked": True})
    assert get() and (tmp_path / "file").read_bytes() == CONTENT
    os.remove(tmp_path / "file")
    web.put("/file", CONTENT, {"chunked": True, "cut": 200_000})
    assert get() and (tmp_path / "file").read_bytes() == CONTENT
    os.remove(tmp_path / "file")
    web.put("/file", CONTENT, {"nameless": True}, {"nameless": True})
    with pytest.raises(UsageError, match="a cut would go unseen"):
        get()
    assert get(digest=SHA1) and (tmp_path / "file").read_bytes() == CONTENT


def test_the_servers_wish_to_wait_is_heard(web, get, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    web.put("/file", CONTENT, {"status": 503, "headers": {"Retry-After": "7"}}, 503)
    assert get(patience=Patience(stall=1, first_wait=1))
    assert waits[0] == 7 and 1 <= waits[1] <= 2


def test_a_token_stays_with_its_host(web, get, tmp_path):
    web.put("/elsewhere", CONTENT)
    away = web.url.replace("127.0.0.1", "localhost")
    for target, kept in ((f"{web.url}/elsewhere", True), (f"{away}/elsewhere", False)):
        web.pages["/file"] = lambda handler, target=target: handler.reply(302, {"Location": target}, b"")
        assert get(headers={"Authorization": "Bearer secret"})
        assert ("Authorization" in web.requests[-1][2]) == kept
        os.remove(tmp_path / "file")


def test_two_at_once(web, tmp_path, get):
    web.put("/file", CONTENT, {"stall": 1000})
    code = f"from megatron_rocm.data.download import download; download({web.url + '/file'!r}, 'file')"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        partial = tmp_path / "file.partial"
        deadline = time.monotonic() + 30
        while not (partial.exists() and partial.stat().st_size == 1000) and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(UsageError, match="another process is downloading it"):
            get()
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    # What the killed one had is gone on with.
    assert get() and (tmp_path / "file").read_bytes() == CONTENT and web.ranges("/file")[-1] == "bytes=1000-"


def test_full_disk(web, get, tmp_path, monkeypatch):
    page = web.put("/file", CONTENT)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 100_000))
    with pytest.raises(UsageError, match="0.0 GB are still to come and 0.0 GB are free there"):
        get()
    monkeypatch.undo()
    assert names(tmp_path) == []

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module._Partial, "_copy", full)
    with pytest.raises(UsageError, match="can't be written .No space left.*Free some space; the same command"):
        get()
    monkeypatch.undo()
    page.faults.clear()
    assert get() and names(tmp_path) == ["file"]


def test_notes_of_something_else_are_not_believed(web, get, tmp_path):
    web.put("/file", CONTENT)
    for notes in ({"url": "http://else", "validator": '"1"', "size": 300_000}, "broken", None):
        (tmp_path / "file.partial").write_bytes(b"x" * 1000)
        (tmp_path / "file.partial.json").write_text(json.dumps(notes) if notes != "broken" else "{")
        assert get() and (tmp_path / "file").read_bytes() == CONTENT
        os.remove(tmp_path / "file")


def test_read(web):
    web.put("/list", b"a list", 503, {"cut": 3}, {"stall": 2})
    assert read(f"{web.url}/list", patience=Patience(stall=2, first_wait=0.01, longest_wait=0.01)) == b"a list"
    with pytest.raises(NotThere):
        read(f"{web.url}/other", patience=SOON)
    with pytest.raises(UsageError, match="more than 5 bytes"):
        read(f"{web.url}/list", patience=SOON, limit=5)


def test_verify(tmp_path):
    path = Path(tmp_path / "file")
    path.write_bytes(CONTENT)
    verify(path, SHA1)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UsageError, match="is damaged, its sha1 is .* Remove it"):
        verify(path, SHA1)
