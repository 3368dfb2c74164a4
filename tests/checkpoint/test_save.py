"""When a run saves, how it goes on meanwhile, and what becomes of a save that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, environment, execute, losses, tiny_run

from megatron_rocm.checkpoint import manifest
from megatron_rocm.checkpoint.folder import checkpoints
from megatron_rocm.checkpoint.phases import SAVE
from megatron_rocm.config.schema import RunConfig

HERE = ROOT / "tests" / "checkpoint"


def executed(how: str, run: RunConfig, status: int = 0) -> str:
    return execute(run, str(HERE / "savers.py"), how, str(Path(run.launch.log_dir) / "run.json"), status=status)


def saved(run: RunConfig) -> list[int]:
    return [int(path.name.removeprefix("iter_")) for path in checkpoints(run.checkpoint.save or "")]


def status(run: RunConfig) -> dict[str, str]:
    return json.loads((Path(run.launch.log_dir) / "status.json").read_text())


def test_a_signal_asks_for_a_save_and_training_goes_on(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, save=str(tmp_path / "saved"), train_iters=5)
    executed("asked", run)
    assert saved(run) == [3, 5]


def test_minutes_between_saves(tmp_path: Path) -> None:
    """A step takes 25 s here, so that a minute is over at the end of every third."""
    run = tiny_run(tmp_path, save=str(tmp_path / "saved"), train_iters=10, save_interval="1m")
    executed("clock", run)
    assert saved(run) == [3, 6, 9, 10]


def test_exit_duration(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, save=str(tmp_path / "saved"), train_iters=5, exit_duration=1e-4)
    text = execute(run)
    assert saved(run) == [1]
    assert status(run)["outcome"] == "stopped" and "start the same command again" in text


def test_a_save_in_the_background_holds_the_state_at_its_step(tmp_path: Path) -> None:
    """Written when training has gone on, it has the bytes of one that training waited for; so has training itself."""
    fields = {"train_iters": 5, "save_interval": 3, "dtype": "bf16"}
    late = tiny_run(tmp_path / "late", save=str(tmp_path / "late" / "saved"), **fields)
    fields = {**fields, "train_iters": 4, "async_save": False}
    waited = tiny_run(tmp_path / "waited", save=str(tmp_path / "waited" / "saved"), **fields)
    execute(waited)
    executed("late", late)
    files = [manifest.read(checkpoints(run.checkpoint.save or "")[0]) for run in (late, waited)]
    assert files[0] and files[1]
    assert files[0]["__0_0.distcp"] == files[1]["__0_0.distcp"]
    assert losses(late)[:4] == losses(waited)


def test_a_run_that_diverges_still_ends_its_last_good_save(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, save=str(tmp_path / "saved"), train_iters=6, save_interval=3)
    text = executed("diverges", run, status=1)
    assert saved(run) == [3] and f"saved {tmp_path}/saved/iter_0000003" in text
    assert status(run)["outcome"] == "diverged"


def test_a_save_that_fails(tmp_path: Path) -> None:
    """Training goes on and saves again; three in a row end it, and so does the last one. What is whole stays."""
    fields = {"dp": 2, "save_interval": 1}
    run = tiny_run(tmp_path, save=str(tmp_path / "saved"), train_iters=9, **fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULL", "02 03 05 06 07")
        text = executed("refused", run, status=1)
        assert saved(run) == [1, 4]
        assert not list((tmp_path / "saved").glob("*.partial"))
        reason = f"could not be saved: rank 1: No space left on device ({tmp_path}/saved). The checkpoint before it is"
        for iteration in (2, 3, 5, 6):
            assert f"warning: the checkpoint of iteration {iteration} {reason} untouched" in text
        assert text.count("3 saves in a row have failed") == 1 and "Traceback" not in text
        assert status(run)["outcome"] == "unsaved"
        patch.setenv("FULL", "05")
        last = tiny_run(tmp_path, save=str(tmp_path / "saved"), train_iters=5, async_save=False, **fields)
        assert f"error: the checkpoint of iteration 5 {reason}" in executed("refused", last, status=1)
        assert saved(run) == [1, 4]


def test_nodes_with_folders_of_their_own(tmp_path: Path) -> None:
    """Each has what its processes wrote and a manifest of all; what comes after a save is told and harms nothing."""
    run = tiny_run(tmp_path, save=str(tmp_path / "saved"), dp=2, nnodes=2, keep_last=2)
    text = executed("apart", run)
    common = {".metadata", "common.pt", "metadata.json"}
    own = [{"__0_0.distcp", *common}, {"__1_0.distcp"}]
    for rank, files in enumerate(own):
        root = tmp_path / "saved" / str(rank)
        assert {file.name for file in root.iterdir()} == {
            "iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt",
        }  # fmt: skip
        path = root / "iter_0000003"
        assert {file.name for file in path.iterdir()} == {*files, manifest.MANIFEST}
        assert (manifest.read(path) or {}).keys() == own[0] | own[1]
        assert all("missing" in fault for fault in manifest.faults(path, full=True))
        for iteration in (1, 2, 3):
            assert f"rank {rank} uploads iter_000000{iteration}: {', '.join(sorted(files))}\n" in text
    assert text.count("warning: rank 1: cut") == 3
    files = manifest.read(path) or {}
    assert 0.8 < files["__0_0.distcp"].size / files["__1_0.distcp"].size < 1.25, "what both have is divided"


@pytest.mark.timeout(900)
def test_killed_in_every_phase(tmp_path: Path) -> None:
    """kill -9 at random moments: each restart goes on from a whole checkpoint, with an undisturbed run's losses."""
    words = [str(HERE / "killer.py"), str(tmp_path), "--kills", "10"]
    done = subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert "losses as undisturbed" in done.stdout
    assert all(f"\n  {phase} " in done.stdout for phase in SAVE)
