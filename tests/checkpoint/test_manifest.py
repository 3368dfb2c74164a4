from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import pytest

from megatron_rocm.checkpoint import manifest
from megatron_rocm.checkpoint.manifest import MANIFEST, File, HashingFile
from megatron_rocm.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {}
    for name, content in {"a": b"first", "b": b"x" * 3_000_000}.items():
        with HashingFile(tmp_path / name) as file:
            for at in range(0, len(content), 700_001):
                file.write(content[at : at + 700_001])
        assert (tmp_path / name).read_bytes() == content
        assert file.done == File(len(content), "sha256:" + hashlib.sha256(content).hexdigest())
        files[name] = file.done
    manifest.write(tmp_path, files)
    assert manifest.read(tmp_path) == files
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", MANIFEST}
    return tmp_path


def test_none(tmp_path: Path) -> None:
    assert manifest.read(tmp_path) is None
    assert manifest.read(tmp_path / "nowhere") is None
    assert manifest.faults(tmp_path, full=True) == []


def test_faults(folder: Path) -> None:
    assert manifest.faults(folder, full=True) == []
    (folder / "b").write_bytes(b"x" * 2_999_999 + b"y")
    assert manifest.faults(folder, full=False) == []
    assert [fault for fault in manifest.faults(folder, full=True) if "b " in fault and "checksum" in fault]
    (folder / "b").write_bytes(b"xx")
    (folder / "a").unlink()
    assert len(manifest.faults(folder, full=False)) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[" * 10**5,
        '{"files": {}}',
        '{"files": {"a": {"size": 1}}}',
        '{"files": {"a": 5}}',
        json.dumps({"files": {"../a": {"size": 1, "digest": "sha256:00"}}}),
        json.dumps({"files": {"a": {"size": -1, "digest": "sha256:00"}}}),
        json.dumps({"files": {"a": {"size": 1, "digest": "00"}}}),
    ],
)
def test_a_damaged_one(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UsageError, match=f"{MANIFEST} is damaged"):
        manifest.read(tmp_path)


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(FileExistsError):
        HashingFile(tmp_path / "a")


def test_the_disk_s_own_fault_is_kept() -> None:
    file = HashingFile.__new__(HashingFile)
    file._file, file._hash, file._size = open("/dev/full", "wb", buffering=0), hashlib.sha256(), 0  # noqa: SIM115
    with pytest.raises(OSError):
        file.write(b"x")
    assert file.fault and file.fault.errno == errno.ENOSPC
    file._file.close()
