"""Fetching from a store: whole or not at all, going on after a cut, never what is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import s3 as servers
from copies import contents, save
from s3 import BUCKET, S3

from megatron_rocm.checkpoint import remote
from megatron_rocm.checkpoint.folder import TRACKER
from megatron_rocm.checkpoint.manifest import MANIFEST
from megatron_rocm.checkpoint.remote import fetching
from megatron_rocm.checkpoint.remote.send import Plan, Sender
from megatron_rocm.checkpoint.remote.store import Store, StoreError, require
from megatron_rocm.errors import UsageError

running_s3, s3 = servers.fixture()
BIG = {"__0_0.distcp": 20 << 20, "common.pt": 300, "metadata.json": 20}


def send(root: Path, address: str) -> None:
    """Send what `root` holds, in this process."""
    sender = Sender(Plan(address, str(root)))
    sender.find()
    sender.step()
    assert not sender.pending


@pytest.fixture
def address(s3: S3, tmp_path: Path) -> str:
    """Of a store with checkpoints 2 and 4."""
    address = f"s3://{BUCKET}/{tmp_path.name}"
    save(tmp_path / "local", 2)
    save(tmp_path / "local", 4, BIG)
    send(tmp_path / "local", address)
    return address


def test_a_download_that_was_cut_goes_on_where_it_was(s3: S3, address: str, tmp_path: Path, monkeypatch) -> None:
    bare = tmp_path / "bare"
    third = "GET .*4/__0_0"
    s3.fails(third, "cut answer", times=1)
    s3.requests.clear()
    said: list[str] = []
    monkeypatch.setattr(fetching, "WAITS", (0.1,) * 6)
    s3.fails(third, 500, times=12)
    path = remote.fetch(address, None, bare, say=said.append)
    assert contents(path) == contents(tmp_path / "local" / path.name)
    assert sorted(entry.name for entry in bare.iterdir()) == [path.name]
    assert any("trying again" in line for line in said)


def test_what_is_there_is_kept_and_what_is_wrong_is_replaced(s3: S3, address: str, tmp_path: Path) -> None:
    bare, good = tmp_path / "bare", tmp_path / "local" / "iter_0000004"
    work = bare / "iter_0000004.fetching"
    work.mkdir(parents=True)
    blob = (good / "__0_0.distcp").read_bytes()
    (work / "__0_0.distcp.part").write_bytes(blob[: 9 << 20])
    (work / "common.pt").write_bytes(b"x" * 300)
    (work / "of another course").write_bytes(b"x")
    s3.requests.clear()
    path = remote.fetch(address, 4, bare)
    assert contents(path) == contents(good)
    assert len([line for line in s3.requests if line.startswith("GET") and "__0_0" in line]) == 2, (
        "11 MiB are two ranges"
    )
    s3.requests.clear()
    assert remote.fetch(address, 4, bare) == path
    assert not [line for line in s3.requests if "__0_0" in line and line.startswith("GET")]


def test_a_flipped_byte_and_a_missing_file_in_the_store_are_found(s3: S3, address: str, tmp_path: Path, capsys) -> None:
    store = Store(address)
    text = bytearray(store.read("iter_0000002/common.pt") or b"")
    text[7] ^= 1
    store.write("iter_0000002/common.pt", bytes(text))
    assert remote.faults(address, 2, full=False) == []
    assert "common.pt is not as it was written" in remote.faults(address, 2, full=True)[0]
    with pytest.raises(UsageError, match="common.pt is not as it was written"):
        remote.fetch(address, 2, tmp_path / "bare")
    assert not (tmp_path / "bare" / "iter_0000002").exists()
    store.remove("iter_0000004/__0_0.distcp")
    assert remote.faults(address, 4, full=False) == ["__0_0.distcp is missing"]
    assert [one.iteration for one in remote.listing(address) if one.whole] == [2]
    with pytest.raises(UsageError, match="does not hold iteration 4, whole"):
        remote.fetch(address, 4, tmp_path / "bare")


def test_some_files_alone_and_one_checkpoints_own_address(address: str, tmp_path: Path) -> None:
    few = remote.fetch(f"{address}/iter_0000002", None, tmp_path / "few", only=["common.pt", "none"])
    assert sorted(contents(few)) == ["common.pt", MANIFEST]
    assert remote.fetch(f"{address}/iter_0000002", None, tmp_path / "bare").name == "iter_0000002"


def test_removing_spares_the_last_whole_one(address: str) -> None:
    with pytest.raises(UsageError, match="one has to stay"):
        remote.remove(address, [2, 4])
    with pytest.raises(UsageError, match="go on from"):
        remote.remove(address, [4])
    remote.remove(address, [2])
    assert [one.iteration for one in remote.listing(address)] == [4]


def test_one_that_another_tool_has_put_there_is_fetched_without_checksums(s3: S3, tmp_path: Path) -> None:
    store = Store(f"s3://{BUCKET}/foreign")
    for name, text in {"metadata.json": b"{}", "common.pt": b"abc", "__0_0.distcp": b"0123"}.items():
        store.write(f"iter_0000007/{name}", text)
    store.write(TRACKER, b"7\n")
    path = remote.fetch(store.address, None, tmp_path)
    assert contents(path) == {"metadata.json": b"{}", "common.pt": b"abc", "__0_0.distcp": b"0123"}


def test_a_folder_by_its_address_and_others_that_fsspec_knows(tmp_path: Path) -> None:
    save(tmp_path / "local", 2)
    address = f"file://{tmp_path}/store"
    send(tmp_path / "local", address)
    assert contents(remote.fetch(address, None, tmp_path / "bare")) == contents(tmp_path / "local" / "iter_0000002")
    assert [(one.iteration, one.whole, one.latest) for one in remote.listing(address)] == [(2, True, True)]
    with pytest.raises(UsageError, match="no nothing:// is known"):
        require("SAVE_CKPT_PATH", "nothing://bucket/path")
    with pytest.raises(UsageError, match=r"gcsfs is missing: pip install 'megatron-rocm\[gs\]'"):
        require("SAVE_CKPT_PATH", "gs://bucket/path")


def test_a_store_that_is_not_there_is_one_readable_line(s3: S3, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(StoreError, match="HTTP 404, The specified bucket does not exist"):
        Store("s3://no-such-bucket/path").write("x", b"")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(fetching, "WAITS", (0.01,))
    with pytest.raises(UsageError, match="Is the address right, the store up"):
        remote.fetch(f"s3://{BUCKET}/x", None, tmp_path, say=lambda text: None)


def test_a_disk_that_is_too_small_is_said_before(address: str, tmp_path: Path, monkeypatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=30 << 20))
    with pytest.raises(UsageError, match="LOCAL_CKPT_PATH to a folder on a larger disk"):
        remote.fetch(address, 4, tmp_path / "bare")
