"""Whatever happens to the newest checkpoint, and wherever it can't be written: a plain message, and the one before it
goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import execute, losses, tiny_run

from megatron_rocm.checkpoint import choose
from megatron_rocm.checkpoint.folder import TRACKER, checkpoint_path
from megatron_rocm.cli import main
from megatron_rocm.errors import UsageError

STEPS = {"train_iters": 6, "save_interval": "2"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    execute(tiny_run(folder / "run", save=str(folder / "saved"), **STEPS))
    return folder


@pytest.fixture
def saved(trained: Path, tmp_path: Path) -> Path:
    """A copy of checkpoints after 2, 4 and 6 steps."""
    return Path(shutil.copytree(trained / "saved", tmp_path / "saved"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def shard(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


# What happens to a checkpoint folder, and what is said of it.
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped byte": (lambda folder: flip(shard(folder)), "distcp is not as it was written: its checksum differs"),
    "a flipped byte of common.pt": (lambda folder: flip(folder / "common.pt"), "common.pt is not as it was written"),
    "a missing file": (lambda folder: shard(folder).unlink(), "distcp is missing"),
    "a file cut off": (lambda folder: os.truncate(shard(folder), 1000), "distcp has 1000 bytes instead of"),
    "no .metadata": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    "an empty folder": (empty, "the folder is empty"),
    "a flipped byte, and no manifest": (
        lambda folder: (flip(shard(folder)), (folder / "manifest.json").unlink()),
        "is not as it was written: the checksum of",
    ),
    "a manifest of zeros": (
        lambda folder: (folder / "manifest.json").write_bytes(bytes(9)),
        "manifest.json is damaged",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told(saved: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    damage, told = FAULTS[fault]
    assert main(["checkpoint", "verify", str(saved)]) == 0
    damage(checkpoint_path(saved, 6))
    assert main(["checkpoint", "verify", str(saved / "iter_0000006")]) == 1
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["a flipped byte", "a flipped byte, and no manifest", "an empty folder"])
def test_the_newest_is_damaged(saved: Path, trained: Path, tmp_path: Path, fault: str) -> None:
    """It is told and skipped, training goes on exactly from the one before, and it is saved anew."""
    damage, told = FAULTS[fault]
    damage(checkpoint_path(saved, 6))
    # Two ranks: whichever of them reads the damaged file, both go on from the same.
    ranks = {"dp": 2} if fault == "a flipped byte" else {}
    text = execute(tiny_run(tmp_path / "run", save=str(saved), **STEPS, **ranks))
    said = f"warning: the checkpoint {saved}/iter_0000006 is damaged: "
    lines = [line for line in text.splitlines() if said in line]
    assert len(lines) == 1 and told in lines[0] and "the one before it is taken" in lines[0]
    assert f"going on after iteration 4 from {saved}/iter_0000004" in text and "Traceback" not in text
    expected = losses(tiny_run(trained / "run"))[4:]
    assert losses(tiny_run(tmp_path / "run")) == pytest.approx(expected, abs=1e-5 if ranks else 0, rel=0)
    assert main(["checkpoint", "verify", str(saved)]) == 0


def test_all_are_damaged(saved: Path, tmp_path: Path) -> None:
    """Status 2 and one message; nothing is trained from the beginning as if there had been nothing."""
    for iteration in (2, 4, 6):
        flip(shard(checkpoint_path(saved, iteration)))
    text = execute(tiny_run(tmp_path / "run", save=str(saved), **STEPS), status=2)
    assert "No whole one is left to go on from" in text and "Traceback" not in text
    assert text.count("is not as it was written") == 3
    assert (saved / TRACKER).read_text() == "6"


@pytest.mark.parametrize("content", [None, "", "six", "\x00"])
def test_the_tracker_is_lost(saved: Path, tmp_path: Path, content: str | None) -> None:
    if content is None:
        (saved / TRACKER).unlink()
    else:
        (saved / TRACKER).write_text(content)
    choice = choose.newest_first(saved)
    assert [path.name for path in choice.paths] == ["iter_0000006", "iter_0000004", "iter_0000002"]
    assert "the newest whole checkpoint is taken" in choice.notes[0]
    assert choose.find(tiny_run(save=str(saved))) == checkpoint_path(saved, 6)


def test_the_tracker_names_another(saved: Path) -> None:
    """As one writes it to go back; and one that is not there."""
    (saved / TRACKER).write_text("4")
    assert choose.find(tiny_run(save=str(saved))) == checkpoint_path(saved, 4)
    (saved / TRACKER).write_text("5")
    assert [path.name for path in choose.newest_first(saved).paths] == ["iter_0000005", "iter_0000004", "iter_0000002"]
    assert choose.find(tiny_run(save=str(saved))) == checkpoint_path(saved, 4)


def test_one_that_may_not_be_read(saved: Path) -> None:
    """Passed over, kept, and told like any other; root may read anything unless it gives that up."""
    checkpoint_path(saved, 6).chmod(0)
    words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    if os.getuid():
        words = []
    elif subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("can't give up what root may")
    code = (
        "import sys; from megatron_rocm.cli import main; from megatron_rocm.checkpoint import folder\n"
        "print(main(['checkpoint', 'ls', sys.argv[1]]), main(['checkpoint', 'prune', sys.argv[1]]))\n"
        "print(*folder.checkpoints(sys.argv[1]))"
    )
    try:
        text = subprocess.check_output([*words, sys.executable, "-c", code, str(saved)], text=True)
    finally:
        checkpoint_path(saved, 6).chmod(0o755)
    assert "damaged: the folder can't be read: Permission denied, latest" in text
    assert "\n0 0\n" in text and text.endswith(f"{saved}/iter_0000004\n") and checkpoint_path(saved, 6).is_dir()


def test_one_that_is_being_written_is_none(saved: Path) -> None:
    partial = checkpoint_path(saved, 6).rename(saved / "iter_0000006.partial")
    with pytest.raises(UsageError, match="there is no checkpoint"):
        choose.find(tiny_run(load=str(partial)))


def test_what_is_not_read_is_told(saved: Path) -> None:
    other = str(saved / "iter_0000002")
    assert "is not read" in choose.candidates(tiny_run(save=str(saved), load=other)).notes[0]
    assert not choose.candidates(tiny_run(save=str(saved), load=str(saved))).notes


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB in memory: room for two checkpoints of 3.1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"can't mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_the_disk_is_full(disk: Path, tmp_path: Path) -> None:
    save = str(disk / "saved")
    text = execute(tiny_run(tmp_path / "run", save=save, **STEPS), status=1)
    assert "No space left on device" in text and "Traceback" not in text
    assert main(["checkpoint", "verify", save]) == 0
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    text = execute(tiny_run(tmp_path / "run", save=save, **STEPS))
    assert f"going on after iteration 4 from {save}/iter_0000004" in text
    assert main(["checkpoint", "verify", save]) == 0


def test_the_folder_is_read_only(disk: Path, tmp_path: Path) -> None:
    save = str(disk / "saved")
    execute(tiny_run(tmp_path / "first", save=save, train_iters=2))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    text = execute(tiny_run(tmp_path / "again", save=save, train_iters=4), status=2)
    assert f"SAVE_CKPT_PATH={save} can't be written: Read-only file system" in text and "Traceback" not in text
    text = execute(tiny_run(tmp_path / "elsewhere", load=save, save=str(tmp_path / "saved"), train_iters=4))
    assert f"going on after iteration 2 from {save}/iter_0000002" in text
    assert (tmp_path / "saved" / TRACKER).read_text() == "4"
