"""Attention within documents: as if each had a forward pass of its own, in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from support import execute, losses, metrics, tiny_run, train_all

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.data.indexed import IndexedWriter
from megatron_rocm.model.documents import boundaries, lengths

EOD = 1
PASSES = str(Path(__file__).with_name("document_passes.py"))
RESET = {"reset_attention_mask": True, "reset_position_ids": True}
SHARDED = {"dp": 2, "distributed_optimizer": True}
UNIFORM = {"recompute": True, "recompute_method": "uniform", "recompute_num_layers": 2}
LAYOUTS = {
    "tp, sequence parallel": {"tp": 2, "sequence_parallel": True},
    "tp, sequence parallel, recompute": {"tp": 2, "sequence_parallel": True, "recompute": True},
    "pp": {"pp": 2},
    "pp, core attention recomputed": {"pp": 2, "recompute": True, "recompute_granularity": "selective"},
    "vpp": {"pp": 2, "vpp": 2},
    "cp": {"cp": 2},
    "cp, recompute": {"cp": 2, "recompute": True},
    "dp": {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True, "micro_batch_size": 1},
    "fsdp": {"dp": 2, "fsdp": True, "micro_batch_size": 1},
    "fsdp, layers recomputed in units": {"dp": 2, "fsdp": True, **UNIFORM, "micro_batch_size": 1},
    "fsdp, cp": {"cp": 2, "fsdp": True},
    "megatron fsdp": {"dp": 2, "megatron_fsdp": True, "micro_batch_size": 1},
    "fsdp, recompute": {"dp": 2, "fsdp": True, "recompute": True, "micro_batch_size": 1},
}


def write(prefix: Path) -> list[tuple[float, str]]:
    """Documents of 1 to 30 ids, the last of them EOD, each counting upwards from somewhere: what a model can learn."""
    random = numpy.random.RandomState(3)
    with IndexedWriter(prefix, 300) as writer:
        for _ in range(400):
            size = random.randint(1, 31)
            ids = 2 + (random.randint(298) + numpy.arange(size)) % 298
            ids[-1] = EOD
            writer.add(ids, numpy.array([size]))
        writer.finalize()
    return [(1.0, str(prefix))]


def run_of(folder: Path, name: str, blend: list[tuple[float, str]], **fields: object) -> RunConfig:
    common = {"train_iters": 3, "eval_iters": 1, "split": "90,10,0", "micro_batch_size": 2}
    return tiny_run(folder / name, **{**common, "blend": blend, **RESET, **fields})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """All of them, trained: those of one process in one start, those of two in another."""
    folder = tmp_path_factory.mktemp("documents")
    blend = write(folder / "data")
    alone = {
        "alone": run_of(folder, "alone", blend),
        "alone, masked": run_of(folder, "masked", blend, eod_mask_loss=True),
        "alone, across": run_of(folder, "across", blend, reset_attention_mask=False, reset_position_ids=False),
    }
    train_all(*alone.values())
    pairs = {name: run_of(folder, name, blend, **layout) for name, layout in LAYOUTS.items()}
    pairs |= {
        f"{name}, masked": run_of(folder, f"{name}, masked", blend, **LAYOUTS[name], eod_mask_loss=True)
        for name in ("dp", "fsdp", "cp")
    }
    train_all(*pairs.values())
    return alone | pairs


@pytest.mark.timeout(1100)
@pytest.mark.parametrize("name", [*LAYOUTS, "dp, masked", "fsdp, masked", "cp, masked"])
def test_as_one_process(runs: dict[str, RunConfig], name: str) -> None:
    reference = runs["alone, masked" if name.endswith("masked") else "alone"]
    rows = [row for row in metrics(runs[name]) if "lm_loss" in row]
    wanted = [row for row in metrics(reference) if "lm_loss" in row]
    assert len(rows) == 3
    for row, one in zip(rows, wanted, strict=True):
        assert abs(row["lm_loss"] - one["lm_loss"]) < 2e-6
        assert abs(row["grad_norm"] / one["grad_norm"] - 1) < 1e-5
    found, expected = (_validation(run) for run in (runs[name], reference))
    assert found == pytest.approx(expected, abs=2e-5)


def _validation(run: RunConfig) -> list[float]:
    return [row["validation_loss"] for row in metrics(run) if "validation_loss" in row]


@pytest.mark.timeout(1100)
def test_each_switch_tells(runs: dict[str, RunConfig]) -> None:
    """The same samples give other losses: nothing above passes because documents were never looked at."""
    first = [losses(runs[name])[0] for name in ("alone", "alone, masked", "alone, across")]
    assert min(abs(a - b) for a, b in ((first[0], first[1]), (first[0], first[2]))) > 1e-4


@pytest.mark.timeout(1100)
def test_is_a_pass_for_each_document(tmp_path: Path) -> None:
    run = run_of(tmp_path, "run", write(tmp_path / "data"), micro_batch_size=4)
    said = json.loads(execute(run, PASSES, str(tmp_path / "run" / "run.json"), timeout=500).splitlines()[-1])
    assert said["documents"] > 8
    assert said["loss"] < 2e-6 and said["gradient"] < 1e-5
    assert said["across"] > 1e-3  # attention over the whole row is something else
    # megatron-core reads no position_ids for rotary embeddings: resetting them alone changes nothing.
    assert said["positions"] == 0


def test_lengths() -> None:
    rows = [[5, 6, EOD, 7, 8, 9], [EOD, EOD, 5, 6, 7, EOD], [5, 6, 7, 8, 9, 5]]
    assert lengths(torch.tensor(rows), EOD) == ((3, 3), (1, 1, 4), (6,))


def test_transformer_engine_gets_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    run = tiny_run(vendor="nvidia", tier="te", dtype="bf16", micro_batch_size=2, **RESET)
    packed = boundaries(run, torch.tensor([[5, EOD, 7, 8], [5, 6, 7, EOD]]))
    assert packed.qkv_format == "thd" and packed.cu_seqlens_q_padded is None
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 2, 4, 8]
    assert packed.cu_seqlens_q.dtype == torch.int32 and packed.max_seqlen_q == packed.max_seqlen_kv == 4
