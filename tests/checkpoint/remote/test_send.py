"""Sending to a real S3 server that fails in all ways: training is never held up, what is sent is whole."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import s3 as servers
from copies import FEW, contents, save
from s3 import BUCKET, S3, SECRET, wait_for

from megatron_rocm.checkpoint import remote
from megatron_rocm.checkpoint.folder import TRACKER
from megatron_rocm.checkpoint.manifest import MANIFEST
from megatron_rocm.checkpoint.remote import held
from megatron_rocm.checkpoint.remote.send import Plan
from megatron_rocm.checkpoint.remote.store import Store
from megatron_rocm.checkpoint.remote.uploader import Uploader

running_s3, s3 = servers.fixture()


@pytest.fixture
def address(request: pytest.FixtureRequest, s3: S3) -> str:
    return f"s3://{BUCKET}/{request.node.name.replace('[', '/').rstrip(']')}"


@pytest.fixture
def start(address: str, tmp_path: Path) -> Iterator[Callable[..., Uploader]]:
    """Start a sender of tmp_path/local that tries again soon."""

    def begin(limit: float = 60, folder: str = "local", **how: object) -> Uploader:
        plan = {"address": address, "folder": str(tmp_path / folder), "first_wait": 0.05, "longest_wait": 0.2, **how}
        return Uploader(Plan(**plan), limit)  # type: ignore[arg-type]

    yield begin
    for process in senders():
        process.kill()


@functools.cache  # making a client takes longer than using it
def store(address: str) -> Store:
    return Store(address)


def whole(address: str) -> list[int]:
    there = store(address)
    return [one for one in held.iterations(there) if held.content(there, one) is not None]


def sender_of(folder: Path) -> psutil.Process:
    return wait_for(
        lambda: next((one for one in senders() if any(str(folder) in word for word in one.cmdline())), None)
    )


def senders() -> list[psutil.Process]:
    """This process's children that send; none that has ended."""
    found = []
    for one in psutil.Process().children():
        with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if "megatron_rocm.checkpoint.remote.send" in one.cmdline():
                found.append(one)
    return found


def puts(s3: S3) -> list[str]:
    """Names of the objects that were written, in order."""
    return [line.split("?")[0].rsplit("/", 1)[-1] for line in list(s3.requests) if line.startswith("PUT")]


def test_files_come_first_then_the_manifest_then_the_tracker(
    s3: S3, address: str, tmp_path: Path, start, capfd
) -> None:
    big = {**FEW, "__0_0.distcp": 20 << 20}
    uploader = start()
    folder = save(tmp_path / "local", 4, big)
    uploader.saved(folder)
    uploader.close()
    names = [name for name in puts(s3) if name in {*big, MANIFEST, TRACKER}]
    assert names[-2:] == [MANIFEST, TRACKER]
    assert set(names[:-2]) == set(big)
    assert names.count("__0_0.distcp") == 3, "20 MiB are three parts"
    assert f"sent checkpoint 4 to {address}" in capfd.readouterr().out
    assert [(one.iteration, one.whole, one.latest) for one in remote.listing(address)] == [(4, True, True)]
    there = remote.fetch(address, None, tmp_path / "bare")
    assert contents(there) == contents(folder)
    assert remote.faults(address, 4, full=True) == []


