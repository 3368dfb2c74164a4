"""Checkpoints of a course that the run has left, removals that were cut, disks that fail: a folder is the store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from copies import FEW, contents, save
from fsspec.implementations.local import LocalFileSystem

from megatron_rocm.checkpoint import folder, manifest, remote
from megatron_rocm.checkpoint.folder import checkpoint_path, set_latest
from megatron_rocm.checkpoint.remote import held, retain
from megatron_rocm.checkpoint.remote.send import Plan, Sender, local_iterations
from megatron_rocm.checkpoint.remote.store import Store, StoreError


def sender(tmp_path: Path, local: str = "local", **how: int) -> tuple[Sender, list[str]]:
    """One that has found what is in tmp_path/`local`, and what it says."""
    said: list[str] = []
    found = Sender(Plan(f"file://{tmp_path}/store", str(tmp_path / local), **how), said.append)
    found.find()
    return found, said


def there(tmp_path: Path) -> list[int]:
    return [one.iteration for one in remote.listing(f"file://{tmp_path}/store") if one.whole]


def test_what_a_cut_removal_leaves_is_never_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for iteration in (2, 4):
        save(tmp_path / "local", iteration)
    one, _ = sender(tmp_path)
    one.step()
    store, remove = Store(f"file://{tmp_path}/store"), Store.remove
    files = len(store.sizes("iter_0000002"))
    for left in range(1, files):

        def cut(store: Store, name: str) -> None:
            if len(store.sizes("iter_0000002")) <= left:  # noqa: B023
                raise StoreError("cut")
            remove(store, name)

        monkeypatch.setattr(Store, "remove", cut)
        shutil.copytree(checkpoint_path(tmp_path / "local", 2), tmp_path / "store/iter_0000002", dirs_exist_ok=True)
        with pytest.raises(StoreError):
            retain.delete(store, 2)
        assert held.content(store, 2) is None, f"{left} files are left"


def test_a_run_that_has_gone_back_keeps_its_course(tmp_path: Path) -> None:
    """What it left, newer though it is, is neither sent nor named nor kept instead of what the run goes on from."""
    root = tmp_path / "local"
    for iteration in (2, 4):
        save(root, iteration)
    sender(tmp_path)[0].step()
    for iteration in (8, 10):
        save(root, iteration)
    set_latest(root, 4)
    one, _ = sender(tmp_path)
    one.step()
    assert there(tmp_path) == [2, 4] and held.tracked(one.store) == 4
    assert local_iterations(root) == [4, 8, 10]


def test_another_course_that_differs_in_one_nodes_files(tmp_path: Path) -> None:
    """The node whose files are the same says so anew, or the other would wait for it for ever."""
    path = save(tmp_path / "node0", 4)
    shutil.copytree(path, tmp_path / "node1" / path.name)
    (path / "__1_0.distcp").unlink()
    for name in ("__0_0.distcp", "common.pt", "metadata.json"):
        (tmp_path / "node1" / path.name / name).unlink()

    def send() -> None:
        nodes = [sender(tmp_path, f"node{node}", nodes=2, node=node)[0] for node in (0, 1)]
        for node in (1, 0):
            nodes[node].step()
        assert not nodes[0].pending and there(tmp_path) == [4]

    send()
    whole = shutil.copytree(tmp_path / "store" / path.name, tmp_path / "other" / path.name)
    (whole / "common.pt").write_bytes(b"of other settings")
    manifest.write(whole, manifest.described(whole, *FEW))
    everything = contents(whole)
    for name in ("common.pt", "manifest.json"):
        shutil.copy(whole / name, path / name)
    shutil.copy(whole / "manifest.json", tmp_path / "node1" / path.name)
    send()
    assert contents(remote.fetch(f"file://{tmp_path}/store", 4, tmp_path / "bare")) == everything


def test_a_disk_that_fails_does_not_end_the_sender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for iteration in (2, 4, 6):
        save(tmp_path / "local", iteration)

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(folder, "remove", busy)
    one, said = sender(tmp_path)
    one.step()
    assert not one.pending and there(tmp_path) == [2, 4, 6]
    assert "old checkpoints are not removed" in said[-1] and "resource busy" in said[-1]


def test_a_full_disk_behind_plain_files_is_a_fault_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of sftp:// are: they don't let themselves be marked as closed."""
    save(tmp_path / "local", 2)
    one, said = sender(tmp_path)
    opened = LocalFileSystem._open

    def full(system: LocalFileSystem, path: str, mode: str = "rb", **how: Any) -> Any:
        return open("/dev/full", "wb") if path.endswith("distcp") else opened(system, path, mode, **how)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "_open", full)
        one.step()
    assert list(one.pending) == [2] and "No space left on device" in said[0], said
    assert there(tmp_path) == []
    one.step()
    assert there(tmp_path) == [2]
