"""Data sets of the hub, with the real `datasets` and huggingface_hub against a hub of this file's."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from web import Web

from megatron_rocm.data import hub_datasets
from megatron_rocm.data.indexed import read_sidecar
from megatron_rocm.errors import UsageError

COMMITS = itertools.count(1)


class HubApi:
    """The routes of the hub that reading data sets takes, over the files {repo: {path: bytes}}."""

    def __init__(self, web):
        self.web, self.repos, self.broken, self.cut = web, {}, set(), set()
        web.otherwise = self.answer

    def put(self, repo, files, revision="main"):
        """Set a repository's files, as a commit of their own: clients remember what a commit holds."""
        commit = f"{next(COMMITS):040x}"
        self.repos[repo] = (files, (revision, commit), commit)
        return commit

    def answer(self, handler):
        path = urllib.parse.unquote(handler.path.partition("?")[0])
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        found = re.fullmatch(r"/(api/)?datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/(.+))?", path)
        if not found or found[2] not in self.repos:
            return handler.reply(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        files, revisions, commit = self.repos[found[2]]
        revision = next((one for one in revisions if f"{found[4]}/".startswith(f"{one}/")), None)
        if found[3] and revision is None:
            return handler.reply(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        rest = (found[4] or "")[len(revision or "") + 1 :]
        if found[3] == "resolve":
            return self.file(handler, files, rest, commit)
        if found[3] == "tree":
            return self.tree(handler, files, rest)
        if found[3] == "paths-info":
            asked = urllib.parse.parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
            return self.json(handler, [self.entry(files, name) for name in asked if name in files])
        return self.json(
            handler, {"id": found[2], "sha": commit, "private": False, "tags": [], "downloads": 0, "siblings": []}
        )

    def tree(self, handler, files, folder):
        inside = [name for name in files if not folder or name.startswith(f"{folder}/")]
        if not inside:
            return handler.reply(404, {"X-Error-Code": "EntryNotFound"}, b"{}")
        self.json(handler, [self.entry(files, name) for name in inside])

    @staticmethod
    def entry(files, name):
        oid = hashlib.sha256(files[name]).hexdigest()
        size = len(files[name])
        return {
            "type": "file",
            "path": name,
            "size": size,
            "oid": oid[:40],
            "lfs": {"oid": oid, "size": size, "pointerSize": 130},
        }

    @staticmethod
    def json(handler, value):
        handler.reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def file(self, handler, files, name, commit):
        if name in self.broken:
            return handler.reply(403, {}, b"")
        if name not in files:
            return handler.reply(404, {"X-Error-Code": "EntryNotFound"}, b"")
        content, headers = files[name], {"ETag": f'"{name}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if name in self.cut:
            self.cut.remove(name)
            handler.reply(200, headers, content, sent=len(content) // 2)
            return None
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or "")
        if not asked:
            return handler.reply(200, headers, content)
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        handler.reply(206, headers, content[first : last + 1])


@pytest.fixture(scope="module")
def server():
    """A web server and a process that runs `prepare` against it, one order a line: importing `datasets` takes long."""
    web = Web()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MAX_"))}
    with tempfile.TemporaryDirectory() as home:
        environment.update(HF_ENDPOINT=web.url, HF_HOME=home, HF_HUB_DISABLE_TELEMETRY="1")
        command = [sys.executable, "-c", SERVER]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        yield web, process, environment
        process.communicate()
        web.close()


@pytest.fixture
def api(server):
    web = server[0]
    web.requests.clear()
    return HubApi(web)


def parquet(texts, rows=5):
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": [str(number) for number in range(len(texts))], "text": texts})
    pyarrow.parquet.write_table(table, sink, row_group_size=rows)
    return sink.getvalue().to_pybytes()


def wikipedia(api, parts=3, each=20):
    """{texts} of wikimedia/wikipedia's English files; another language lies beside them."""
    texts = [f"Article {number} ünï. " + "word " * (number % 9) for number in range(parts * each)]
    files = {
        f"20231101.en/train-{part:05d}-of-{parts:05d}.parquet": parquet(texts[part * each : (part + 1) * each])
        for part in range(parts)
    }
    api.put(
        "wikimedia/wikipedia", {**files, "20231101.de/train-00000-of-00001.parquet": parquet(["de"]), "README.md": b"x"}
    )
    return texts


SERVER = """
import contextlib, io, json, sys
from megatron_rocm.cli import main
from megatron_rocm.data import hub_datasets
hub_datasets.SHARD_BYTES = 300
for order in sys.stdin:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main(["prepare", *json.loads(order)])
    print(json.dumps([status, out.getvalue(), errors.getvalue()]), flush=True)
"""
CHILD = """
import sys
from megatron_rocm.cli import main
from megatron_rocm.data import hub_datasets
hub_datasets.SHARD_BYTES = 100
sys.exit(main(["prepare", *sys.argv[1:]]))
"""


@pytest.fixture
def run(server, tmp_path):
    """`prepare` with these arguments; what it printed, or with a status the message that it ended with."""

    def run(*arguments, status=0):
        process = server[1]
        print(json.dumps([f"DATA_DIR={tmp_path / 'data'}", *arguments]), file=process.stdin, flush=True)
        ended, out, errors = json.loads(process.stdout.readline())
        assert ended == status, out + errors
        return out if status == 0 else errors

    return run


def texts_of(folder):
    return [json.loads(line)["text"] for path in sorted(folder.glob("part-*.jsonl")) for line in path.open()]


def test_wiki_to_tokens(api, run, tmp_path, bpe):
    texts = wikipedia(api)
    said = run("DATASET=wiki", f"TOKENIZER_MODEL={bpe.model}", "WORKERS=1")
    assert texts_of(tmp_path / "data" / "text") == texts and len(list((tmp_path / "data" / "text").glob("part-*"))) > 3
    sidecar = read_sidecar(str(tmp_path / "data" / "data_text_document"))
    assert sidecar["documents"] == 60 and sidecar["bytes"] == sum(len(text.encode()) for text in texts)
    assert "60 documents" in said and "next: DATA_PATH=" in said
    # Where everything is there, no network is needed.
    api.web.requests.clear()
    api.repos.clear()
    assert "already made from this text" in run("DATASET=wiki", f"TOKENIZER_MODEL={bpe.model}", "WORKERS=1")
    assert not api.web.requests


def test_limits_can_be_raised(api, run, tmp_path):
    texts = wikipedia(api)
    folder = tmp_path / "data" / "text"
    arguments = ["DATASET=wiki", "DOWNLOAD_ONLY=1"]
    run(*arguments, "MAX_DOCUMENTS=7")
    assert texts_of(folder) == texts[:7]
    run(*arguments, "MAX_DOCUMENTS=33")
    assert texts_of(folder) == texts[:33]
    refused = run(*arguments, "MAX_DOCUMENTS=32", status=2)
    assert "MAX_DOCUMENTS=32: " in refused and "already holds 33" in refused and refused.count("\n") == 1
    run(*arguments, "MAX_MB=0.0015")
    size = sum(len(text.encode()) for text in texts_of(folder))
    assert 1500 <= size < 1600 and texts_of(folder) == texts[: len(texts_of(folder))]
    run(*arguments)
    assert texts_of(folder) == texts


def test_other_text_is_not_mixed_in(api, run, tmp_path):
    wikipedia(api)
    run("DATASET=wiki", "DOWNLOAD_ONLY=1", "CONFIG=20231101.de")
    assert texts_of(tmp_path / "data" / "text") == ["de"]
    refused = run("DATASET=wiki", "DOWNLOAD_ONLY=1", status=2)
    assert (
        "holds wikimedia/wikipedia 20231101.de main, and wikimedia/wikipedia 20231101.en main is asked for" in refused
    )


def test_kill_and_go_on(api, server, tmp_path):
    texts = wikipedia(api, parts=6, each=50)
    arguments = [f"DATA_DIR={tmp_path / 'data'}", "DATASET=wiki", "DOWNLOAD_ONLY=1"]
    folder = tmp_path / "data" / "text"
    went_on = 0
    for kill in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments],
            env=server[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wanted = len(list(folder.glob("part-*"))) + 20
        deadline = time.monotonic() + 60
        while kill < 2 and process.poll() is None and time.monotonic() < deadline:
            if len(list(folder.glob("part-*"))) >= wanted:
                break
            time.sleep(0.005)
        if kill < 2:
            process.send_signal(signal.SIGKILL)
            went_on += (folder / ".state.json").exists()
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert texts_of(folder) == texts and went_on
    assert not list(folder.glob("*partial"))


def test_the_other_sets_lie_where_they_are_looked_for(api, run, tmp_path):
    api.put(
        "bookcorpus/bookcorpus",
        {"plain_text/partial-train/0000.parquet": parquet(["book"]), "plain_text/test/0000.parquet": parquet(["no"])},
        "refs/convert/parquet",
    )
    commit = api.put(
        "HuggingFaceFW/fineweb",
        {
            "sample/10BT/000_00000.parquet": parquet(["ten"]),
            "data/CC-MAIN-2024-10/000_00000.parquet": parquet(["crawl"]),
            "data/CC-MAIN-2024-18/000_00000.parquet": parquet(["other"]),
        },
    )
    for at, (arguments, texts) in enumerate(
        [
            (["DATASET=bookcorpus"], ["book"]),
            (["DATASET=fineweb"], ["ten"]),
            (["DATASET=fineweb", "CONFIG=CC-MAIN-2024-10"], ["crawl"]),
            (["DATASET=fineweb", "CONFIG=default", f"REVISION={commit}"], ["crawl", "other"]),
        ]
    ):
        run(*arguments, "DOWNLOAD_ONLY=1", f"DATA_DIR={tmp_path / str(at)}")
        assert texts_of(tmp_path / str(at) / "text") == texts


def test_what_the_hub_lacks_is_told_in_one_line(api, run, tmp_path):
    def refused(*arguments):
        said = run(*arguments, "DOWNLOAD_ONLY=1", status=2)
        assert said.count("\n") == 1, said
        return said

    assert "no such repository on the hub" in refused("DATASET=wiki")
    wikipedia(api)
    assert "wikimedia/wikipedia at REVISION=v2: there is no such revision" in refused("DATASET=wiki", "REVISION=v2")
    assert "CONFIG=xx: wikimedia/wikipedia has no files xx/train-*.parquet" in refused("DATASET=wiki", "CONFIG=xx")
    assert not list((tmp_path / "data").glob("text/part-*"))
    api.broken.add("20231101.en/train-00001-of-00003.parquet")
    assert "the same command goes on where this one stood" in refused("DATASET=wiki")
    api.broken.clear()
    run("DATASET=wiki", "DOWNLOAD_ONLY=1")
    assert len(texts_of(tmp_path / "data" / "text")) == 60


def test_answers_that_are_cut_off(api, run, tmp_path):
    texts = wikipedia(api, parts=2, each=300)
    api.cut.add("20231101.en/train-00000-of-00002.parquet")
    run("DATASET=wiki", "DOWNLOAD_ONLY=1", "MAX_DOCUMENTS=310")
    assert texts_of(tmp_path / "data" / "text") == texts[:310] and not api.cut
    name = "en/c4-train.00003-of-01024.json.gz"
    files = c4_files(api, [3])
    api.cut.add(name)
    run("DATASET=c4", "SHARDS=3", "DOWNLOAD_ONLY=1")
    assert (tmp_path / "data" / name).read_bytes() == files[name] and not api.cut
    path = f"/datasets/allenai/c4/resolve/{api.repos['allenai/c4'][2]}/{name}"
    assert api.web.ranges(path) == [None, f"bytes={len(files[name]) // 2}-"]


def c4_files(api, numbers):
    files = {
        f"en/c4-train.{number:05d}-of-01024.json.gz": gzip.compress(
            "".join(json.dumps({"text": f"doc {number} {line}"}) + "\n" for line in range(3)).encode()
        )
        for number in numbers
    }
    for number in range(8):
        files[f"en/c4-validation.{number:05d}-of-00008.json.gz"] = gzip.compress(b'{"text": "val"}\n')
    api.put("allenai/c4", files)
    return files


def test_c4(api, run, tmp_path, bpe):
    files = c4_files(api, range(1020, 1024))
    said = run("DATASET=c4", "SHARDS=1020-1021,1023,validation", f"TOKENIZER_MODEL={bpe.model}", "WORKERS=1")
    folder = tmp_path / "data" / "en"
    assert len(list(folder.glob("c4-train.*"))) == 3 and len(list(folder.glob("c4-validation.*"))) == 8
    assert all(path.read_bytes() == files[f"en/{path.name}"] for path in folder.glob("c4-*"))
    assert read_sidecar(str(tmp_path / "data" / "data_text_document"))["documents"] == 9 and "11 files" in said
    # More of them: what is there stays, and what is known of it is not asked for again.
    api.web.requests.clear()
    run("DATASET=c4", "SHARDS=1022-1023", "DOWNLOAD_ONLY=1")
    assert sum("resolve" in path for _, path, _ in api.web.requests) == 1
    # A file that changed on the disk is found when that is asked for.
    path = folder / "c4-train.01022-of-01024.json.gz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    run("DATASET=c4", "SHARDS=1022", "DOWNLOAD_ONLY=1")
    assert "is damaged, its sha256 is" in run("DATASET=c4", "SHARDS=1022", "DOWNLOAD_ONLY=1", "VERIFY=1", status=2)
    path.write_bytes(b"short")
    assert "was made by something else: move it" in run("DATASET=c4", "SHARDS=1022", "DOWNLOAD_ONLY=1", status=2)


def test_c4_files_that_are_not_what_the_hub_announced(api, run, tmp_path):
    files = c4_files(api, [5])
    name = "en/c4-train.00005-of-01024.json.gz"
    entry = HubApi.entry(files, name)
    api.entry = lambda _, asked: {**entry, "path": asked, "lfs": {**entry["lfs"], "oid": "0" * 64}}
    assert "is not the one that was announced" in run("DATASET=c4", "SHARDS=5", "DOWNLOAD_ONLY=1", status=2)
    assert not list((tmp_path / "data" / "en").glob("c4*"))
    assert "has no en/c4-train.00006" in run("DATASET=c4", "SHARDS=6", "DOWNLOAD_ONLY=1", status=2)


SAID = {name: "" for name in ("INPUT", "CONFIG", "REVISION", "MAX_DOCUMENTS", "SHARDS")}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"DATASET": "pile"}, "DATASET=pile: there is local, bookcorpus, wiki, fineweb and c4"),
        ({"DATASET": "wiki", "INPUT": "x"}, "INPUT=x: belongs to DATASET=local"),
        ({"DATASET": "wiki", "MAX_DOCUMENTS": "0"}, "MAX_DOCUMENTS=0: must be a whole number above 0"),
        ({"DATASET": "wiki", "SHARDS": "1"}, "SHARDS=1: belongs to DATASET=c4"),
        ({"DATASET": "c4"}, "SHARDS is needed: .* 0-1023 is all of them"),
        ({"DATASET": "c4", "SHARDS": "1024"}, "SHARDS=1024: must be numbers from 0 to 1023"),
        ({"DATASET": "c4", "SHARDS": "3-1"}, "SHARDS=3-1"),
        ({"DATASET": "c4", "SHARDS": "a"}, "SHARDS=a"),
        ({"DATASET": "c4", "SHARDS": "1", "CONFIG": "en"}, "CONFIG=en: DATASET=c4 takes whole files"),
        ({"DATASET": "c4", "SHARDS": "1", "VERIFY": "yes"}, "VERIFY=yes: must be 0 or 1"),
    ],
)
def test_mistakes(said, words):
    with pytest.raises(UsageError, match=words):
        hub_datasets.parse({**SAID, "VERIFY": "0", **said}, None)


def test_shards():
    parsed = hub_datasets.parse({**SAID, "VERIFY": "1", "DATASET": "c4", "SHARDS": "3, 0-1,validation"}, 10)
    assert parsed.shards == (0, 1, 3) and parsed.validation and parsed.verify and parsed.limit == 10
    assert hub_datasets.parse({**SAID, "VERIFY": "0", "DATASET": "local"}, None) is None


def test_a_full_disk_stops_before_the_first_byte(tmp_path, monkeypatch):
    from megatron_rocm.data import hub_c4

    monkeypatch.setattr(hub_c4, "_announced", lambda *_: ("main", [hub_c4._RawFile("a", 1 << 60, "0")]))
    with pytest.raises(UsageError, match="SHARDS: 1 files of .* GB in all are to come, and .* GB free"):
        hub_c4.fetch_c4([0], False, Path(tmp_path), "main", False)
