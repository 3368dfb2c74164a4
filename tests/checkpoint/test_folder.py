from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rocm.checkpoint import manifest, phases
from megatron_rocm.checkpoint.folder import (
    PARTIAL,
    SENDING,
    TRACKER,
    WHOLE,
    checkpoint_path,
    checkpoints,
    iteration_of,
    latest,
    place,
    prune,
    remove_partial,
    set_latest,
)
from megatron_rocm.errors import UsageError


def test_nothing_there(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None


def test_the_newest(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 100)
    assert path.name == "iter_0000100"
    path.mkdir()
    (path / WHOLE).touch()
    set_latest(tmp_path, 100)
    assert (tmp_path / TRACKER).read_text() == "100"
    assert latest(tmp_path) == path
    assert sorted(file.name for file in tmp_path.iterdir()) == ["iter_0000100", TRACKER]


@pytest.mark.parametrize("text", ["100", "release", "", "\x00"])
def test_a_tracker_that_names_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(UsageError, match=TRACKER):
        latest(tmp_path)


def test_an_incomplete_one_is_not_whole(tmp_path: Path) -> None:
    checkpoint_path(tmp_path, 7).mkdir()
    set_latest(tmp_path, 7)
    with pytest.raises(UsageError, match="iter_0000007 is missing or incomplete"):
        latest(tmp_path)


def test_partial_ones_go_and_whole_ones_stay(tmp_path: Path) -> None:
    for name in ("iter_0000001", "iter_0000002.partial", "notes"):
        (tmp_path / name).mkdir()
    assert [path.name for path in remove_partial(tmp_path)] == ["iter_0000002.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "notes"]


def whole(root: Path, *iterations: int) -> None:
    for iteration in iterations:
        path = checkpoint_path(root, iteration)
        path.mkdir()
        (path / WHOLE).write_text("{}")
        manifest.write(path, manifest.described(path, WHOLE))


def test_whole_ones_in_order(tmp_path: Path) -> None:
    whole(tmp_path, 20, 3, 100)
    (checkpoint_path(tmp_path, 100) / WHOLE).write_text("{ }")  # another size
    (tmp_path / "iter_0000007.partial").mkdir()
    checkpoint_path(tmp_path, 9).mkdir()
    assert [iteration_of(path) for path in checkpoints(tmp_path)] == [3, 20]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(0, 0, [10, 20, 30, 40, 50]), (2, 0, [10, 40, 50]), (1, 20, [10, 20, 40, 50]), (9, 0, [10, 20, 30, 40, 50])],
)
def test_retention(tmp_path: Path, keep_last: int, keep_every: int, left: list[int]) -> None:
    """The one named stays, even where it is not among the newest."""
    whole(tmp_path, 10, 20, 30, 40, 50)
    set_latest(tmp_path, 10)
    prune(tmp_path, keep_last, keep_every)
    assert [iteration_of(path) for path in checkpoints(tmp_path)] == left
    assert not list(tmp_path.glob(f"*{PARTIAL}"))


def test_retention_where_a_run_has_gone_back(tmp_path: Path) -> None:
    """Newer ones, of a course that it has left, don't count instead of those before the one named."""
    whole(tmp_path, 10, 20, 30, 40, 50)
    set_latest(tmp_path, 30)
    prune(tmp_path, 2, 0)
    assert [iteration_of(path) for path in checkpoints(tmp_path)] == [20, 30, 40, 50]


def test_retention_spares_the_only_whole_one_and_what_is_being_sent(tmp_path: Path) -> None:
    whole(tmp_path, 10, 20, 30)
    for iteration in (20, 30):
        (checkpoint_path(tmp_path, iteration) / WHOLE).unlink()
    prune(tmp_path, 1, 0)
    assert checkpoint_path(tmp_path, 10).exists()
    whole(tmp_path, 40, 50)
    (tmp_path / SENDING).write_text("10")
    prune(tmp_path, 1, 0)
    assert [iteration_of(path) for path in checkpoints(tmp_path)] == [10, 50]


def test_a_checkpoint_in_the_place_of_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no moment does the tracker name what is not there."""
    whole(tmp_path, 10, 20)
    set_latest(tmp_path, 20)
    partial = tmp_path / f"iter_0000020{PARTIAL}"
    partial.mkdir()
    (partial / WHOLE).write_text("anew")
    seen = []

    def look(phase: str) -> None:
        seen.append((tmp_path / TRACKER).read_text())
        assert checkpoint_path(tmp_path, int(seen[-1])).exists()

    monkeypatch.setattr(phases, "listener", look)
    place(partial, checkpoint_path(tmp_path, 20))
    assert seen == ["10", "10"]
    assert latest(tmp_path) == checkpoint_path(tmp_path, 20)
    assert (checkpoint_path(tmp_path, 20) / WHOLE).read_text() == "anew"
    assert not list(tmp_path.glob(f"*{PARTIAL}"))
