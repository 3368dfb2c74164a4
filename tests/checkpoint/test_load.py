from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from support import execute, losses, metrics, tiny_run, train_all
from torch.distributed.checkpoint.metadata import Metadata

from megatron_rocm.checkpoint import load
from megatron_rocm.checkpoint.choose import Choice
from megatron_rocm.checkpoint.convert.torch_dist import TorchDist
from megatron_rocm.checkpoint.keys import MASTER
from megatron_rocm.config.changes import check
from megatron_rocm.errors import UsageError

BF16 = {"dtype": "bf16", "distributed_optimizer": True}


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
    monkeypatch.setattr(load, "_together", lambda find: Choice((tmp_path,)))
    monkeypatch.setattr(load, "_first_whole", lambda run, choice: (tmp_path, []))
    monkeypatch.setattr(load, "read_common", lambda path: {"run": tiny_run().model_dump(mode="json")})
    with pytest.raises(UsageError, match="names posix.mkdir"):
        load.resume(tiny_run(), state)
    assert not (tmp_path / "sprung").exists()


def test_data_of_another_tokenizer_is_refused() -> None:
    saved = tiny_run(fingerprint="a", tokenizer_model="first").model_dump(mode="json")
    check(tiny_run(fingerprint="a", tokenizer_model="elsewhere"), saved, Path("there"))
    check(tiny_run(), saved, Path("there"))  # mock data
    with pytest.raises(UsageError, match="TOKENIZER_MODEL first → second .the data are of another tokenizer"):
        check(tiny_run(fingerprint="b", tokenizer_model="second"), saved, Path("there"))
    del saved["data"]["fingerprint"]  # of a version that did not note it
    check(tiny_run(fingerprint="b"), saved, Path("there"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in BF16, saved."""
    folder = tmp_path_factory.mktemp("load")
    execute(tiny_run(folder / "first", save=str(folder / "saved"), train_iters=4, **BF16))
    return folder / "saved"


@pytest.mark.timeout(400)
def test_weights_alone_and_all_but_the_optimizer(trained: Path, tmp_path: Path) -> None:
    """FINETUNE=1 begins at iteration 0 with those weights, in any layout; a restart resumes what it has saved itself.

    NO_LOAD_OPTIM=1 goes on at the same sample and learning rate.
    """
    common = {"load": str(trained), "train_iters": 4}
    own = {**common, **BF16, "finetune": True, "save": str(tmp_path / "saved")}
    tuned, again = tiny_run(tmp_path / "tuned", **own), tiny_run(tmp_path / "again", **{**own, "train_iters": 6})
    sgd = tiny_run(tmp_path / "sgd", **common, dtype="bf16", name="sgd", finetune=True)
    fsdp = tiny_run(tmp_path / "fsdp", **common, dtype="bf16", fsdp=True, finetune=True)
    without = tiny_run(tmp_path / "without", **{**common, "train_iters": 6}, **BF16, no_load_optim=True)
    whole = tiny_run(tmp_path / "whole", **{**common, "train_iters": 6}, **BF16)
    fresh = tiny_run(tmp_path / "fresh", train_iters=6, **BF16)
    train_all(tuned, again, sgd, fsdp, without, whole, fresh)
    rates = [[row["learning_rate"] for row in _rows(run)] for run in (tuned, without, whole, fresh)]
    assert rates[0] == rates[3][:4] and rates[1] == rates[2] == rates[3][4:]
    assert [row["iteration"] for row in _rows(again)] == [5, 6]
    first = losses(tuned)[0]
    assert losses(sgd)[0] == losses(fsdp)[0] == pytest.approx(first, abs=1e-3)
    assert first != losses(fresh)[0]
    assert losses(without)[0] == losses(whole)[0]  # the optimizer has not stepped yet
    assert losses(without)[1] != losses(whole)[1]


def _rows(run: Any) -> list[dict[str, Any]]:
    return [row for row in metrics(run) if "lm_loss" in row]


def test_fp32_goes_on_from_the_master_weights(trained: Path, tmp_path: Path) -> None:
    """Not from the rounded ones beside them: PRECISION may change."""
    slow = {"lr": 1e-9, "min_lr": 0, "allow_change": ("PRECISION",)}
    execute(tiny_run(tmp_path / "run", load=str(trained), save=str(tmp_path / "saved"), train_iters=5, **slow))
    there, here = TorchDist(trained / "iter_0000004"), TorchDist(tmp_path / "saved" / "iter_0000005")
    for key in ("embedding.word_embeddings.weight", "decoder.layers.mlp.linear_fc1.weight"):
        master, rounded, found = there.whole(MASTER + key), there.whole(key).float(), here.whole(key)
        assert (found - master).abs().max() < 1e-7 < (rounded - master).abs().max()
    text = execute(tiny_run(tmp_path / "unsaid", load=str(trained), train_iters=5), status=2)
    assert "PRECISION bf16 → fp32" in text and "ALLOW_CHANGE=PRECISION" in text


def test_another_batch_size_goes_on_at_the_same_step_of_the_schedule(trained: Path, tmp_path: Path) -> None:
    more = {"load": str(trained), "train_iters": 6, **BF16}
    same, larger = tiny_run(tmp_path / "same", **more), tiny_run(tmp_path / "larger", **more, global_batch_size=8)
    train_all(same, larger)
    assert [row["learning_rate"] for row in _rows(larger)] == [row["learning_rate"] for row in _rows(same)]
