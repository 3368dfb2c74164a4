"""Pairs put together: megatron-core's bytes, what is refused, and what a fault leaves on the disk."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pair_files
import pytest

from megatron_rocm.cli import main
from megatron_rocm.data import pairs
from megatron_rocm.data.combine import concat
from megatron_rocm.errors import UsageError

TOKENIZER = {"type": "HuggingFaceTokenizer", "model": "./tokenizer", "vocab_size": 500, "eod": 1, "fingerprint": "f"}


@pytest.fixture
def parts(tmp_path):
    """Three pairs in a folder of their own: 30 documents, none, and 50."""
    (tmp_path / "in").mkdir()
    sizes = {"part_2": 30, "part_9": 0, "part_10": 50}
    return [pair_files.write(tmp_path / "in" / name, pair_files.some(size, size)) for name, size in sizes.items()]


def theirs(prefixes, out, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{out}.bin", dtype)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(f"{out}.idx")


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def same(one, other):
    return all(Path(f"{one}.{kind}").read_bytes() == Path(f"{other}.{kind}").read_bytes() for kind in ("bin", "idx"))


@pytest.mark.parametrize("vocab_size", [500, 128_256])
def test_bytes_of_megatron_cores_add_index(tmp_path, vocab_size, monkeypatch):
    monkeypatch.setattr(pairs, "BLOCK", 7)  # so that blocks end within documents
    sizes = (40, 0, 1, 33)
    prefixes = [
        pair_files.write(tmp_path / f"p{seed}", pair_files.some(seed, size, vocab_size), vocab_size)
        for seed, size in enumerate(sizes)
    ]
    result = concat(prefixes, str(tmp_path / "out" / "ours"))
    theirs(prefixes, tmp_path / "theirs", pairs.check_offsets(prefixes[0]).head.dtype.type)
    assert same(tmp_path / "out" / "ours", tmp_path / "theirs")
    assert files(tmp_path / "out") == ["ours.bin", "ours.idx"]
    digest = hashlib.sha256((tmp_path / "theirs.bin").read_bytes()).hexdigest()
    assert (result.documents, result.parts, result.checksum) == (sum(sizes), 4, f"sha256:{digest}")


def test_sidecar_counts_all_and_names_the_parts(parts, tmp_path):
    for number, prefix in enumerate(parts):
        pair_files.describe(prefix, TOKENIZER, bos=False, shard=[number, 3])
    result = concat(parts, str(tmp_path / "out"))
    sidecar = json.loads((tmp_path / "out.json").read_text())
    assert (sidecar["documents"], sidecar["tokens"], sidecar["bytes"]) == (80, result.tokens, 21)
    assert (sidecar["checksum"], sidecar["source"]["append_eod"]) == (result.checksum, True)
    assert [part["documents"] for part in sidecar["source"]["parts"]] == [30, 0, 50]
    # `./tokenizer` lies beside the parts, and the result does not.
    assert sidecar["tokenizer"] == {**TOKENIZER, "model": str(tmp_path / "in" / "tokenizer")}
    concat(parts, str(tmp_path / "in" / "out"))
    assert json.loads((tmp_path / "in" / "out.json").read_text())["tokenizer"]["model"] == "./tokenizer"


def record(prefix, **facts):
    sidecar = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps({**sidecar, **facts}))


def patch(prefix, kind, at, raw):
    with open(f"{prefix}.{kind}", "r+b") as file:
        file.seek(at)
        file.write(raw)


def other_type(prefix):
    pair_files.write(prefix, [[[1]]], 128_256)


FAULTS = {
    "damaged": (lambda p: patch(p, "idx", 34, b"\xff"), "is damaged from document"),
    "truncated": (lambda p: os.truncate(f"{p}.bin", 100), "truncated: 100 bytes"),
    "missing": (lambda p: os.remove(f"{p}.idx"), "is missing"),
    "data type": (other_type, "holds int32 ids and .*part_2 uint16"),
    "tokenizer": (
        lambda p: record(p, tokenizer={**TOKENIZER, "fingerprint": "g", "model": "other"}),
        "made with other, and .*part_2 with ./tokenizer",
    ),
    "no sidecar": (lambda p: os.remove(f"{p}.json"), "nothing beside it names its tokenizer"),
    "EOD": (lambda p: pair_files.describe(p, TOKENIZER, append_eod=False), "only one has an EOD after each document"),
    "sidecar of another": (lambda p: record(p, tokens=5), "speaks of 5 tokens"),
    "packed": (lambda p: record(p, supervised={"seq_length": 8}), "is packed for fine-tuning, and its loss mask can't"),
    "checksum": (lambda p: record(p, checksum="sha256:0"), "has not the checksum that .*part_10.json names"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_go_together(parts, tmp_path, fault):
    for prefix in parts:
        pair_files.describe(prefix, TOKENIZER)
    damage, words = FAULTS[fault]
    damage(parts[2])
    with pytest.raises(UsageError, match=words) as error:
        concat(parts, str(tmp_path / "out"), key="--input")
    assert str(error.value).startswith(f"--input={parts[2]}: ")
    assert files(tmp_path) == ["in"]


def test_what_is_there_is_kept(parts, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="part_2 is named twice"):
        concat([parts[0], parts[0]], str(out))
    with pytest.raises(UsageError, match="part_2 is named twice"):
        concat([parts[0], parts[1], os.path.relpath(parts[0])], str(out))
    with pytest.raises(UsageError, match="there is nothing to put together"):
        concat([], str(out))
    with pytest.raises(UsageError, match="^OUT=.*part_2: is one of the pairs that are read"):
        concat(parts, parts[0], overwrite=True)
    out.with_suffix(".json").write_text("{}")
    with pytest.raises(UsageError, match=r"^OUT=.*out.json is there already; .* --overwrite"):
        concat(parts, str(out))
    concat(parts, str(out), overwrite=True)
    assert files(tmp_path) == ["in", "out.bin", "out.idx"]  # the .json was of other data


def run(code, *words):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


SLOW = """
    import sys, time
    from megatron_rocm.data import combine, pairs
    write = pairs.PairWriter.write
    def slow(self, ids):
        write(self, ids)
        print("wrote", flush=True)
        time.sleep(100)
    pairs.PairWriter.write = slow
    combine.concat(sys.argv[2:], sys.argv[1])
