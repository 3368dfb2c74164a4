from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from support import tiny_run
from torch.distributed.checkpoint.metadata import Metadata

from megatron_rocm.checkpoint import load
from megatron_rocm.errors import UsageError


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_refused_before_megatron_core_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil: Any = {"a": Trap(tmp_path / "sprung")}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata=evil)))
    state: Any = None
    read = []
    monkeypatch.setattr(load, "_find_together", lambda run: tmp_path)
    monkeypatch.setattr(load.dist_checkpointing, "load_common_state_dict", read.append)
    with pytest.raises(UsageError, match="names posix.mkdir"):
        load.resume(tiny_run(), state)
    assert not read and not (tmp_path / "sprung").exists()


def test_data_of_another_tokenizer_is_refused() -> None:
    saved = tiny_run(fingerprint="a", tokenizer_model="first").model_dump(mode="json")
    load.check(tiny_run(fingerprint="a", tokenizer_model="elsewhere"), saved, Path("there"))
    load.check(tiny_run(), saved, Path("there"))  # mock data
    with pytest.raises(UsageError, match=r"data of another tokenizer \(first\) than this run's \(second\)"):
        load.check(tiny_run(fingerprint="b", tokenizer_model="second"), saved, Path("there"))
    del saved["data"]["fingerprint"]  # of a version that did not note it
    load.check(tiny_run(fingerprint="b"), saved, Path("there"))
