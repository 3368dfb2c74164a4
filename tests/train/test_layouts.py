"""Every layout trains as one process does, from the same initial weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import losses, metrics, tiny_run, train_all

from megatron_rocm.config.schema import RunConfig

# FP32 differs from layout to layout in the order of sums alone.
CLOSE = 2e-5
COMMON = {"train_iters": 4, "eval_iters": 1}
SHARDED = {"dp": 2, "distributed_optimizer": True}
LAYOUTS = {
    "tp": {"tp": 2, "padded_vocab_size": 768},
    "tp, sequence parallel": {"tp": 2, "sequence_parallel": True},
    "tp, sequence parallel, recompute": {"tp": 2, "sequence_parallel": True, "recompute": True},
    "pp": {"pp": 2},
    "vpp": {"pp": 2, "vpp": 2},
    "vpp, one layer recomputed": {"pp": 2, "vpp": 2, "recompute": True, "recompute_num_layers": 1},
    "cp": {"cp": 2},
    "dp": {"dp": 2, "micro_batch_size": 2},
    "dp, distributed optimizer": SHARDED,
    "dp, distributed optimizer, overlap": {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True},
    "fsdp": {"dp": 2, "fsdp": True},
    "fsdp, recompute": {"dp": 2, "fsdp": True, "recompute": True},
    "tied, tp": {"tp": 2, "tied_embeddings": True},
    "tied, pp": {"pp": 2, "tied_embeddings": True},
}
# In BF16 both keep FP32 master copies, and add up and reduce gradients in FP32.
BF16 = {"bf16, dp": {"dp": 2, "dtype": "bf16"}, "bf16, fsdp": {"dp": 2, "dtype": "bf16", "fsdp": True}}
# A checkpoint of one process, continued in two.
RESHARDED = {"onto tp": LAYOUTS["tp"], "onto pp": LAYOUTS["pp"], "onto vpp": LAYOUTS["vpp"], "onto dp": {"dp": 2}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """All of them, trained: those of one process in one start, those of two in another."""
    folder = tmp_path_factory.mktemp("layouts")
    save = {"save": str(folder / "checkpoints"), "save_interval": 2}
    alone = {
        "alone": tiny_run(folder / "alone", **COMMON, **save),
        "alone, tied": tiny_run(folder / "tied", **COMMON, tied_embeddings=True),
    }
    train_all(*alone.values())
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    load = {"load": save["save"]}
    pairs = {name: tiny_run(folder / name, **COMMON, **layout) for name, layout in (LAYOUTS | BF16).items()}
    pairs |= {name: tiny_run(folder / name, **COMMON, **layout, **load) for name, layout in RESHARDED.items()}
    train_all(*pairs.values())
    return alone | pairs


def difference(run: RunConfig, reference: RunConfig, field: str) -> float:
    """The largest between values of the same iteration."""
    expected = {row["iteration"]: row[field] for row in metrics(reference) if field in row}
    found = {row["iteration"]: row[field] for row in metrics(run) if field in row}
    assert found
    return max(abs(value - expected[iteration]) for iteration, value in found.items())


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", LAYOUTS)
def test_as_one_process(runs: dict[str, RunConfig], name: str) -> None:
    reference = runs["alone, tied" if name.startswith("tied") else "alone"]
    assert len(losses(runs[name])) == 4
    assert difference(runs[name], reference, "lm_loss") < CLOSE
    assert difference(runs[name], reference, "validation_loss") < CLOSE
    # Adam and clipping hide a gradient that is scaled wrongly: its norm does not.
    assert difference(runs[name], reference, "grad_norm") < 1e-4


@pytest.mark.timeout(400)
def test_fsdp_rounds_as_data_parallel_training_in_bf16(runs: dict[str, RunConfig]) -> None:
    sharded, whole = runs["bf16, fsdp"], runs["bf16, dp"]
    assert difference(sharded, whole, "lm_loss") < 2e-4
    # Before the first update the gradients are those of equal weights: reduced in BF16 their norm is off by 1e-5.
    first, expected = (next(row["grad_norm"] for row in metrics(run) if "lm_loss" in row) for run in (sharded, whole))
    assert abs(first - expected) < 1e-6


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", RESHARDED)
def test_goes_on_in_another_layout(runs: dict[str, RunConfig], name: str) -> None:
    assert [row["iteration"] for row in metrics(runs[name]) if "lm_loss" in row] == [3, 4]
    assert difference(runs[name], runs["alone"], "lm_loss") < CLOSE


def test_the_loss_falls(runs: dict[str, RunConfig]) -> None:
    before, *_, after = [row["validation_loss"] for row in metrics(runs["alone"]) if "validation_loss" in row]
    assert after < before - 0.1


def test_there_is_a_picture(runs: dict[str, RunConfig]) -> None:
    assert (Path(runs["alone"].launch.log_dir) / "loss.png").read_bytes().startswith(b"\x89PNG")