"""


def test_killed_and_started_again(parts, tmp_path):
    out = str(tmp_path / "out")
    process = run(SLOW, out, *parts)
    assert process.stdout.readline() == "wrote\n"
    with pytest.raises(UsageError, match=f"^OUT={out}: another process is writing there"):
        concat(parts, out)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert files(tmp_path) == ["in", "out.bin.partial"]
    concat(parts, out)
    assert files(tmp_path) == ["in", "out.bin", "out.idx"]
    assert pair_files.read(out) == [document for prefix in parts for document in pair_files.read(prefix)]
    # Killed when the .bin had its name and the .idx had not: no pair yet, and nothing that must be kept.
    (tmp_path / "out.idx").rename(tmp_path / "out.idx.partial")
    concat(parts, out)
    assert files(tmp_path) == ["in", "out.bin", "out.idx"]


def test_a_file_that_gets_its_name_while_another_waits_for_it_is_kept(tmp_path, monkeypatch):
    out, flock = tmp_path / "out", fcntl.flock

    def late(file, how):
        Path(file.name).write_bytes(b"whole")
        os.rename(file.name, f"{out}.bin")
        flock(file, how)

    monkeypatch.setattr(pairs.fcntl, "flock", late)
    with pytest.raises(UsageError, match=f"^OUT={out}: another process is writing there"):
        pairs.PairWriter(str(out), np.dtype(np.uint16), "OUT")
    assert Path(f"{out}.bin").read_bytes() == b"whole" and files(tmp_path) == ["out.bin"]


FULL = """
    import resource, signal, sys
    from megatron_rocm.cli import main
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    sys.exit(main(["data", "concat", *sys.argv[2:], "--output-prefix", sys.argv[1]]))
"""


def test_a_full_disk_leaves_nothing(parts, tmp_path):
    process = run(FULL, str(tmp_path / "out"), *parts)
    _, told = process.communicate()
    assert process.returncode == 2 and told.count("\n") == 1
    assert told.startswith(f"megatron-rocm: OUT={tmp_path}/out: can't be written: File too large")
    assert files(tmp_path) == ["in"]


def test_merge_takes_a_folder_by_number(parts, tmp_path, capsys):
    out = str(tmp_path / "in" / "all")
    command = ["data", "merge", "--input", str(tmp_path / "in"), "--output-prefix", out]
    assert main(command) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split("/")[-1] for line in told[:3]] == ["part_2", "part_9", "part_10"]
    assert told[3].startswith(f"{out}: 3 pairs, 80 documents, ")
    theirs(parts, tmp_path / "theirs", pairs.check_offsets(out).head.dtype.type)
    assert same(out, tmp_path / "theirs")
    assert main([*command, "--overwrite"]) == 0  # OUT is not one of its own parts
    assert same(out, tmp_path / "theirs")


def merge(folder, out):
    return main(["data", "merge", "--input", str(folder), "--output-prefix", str(out)])


def test_merge_refuses_what_is_not_whole(parts, tmp_path, capsys):
    folder = tmp_path / "in"
    assert merge(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "--input=" in (told := capsys.readouterr().err) and "no such folder" in told
    assert merge(tmp_path, tmp_path / "out") == 2
    assert "holds no .bin/.idx pair" in capsys.readouterr().err
    for number, prefix in enumerate(parts):
        pair_files.describe(prefix, TOKENIZER, shard=[number, 4])
    assert merge(folder, tmp_path / "out") == 2
    assert "of 4 shards 1 are missing, the first is number 3" in capsys.readouterr().err
    for number, prefix in enumerate(parts[:2]):
        pair_files.describe(prefix, TOKENIZER, shard=[number, 2])
    pair_files.describe(parts[2], TOKENIZER, shard="x")
    assert merge(folder, tmp_path / "out") == 2
    assert "part_10.json names the shard 'x'" in capsys.readouterr().err
    pair_files.describe(parts[2], TOKENIZER)
    assert merge(folder, tmp_path / "out") == 2
    assert "holds the 2 shards of a job and other pairs" in capsys.readouterr().err
    (folder / "part_3.bin.partial").touch()
    assert merge(folder, tmp_path / "out") == 2
    assert "part_3.bin.partial is being written, or what a killed process left" in capsys.readouterr().err
    assert files(tmp_path) == ["in"]
