from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_rocm.data import c4, c4_command
from megatron_rocm.data.indexed import open_index, read_sidecar
from megatron_rocm.data.tokenizer import load
from megatron_rocm.errors import UsageError


def lines(name, count):
    return "".join(json.dumps({"text": f"{name} {number}", "url": "x"}) + "\n" for number in range(count))


@pytest.fixture(scope="session")
def c4_files(tmp_path_factory):
    """C4's files by their names, three documents each."""
    folder = tmp_path_factory.mktemp("c4")
    for number in range(1024):
        (folder / c4.train_file(number)).write_bytes(gzip.compress(lines(f"train {number}", 3).encode(), 1))
    for number in range(8):
        (folder / c4.validation_file(number)).write_bytes(gzip.compress(lines(f"val {number}", 3).encode(), 1))
    return folder


@pytest.fixture
def call(c4_files, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "C4_PATH": str(c4_files), "MERGED_C4_PATH": str(tmp_path / "m")})
    return c4_command.main


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def texts(prefix, encoder):
    import numpy as np

    index = open_index(str(prefix))
    ids = np.fromfile(f"{prefix}.bin", index.dtype)
    return [list(part) for part in np.split(ids, np.cumsum(index.lengths)[:-1])]


def test_consolidate(call, c4_files, tmp_path, capsys):
    assert call(["consolidate", "N_VALIDATION_SAMPLES=7"]) == 0
    merged = tmp_path / "m"
    train = [f"c4-train.en_{shard}.json.gz" for shard in range(8)]
    assert names(merged) == [*train, "c4-validation-7-samples.en.json.gz", "c4-validation.en.json.gz"]
    # What `cat` makes of the files in their order.
    expected = b"".join(
        (c4_files / f"c4-train.{number:05d}-of-01024.json.gz").read_bytes() for number in range(768, 896)
    )
    assert (merged / "c4-train.en_6.json.gz").read_bytes() == expected
    everything = "".join(lines(f"val {number}", 3) for number in range(8))
    assert gzip.decompress((merged / "c4-validation.en.json.gz").read_bytes()).decode() == everything
    samples = gzip.decompress((merged / "c4-validation-7-samples.en.json.gz").read_bytes()).decode()
    assert samples == "".join(everything.splitlines(True)[:7])
    capsys.readouterr()
    assert call(["consolidate", "N_VALIDATION_SAMPLES=7"]) == 0
    assert capsys.readouterr().out.count("is there already") == 10


def test_shards_do_it_together(call, tmp_path, monkeypatch):
    for job in range(3):
        job_array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_ID": str(job + 5), "SLURM_ARRAY_TASK_MIN": "5"}
        monkeypatch.setattr(os, "environ", {**os.environ, **job_array})
        call(["consolidate", "SHARDS=6,7", "N_VALIDATION_SAMPLES=2"])
        assert len(names(tmp_path / "m")) == [2, 3, 4][job]
    monkeypatch.setattr(os, "environ", {**os.environ, "MERGED_C4_PATH": str(tmp_path / "n")})
    call(["consolidate", "SHARDS=6-7", "N_VALIDATION_SAMPLES=2", "VERIFY=0", "--shard", "0/1"])
    for name in names(tmp_path / "n"):
        assert (tmp_path / "n" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({}, (0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "9"}, (0, 1)),  # the batch script itself
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "9"}, (3, 9)),
        ({"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_COUNT": "9", "SLURM_ARRAY_TASK_MIN": "0"}, (8, 9)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "3",
                "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            (3, 4),
        ),
    ],
)
def test_own_part(environment, part):
    given = {"C4_PATH": "c", "MERGED_C4_PATH": "m"}
    assert c4_command.parse("consolidate", [], {**given, **environment}).part == part
    assert c4_command.parse("consolidate", ["--shard", "1/5"], {**given, **environment}).part == (1, 5)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda raw: raw[:-9], "is truncated: its gzip data ends before its end mark"),
        (lambda raw: raw[:30] + b"xxx" + raw[33:], "is (damaged|truncated)"),
        (lambda raw: b"", "is empty"),
        (lambda raw: raw[:-5] + b"x" + raw[-4:], "is (damaged|truncated)"),  # the checksum at the end
        (lambda raw: b"<html>" * 50, "is damaged"),
    ],
)
def test_a_bad_file_is_named_and_what_was_merged_stays(c4_files, tmp_path, spoil, words):
    sources = []
    for number in range(4):
        sources.append(tmp_path / c4.train_file(number))
        sources[-1].write_bytes((c4_files / c4.train_file(number)).read_bytes())
    good = sources[2].read_bytes()
    sources[2].write_bytes(spoil(good))
    out = tmp_path / "out.json.gz"
    with pytest.raises(UsageError, match=f"{sources[2].name}: {words}.*Remove it and download it again"):
        c4.merge(sources, out)
    assert not out.exists()
    assert json.loads((tmp_path / "out.json.gz.partial.json").read_text())["sources"] == 2
    sources[2].write_bytes(good)
    # The file's size is part of what the notes are for: one of another size begins anew, an equal one goes on.
    assert c4.merge(sources, out) is True and c4.merge(sources, out) is False
    assert out.read_bytes() == b"".join(path.read_bytes() for path in sources)
    assert not list(tmp_path.glob("*partial*"))


