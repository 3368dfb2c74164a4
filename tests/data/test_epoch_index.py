"""Index files: made of what decides them, checked byte by byte when they are found, and whole or not there."""

import errno
import fcntl
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from megatron_rocm.data import epoch_index
from megatron_rocm.data.epoch_index import HEADER_SIZE, ensure, load, make, plan
from megatron_rocm.errors import UsageError


@pytest.fixture
def prefix(write_data, tmp_path):
    lengths = np.random.RandomState(0).randint(1, 61, 300)
    return write_data(tmp_path / "data", [[5] * length for length in lengths])


def epoch_of(prefix, name="train", **changes):
    settings = {"split": "80,20,0", "seq_length": 16, "seed": 7, **changes}
    return plan([(None, prefix)], settings["split"], [name], settings["seq_length"], settings["seed"])[name][0]


def same(found, wanted):
    return all(
        np.array_equal(one, other) and one.dtype == other.dtype for one, other in zip(found, wanted, strict=True)
    )


def test_what_is_read_is_what_was_made(prefix, tmp_path):
    for epoch in (epoch_of(prefix), epoch_of(prefix, "valid")):
        assert ensure(epoch, tmp_path / "c")
        assert same(load(epoch, tmp_path / "c"), make(epoch))
        assert not ensure(epoch, tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_it_is_made_alike_without_the_compiled_module(prefix, monkeypatch):
    compiled = make(epoch_of(prefix))
    monkeypatch.setattr(epoch_index.native, "compiled", None)
    assert same(make(epoch_of(prefix)), compiled)


def test_each_setting_and_the_data_have_a_file_of_their_own(prefix, write_data, tmp_path):
    other = write_data(tmp_path / "other" / "data", [[5] * 30] * 300) if (tmp_path / "other").mkdir() is None else ""
    epochs = [
        epoch_of(prefix),
        epoch_of(prefix, "valid"),
        epoch_of(prefix, split="90,10,0"),
        epoch_of(prefix, seq_length=17),
        epoch_of(prefix, seed=8),
        epoch_of(other),
    ]
    assert len({epoch.file_name for epoch in epochs}) == len(epochs)


def test_moved_data_keep_their_index(prefix, tmp_path):
    ensure(epoch_of(prefix), tmp_path / "c")
    (tmp_path / "moved").mkdir()
    for kind in ("bin", "idx"):
        os.rename(f"{prefix}.{kind}", tmp_path / "moved" / f"data.{kind}")
    assert not ensure(epoch_of(tmp_path / "moved" / "data"), tmp_path / "c")


def test_many_blocks_of_lengths_are_one(prefix, monkeypatch):
    whole = epoch_of(prefix)
    monkeypatch.setattr(epoch_index, "BLOCK", 28)
    assert epoch_of(prefix) == whole


def cut(size):
    return lambda path: os.truncate(path, path.stat().st_size - size)


def grow(path):
    with open(path, "ab") as file:
        file.write(b"\0" * 64)


def flip(where):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[where] ^= 1
        path.write_bytes(data)

    return damage


DAMAGE = {
    "empty": (lambda path: os.truncate(path, 0), "is not an index file of ours"),
    "truncated": (cut(1), "bytes and should have"),
    "only a header": (lambda path: os.truncate(path, HEADER_SIZE), "bytes and should have"),
    "too long": (grow, "bytes and should have"),
    "a bit of the documents": (flip(HEADER_SIZE + 5), "its checksums are others"),
    "the last bit": (flip(-1), "its checksums are others"),
    "a checksum": (flip(170), "its checksums are others"),
    "its magic": (flip(0), "is not an index file of ours"),
    "text": (lambda path: path.write_text("notes"), "is not an index file of ours"),
    "unreadable": (lambda path: (path.unlink(), path.symlink_to(path)), "can't be read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_made_anew_and_a_line_says_so(prefix, tmp_path, caplog, case):
    damage, why = DAMAGE[case]
    epoch = epoch_of(prefix)
    ensure(epoch, tmp_path / "c")
    path = tmp_path / "c" / epoch.file_name
    damage(path)
    assert ensure(epoch, tmp_path / "c")
    (line,) = caplog.messages
    assert line.startswith(f"{path} ") and why in line and line.endswith(": it is made anew")
    assert same(load(epoch, tmp_path / "c"), make(epoch)) and not ensure(epoch, tmp_path / "c")


def test_a_file_of_other_data_under_this_name_is_made_anew(prefix, tmp_path, caplog):
    epoch, other = epoch_of(prefix), epoch_of(prefix, seed=8)
    ensure(other, tmp_path)
    os.rename(tmp_path / other.file_name, tmp_path / epoch.file_name)
    assert ensure(epoch, tmp_path) and "was made of other data" in caplog.text
    assert same(load(epoch, tmp_path), make(epoch))


def test_a_full_disk_leaves_nothing(prefix, tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(epoch_index.os, "fsync", fsync)
    with pytest.raises(UsageError, match=rf"DATA_CACHE_PATH={tmp_path}/c: .*No space left on device"):
        ensure(epoch_of(prefix), tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())


KILLED = """
import os, sys
from megatron_rocm.data import epoch_index
replace = os.replace
os.replace = lambda *names: os.kill(os.getpid(), 9)
epoch = epoch_index.plan([(None, sys.argv[1])], "80,20,0", ["train"], 16, 7)["train"][0]
epoch_index.ensure(epoch, epoch_index.Path(sys.argv[2]))
"""


def test_a_killed_run_leaves_no_file_under_the_final_name(prefix, tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLED, prefix, str(tmp_path / "c")], timeout=60)
    epoch = epoch_of(prefix)
    left = list((tmp_path / "c").iterdir())
    assert run.returncode == -9 and [path.suffix for path in left] == [".partial"]
    with open(left[0], "rb") as held:  # as of one that is still alive
        fcntl.flock(held, fcntl.LOCK_EX)
        assert ensure(epoch, tmp_path / "c") and left[0].exists()
    (tmp_path / "c" / epoch.file_name).unlink()
    assert ensure(epoch, tmp_path / "c") and same(load(epoch, tmp_path / "c"), make(epoch))
    assert [path.name for path in (tmp_path / "c").iterdir()] == [epoch.file_name]


def test_splits_without_a_share_are_left_out(prefix):
    paths = [(1.0, prefix), (2.0, prefix)]
    found = plan(paths, "99,1,0", ("train", "valid", "test"), 16, 7)
    assert {name: len(epochs) for name, epochs in found.items()} == {"train": 2, "valid": 2}
    assert found["train"][0] == replace(found["train"][1])


@pytest.mark.parametrize("changes", [{"split": "9999,1,0"}, {"seq_length": 10_000}])
def test_documents_that_do_not_fill_a_sample_are_refused(prefix, changes):
    """None at all, and too few."""
    with pytest.raises(UsageError, match=f"DATA_PATH={prefix}: its valid split .* SEQ_LENGTH="):
        epoch_of(prefix, "valid", **changes)
