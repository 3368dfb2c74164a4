from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rocm.checkpoint.folder import TRACKER, WHOLE, checkpoint_path, latest, remove_partial, set_latest
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
