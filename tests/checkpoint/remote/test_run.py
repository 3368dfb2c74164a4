"""Runs that save to a real S3 server: they end as others do whatever it does, and go on from it on a bare machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import s3 as servers
from s3 import BUCKET, S3, SECRET
from support import execute, losses, metrics, tiny_run

from megatron_rocm.checkpoint import remote
from megatron_rocm.checkpoint.remote import held
from megatron_rocm.checkpoint.remote.store import Store
from megatron_rocm.cli import main
from megatron_rocm.config.schema import RunConfig

running_s3, s3 = servers.fixture()
NODES = str(Path(__file__).with_name("nodes.py"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of 8 steps."""
    run = tiny_run(tmp_path_factory.mktemp("undisturbed"), dp=2, train_iters=8)
    execute(run)
    return losses(run)


def saved(tmp_path: Path, name: str, address: str, iters: int, **more: Any) -> RunConfig:
    """A run that saves at every second step; its local copies are in tmp_path/name/local."""
    settings = {"save": address, "local": str(tmp_path / name / "local"), "save_interval": "2", **more}
    fields = {f"checkpoint__{field}": value for field, value in settings.items()}
    return tiny_run(tmp_path / name, dp=2, train_iters=iters, **fields)


def test_a_run_goes_on_on_a_bare_machine_from_the_newest_whole_checkpoint(
    s3: S3, tmp_path: Path, undisturbed: list[float], capsys
) -> None:
    address = f"s3://{BUCKET}/bare"
    first = saved(tmp_path, "first", address, 6, keep_last=2)
    said = execute(first)
    assert "sent checkpoint 6" in said and SECRET not in said
    assert [(one.iteration, one.whole) for one in remote.listing(address)] == [(4, True), (6, True)]
    assert main(["checkpoint", "verify", address]) == 0 and main(["checkpoint", "show", f"{address}/iter_0000004"]) == 0
    told = capsys.readouterr().out
    assert f"{address}/iter_0000006: whole" in told and "iteration 4, 16 samples consumed" in told
    # An upload that was cut: the tracker and the manifest came last, so neither is there.
    store = Store(address)
    store.remove("iter_0000006/manifest.json")
    store.write("latest_checkpointed_iteration.txt", b"4")
    second = saved(tmp_path, "second", address, 8, keep_last=2)
    said = execute(second)
    assert "going on after iteration 4" in said
    assert losses(first)[:4] + losses(second) == undisturbed
    assert held.tracked(store) == 8
    damaged = next((tmp_path / "second/local/iter_0000008").glob("*.distcp"))
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    said = execute(second)
    assert f"remove it, and the next start fetches it from {address} again" in said
    assert "going on after iteration 6" in said
    # Only loaded from: nothing is sent, another folder is saved into.
    third = saved(tmp_path, "third", str(tmp_path / "folder"), 8, load=f"{address}/iter_0000006")
    said = execute(third)
    assert "going on after iteration 6" in said and losses(third) == undisturbed[6:]


def test_a_store_that_fails_costs_nothing_but_messages(s3: S3, tmp_path: Path, undisturbed: list[float]) -> None:
    address = f"s3://{BUCKET}/fails"
    s3.fails(r"(PUT|POST) .*iter_", 507)
    run = saved(tmp_path, "run", address, 6, upload_timeout=2)
    said = execute(run)
    assert losses(run) == undisturbed[:6]
    assert "HTTP 507" in said and "Training goes on" in said and "UPLOAD_TIMEOUT" in said and SECRET not in said
    assert remote.listing(address) == [] or not any(one.whole for one in remote.listing(address))
    s3.heal()
    s3.fails(r"PUT .*distcp", "slow", times=4)
    run = saved(tmp_path, "run", address, 6)
    said = execute(run)  # the same command, as the message says, though all steps are done
    assert "nothing to do" in said and "sent checkpoint 6" in said
    assert {one.iteration for one in remote.listing(address) if one.whole} == {2, 4, 6}


def test_a_store_that_does_not_answer_at_the_start_is_an_error(s3: S3, tmp_path: Path, monkeypatch) -> None:
    said = execute(saved(tmp_path, "run", "s3://no-such-bucket/path", 4), status=2)
    assert "trying again" not in said
    assert "HTTP 404, The specified bucket does not exist" in said and said.count("Is the address right") == 1
    assert "Traceback" not in said
    other = saved(tmp_path, "other", f"s3://{BUCKET}/other", 2)
    execute(other)
    wrong = saved(tmp_path, "other", f"s3://{BUCKET}/another", 4)
    assert "name another folder" in execute(wrong, status=2)


def test_two_nodes_with_disks_of_their_own(
    s3: S3, tmp_path: Path, undisturbed: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, disks = f"s3://{BUCKET}/nodes", tmp_path / "disks"
    run = _on_two_nodes(tmp_path, address, 4)
    execute(run, NODES, str(disks), str(tmp_path / "run" / "run.json"))
    assert [one.iteration for one in remote.listing(address) if one.whole] == [2, 4]
    parts = [{path.name for path in (disks / f"node{node}/local/iter_0000004").iterdir()} for node in (0, 1)]
    assert "__1_0.distcp" not in parts[0] and "__0_0.distcp" not in parts[1]
    # Killed before all was sent: what the nodes' disks have makes it whole.
    store = Store(address)
    for name in ("iter_0000004/manifest.json", "iter_0000004/__1_0.distcp"):
        store.remove(name)
    store.write("latest_checkpointed_iteration.txt", b"2")
    run = _on_two_nodes(tmp_path, address, 6)
    said = execute(run, NODES, str(disks), str(tmp_path / "run" / "run.json"))
    assert "going on after iteration 4" in said
    # Node 1 lost its disk; node 0 kept its part.
    shutil.rmtree(disks / "node1")
    run = _on_two_nodes(tmp_path, address, 8)
    said = execute(run, NODES, str(disks), str(tmp_path / "run" / "run.json"))
    assert "going on after iteration 6" in said and losses(run) == undisturbed
    assert [one.iteration for one in remote.listing(address) if one.whole] == [2, 4, 6, 8]
    # Going back within a run, to a checkpoint of which each node has its part.
    monkeypatch.setenv("NAN_AT", "11")
    run = _on_two_nodes(tmp_path, address, 11)
    said = execute(run, NODES, str(disks), str(tmp_path / "run" / "run.json"))
    assert "Going back to the last checkpoint" in said
    assert [row["iteration"] for row in metrics(run)] == list(range(1, 12))
    assert metrics(run)[-1]["consumed_samples"] == 12 * run.training.global_batch_size


def _on_two_nodes(tmp_path: Path, address: str, iters: int) -> RunConfig:
    settings = {"save": address, "local": "local", "save_interval": "2"}
    fields = {f"checkpoint__{field}": value for field, value in settings.items()}
    return tiny_run(tmp_path / "run", dp=2, nnodes=2, train_iters=iters, **fields)