FAULTS = {
    "500": (r"PUT|POST|GET", 500),
    "cut in a part": (r"PUT .*distcp", "cut"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_and_gone_the_checkpoint_arrives(
    name: str, s3: S3, address: str, tmp_path: Path, start, capfd
) -> None:
    pattern, does = FAULTS[name]
    uploader = start()
    uploader.saved(save(tmp_path / "local", 2))
    wait_for(lambda: whole(address) == [2])
    fault = s3.fails(pattern, does)
    folder = save(tmp_path / "local", 4)
    uploader.saved(folder)
    said = ""

    def told() -> bool:
        nonlocal said
        said += capfd.readouterr().out
        return "warning: checkpoint 4 is not sent yet" in said and fault.met > 3

    wait_for(told)
    assert SECRET not in said and "AKIATEST" not in said and "Traceback" not in said
    assert isinstance(does, str) or f"HTTP {does}" in said
    s3.heal()
    assert whole(address)[0] == 2
    uploader.close()
    assert whole(address) == [2, 4]
    assert remote.faults(address, 4, full=True) == []
    assert "failed tries" in capfd.readouterr().out


def test_a_store_that_hangs_holds_nobody_up_and_the_end_says_what_is_not_sent(
    s3: S3, address: str, tmp_path: Path, start, capfd
) -> None:
    fault = s3.fails("PUT .*distcp", "hang")
    uploader = start(limit=1)
    for iteration in (2, 4, 6):
        uploader.saved(save(tmp_path / "local", iteration))
    wait_for(lambda: fault.met)
    uploader.close()
    said = capfd.readouterr().out
    assert "UPLOAD_TIMEOUT" in said and "checkpoint 2, 4, 6" in said and str(tmp_path / "local") in said
    assert len(list((tmp_path / "local").glob("iter_*"))) == 3, "what is not sent stays here"
    s3.heal()
    assert whole(address) == []
    start().close()  # the same command again
    assert whole(address) == [2, 4, 6]
    assert sorted(path.name for path in (tmp_path / "local").glob("iter_*")) == ["iter_0000004", "iter_0000006"]


@pytest.mark.parametrize("where", ["distcp", MANIFEST, TRACKER])
def test_a_killed_upload_is_ignored_and_the_next_sender_completes_it(
    where: str, s3: S3, address: str, tmp_path: Path, start, capfd
) -> None:
    root = tmp_path / "local"
    uploader = start()
    uploader.saved(save(root, 2))
    wait_for(lambda: f"PUT /{address[5:]}/{TRACKER}" in s3.requests)
    fault = s3.fails(rf"PUT .*{where}($|\?)", "hang")
    folder = save(root, 4)
    uploader.saved(folder)
    wait_for(lambda: fault.met)
    sender_of(root).kill()
    s3.heal()
    found = held.newest(store(address))
    assert found and found[0] == 2, "a bare machine goes on from what is named"
    s3.requests.clear()
    uploader.close()
    assert "it is started again" in capfd.readouterr().out
    assert whole(address) == [2, 4] and held.tracked(store(address)) == 4
    if where != "distcp":
        assert not [name for name in puts(s3) if name in FEW], "the files were there already"
    assert contents(remote.fetch(address, None, tmp_path / "bare")) == contents(folder)


def test_each_node_sends_its_own_files_and_the_manifest_waits_for_all(address: str, tmp_path: Path, start) -> None:
    folder = save(tmp_path / "node0", 4)
    everything = contents(folder)
    other = tmp_path / "node1" / folder.name
    shutil.copytree(folder, other)
    (tmp_path / "node1" / TRACKER).write_text("4")
    (folder / "__1_0.distcp").unlink()
    for name in ("__0_0.distcp", "common.pt", "metadata.json"):
        (other / name).unlink()
    first = start(folder="node0", nodes=2)
    wait_for(lambda: len(store(address).sizes("iter_0000004")) > 3)
    assert MANIFEST not in store(address).sizes("iter_0000004") and whole(address) == []
    second = start(folder="node1", nodes=2, node=1)
    second.close()
    first.close()
    assert contents(remote.fetch(address, None, tmp_path / "bare")) == everything


def test_retention_is_the_stores_too_and_local_copies_go_once_they_are_sent(
    address: str, tmp_path: Path, start
) -> None:
    uploader = start(keep_last=2, keep_every=4)
    for iteration in (2, 4, 6, 8, 10, 12, 14):
        uploader.saved(save(tmp_path / "local", iteration))
        wait_for(lambda iteration=iteration: held.tracked(store(address)) == iteration)
    uploader.close()
    assert whole(address) == [4, 8, 12, 14]
    left = {path.name for path in (tmp_path / "local").glob("iter_*")}
    # 2, 6 and 10 are the saving run's to remove.
    assert left - {"iter_0000002", "iter_0000006", "iter_0000010"} == {"iter_0000012", "iter_0000014"}


def test_a_damaged_local_copy_is_not_sent_and_another_course_replaces_the_step(
    address: str, tmp_path: Path, start, capfd
) -> None:
    uploader = start()
    uploader.saved(save(tmp_path / "local", 4))
    uploader.close()
    shutil.rmtree(tmp_path / "local" / "iter_0000004")
    folder = save(tmp_path / "local", 4)
    blob = folder / "__0_0.distcp"
    with blob.open("r+b") as file:
        file.seek(5)
        file.write(b"\0\1\2\3\4\5\6\7")
    uploader = start()
    wait_for(lambda: whole(address) == [])
    uploader.saved(save(tmp_path / "local", 4))
    uploader.close()
    assert contents(remote.fetch(address, 4, tmp_path / "bare")) == contents(folder)
    assert "checkpoint 4 is not sent" in (said := capfd.readouterr().out) and "is damaged" in said


def test_memory_of_the_sender_is_bounded(address: str, tmp_path: Path, start) -> None:
    """Documented: about 250 MB, however large the checkpoint is."""
    uploader = start()
    process = sender_of(tmp_path / "local")
    uploader.saved(save(tmp_path / "local", 4, {f"__{rank}_0.distcp": 40 << 20 for rank in range(4)}))
    most = 0
    while whole(address) != [4]:
        status = Path(f"/proc/{process.pid}/status").read_text()
        most = max(most, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")))
        time.sleep(0.05)
    uploader.close()
    assert 100_000 < most < 300_000, f"{most} kB"


def test_nothing_of_it_is_left_when_the_process_that_trains_is_killed(s3: S3, address: str, tmp_path: Path) -> None:
    s3.fails("PUT .*distcp", "hang")
    save(tmp_path / "local", 2)
    program = (
        "import os, sys, time\n"
        "from megatron_rocm.checkpoint.remote.send import Plan\n"
        "from megatron_rocm.checkpoint.remote.uploader import Uploader\n"
        f"Uploader(Plan({address!r}, {str(tmp_path / 'local')!r}), 60)\n"
        "time.sleep(600)\n"
    )
    parent = psutil.Popen([os.sys.executable, "-c", program])  # type: ignore[attr-defined]
    try:
        (child,) = wait_for(parent.children)
        wait_for(lambda: any("distcp" in line for line in s3.requests))
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