def test_an_output_of_something_else_is_left_alone(c4_files, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="has 4 bytes, its 1 sources have .* move it"):
        c4.merge([c4_files / c4.train_file(0)], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


CHILD = """
import sys, time
from pathlib import Path
from megatron_rocm.data import c4
append = c4._append
def slowly(source, out, check):
    append(source, out, check)
    time.sleep(0.02)
c4._append = slowly
print("started", flush=True)
c4.merge([Path(one) for one in sys.argv[2:]], Path(sys.argv[1]))
"""


def test_kill_and_go_on(c4_files, tmp_path):
    sources = [c4_files / c4.train_file(number) for number in range(60)]
    out = tmp_path / "out.json.gz"
    went_on = 0
    for patience in (0.2, 0.3, 0.5, 60):
        notes = tmp_path / "out.json.gz.partial.json"
        went_on += notes.exists() and json.loads(notes.read_text())["sources"] > 0
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(out), *map(str, sources)], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"started\n"
        deadline = time.monotonic() + patience
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert out.read_bytes() == b"".join(path.read_bytes() for path in sources) and went_on


def test_fewer_samples_than_asked_for(call, tmp_path):
    with pytest.raises(UsageError, match="^N_VALIDATION_SAMPLES=25: .* holds only 24 validation samples"):
        call(["consolidate", "SHARDS=0", "N_VALIDATION_SAMPLES=25"])
    assert "c4-validation-25-samples.en.json.gz" not in names(tmp_path / "m")


def test_preprocess_merged_and_not(call, bpe, c4_files, tmp_path, monkeypatch):
    call(["consolidate", "SHARDS=7", "N_VALIDATION_SAMPLES=4"])
    given = ["SHARDS=7", "N_VALIDATION_SAMPLES=4", f"TOKENIZER_PATH={bpe.model}", "WORKERS=1"]
    call(["preprocess", *given, f"PREPROCESSED_PATH={tmp_path / 'a'}"])
    assert "c4-train.en_7_text_document.idx" in names(tmp_path / "a")
    monkeypatch.delenv("MERGED_C4_PATH")
    for part in range(2):
        call(["preprocess", *given, f"PREPROCESSED_PATH={tmp_path / 'b'}", "--shard", f"{part}/2"])
    encoder = load(bpe)
    documents = texts(tmp_path / "a" / "c4-train.en_7_text_document", encoder)
    assert len(documents) == 3 * 128
    assert documents[0] == list(encoder.encode_batch(["train 896 0"])[0])[1:]  # no BOS, no EOS
    samples = texts(tmp_path / "a" / "c4-validation-4-samples.en_text_document", encoder)
    assert samples[3] == list(encoder.encode_batch(["val 1 0"])[0])[1:] and len(samples) == 4
    for name in ("c4-train.en_7_text_document", "c4-validation-4-samples.en_text_document"):
        for kind in ("bin", "idx"):
            assert (tmp_path / "a" / f"{name}.{kind}").read_bytes() == (tmp_path / "b" / f"{name}.{kind}").read_bytes()
        assert read_sidecar(str(tmp_path / "b" / name))["tokenizer"]["fingerprint"] == bpe.fingerprint


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge"], "data c4 merge: there is consolidate and preprocess"),
        (["consolidate", "C4_PATH="], "^C4_PATH is needed: folder with C4's"),
        (["consolidate", "C4_PATH=/no/such"], "C4_PATH=/no/such: c4-train.00000-of-01024.json.gz and 127 more of 128"),
        (["consolidate", "N_VALIDATION_SAMPLES=x"], "N_VALIDATION_SAMPLES=x: must be a whole number"),
        (["consolidate", "SHARDS=8"], "SHARDS=8: must be numbers from 0 to 7"),
        (["consolidate", "VERIFY=2"], "VERIFY=2: must be 0 or 1"),
        (["consolidate", "--shard", "3/3"], "--shard=3/3: must be I/N"),
        (["consolidate", "C4PATH=x"], "C4PATH=x: unknown key.*C4_PATH"),
        (["preprocess"], "TOKENIZER_PATH is needed"),
        (["preprocess", "TOKENIZER_PATH=x", "PREPROCESSED_PATH=y", "SHARDS=6"], "c4-train.en_6.json.gz is not there"),
        (
            ["preprocess", "TOKENIZER_PATH=x", "PREPROCESSED_PATH=y", "C4_PATH=", "MERGED_C4_PATH="],
            "^MERGED_C4_PATH is needed.*or C4_PATH, to do without",
        ),
    ],
)
def test_mistakes(call, arguments, words, monkeypatch):
    if arguments[-1] == "MERGED_C4_PATH=":
        monkeypatch.delenv("C4_PATH")
        monkeypatch.delenv("MERGED_C4_PATH")
    if arguments[1:] == ["C4_PATH="]:
        monkeypatch.delenv("C4_PATH")
    with pytest.raises(UsageError, match=words):
        call(arguments)


def test_help(capsys):
    assert c4_command.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in c4_command.VARIABLES)


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.json.gz").mkdir()
    with pytest.raises(UsageError, match=r"a\.json\.gz: can't be read \("):
        c4.merge([tmp_path / "a.json.gz"], tmp_path / "out.json.gz")
    assert not (tmp_path / "out.json.gz").exists()
