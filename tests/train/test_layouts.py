"""Every layout trains as one process does, from the same initial weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import losses, metrics, parity, tiny_run, train_all

from megatron_rocm.config.schema import RunConfig

# MODEL_SIZE=tiny as it is, on short sequences and with the warmup that any run has: Adam's first updates are the
# gradient's signs, in which rounding shows undamped.
TINY = ("MODEL_SIZE=tiny", "SEQ_LENGTH=32", "BS=4", "LR_WARMUP_ITERS=10", "TOTAL_ITERS=20", "--steps", "20")
PAIRS = (
    "recompute", "recompute-selective", "dp2", "dp2-sharded", "dp2-overlap", "tp2", "tp2-sp", "pp2", "vpp2", "cp2",
    "fsdp2", "megatron-fsdp2",
)  # fmt: skip
FOURS = ("tp2-pp2", "tp2-cp2", "tp2-dp2", "hsdp")
Rows = dict[str, dict[str, Any]]

# What the table of layouts has not, on a smaller model. FP32 differs from layout to layout in the order of sums alone.
CLOSE = 2e-5
COMMON = {"train_iters": 4, "eval_iters": 1}
TP, VPP = {"tp": 2, "padded_vocab_size": 768}, {"pp": 2, "vpp": 2}
LAYOUTS = {
    "tp": TP,
    "vpp": VPP,
    "tp, sequence parallel, recompute": {"tp": 2, "sequence_parallel": True, "recompute": True},
    "vpp, one layer recomputed": {**VPP, "recompute": True, "recompute_num_layers": 1},
    "dp": {"dp": 2, "micro_batch_size": 2},
    "fsdp, recompute": {"dp": 2, "fsdp": True, "recompute": True},
    "tied, tp": {"tp": 2, "tied_embeddings": True},
    "tied, pp": {"pp": 2, "tied_embeddings": True},
    "fsdp, cp": {"cp": 2, "fsdp": True},
    "tied, fsdp": {"dp": 2, "fsdp": True, "tied_embeddings": True},
}
# In BF16 both keep FP32 master copies, and add up and reduce gradients in FP32.
BF16 = {"bf16, dp": {"dp": 2, "dtype": "bf16"}, "bf16, fsdp": {"dp": 2, "dtype": "bf16", "fsdp": True}}
# A checkpoint of one process, continued in two.
RESHARDED = {"onto tp": TP, "onto pp": {"pp": 2}, "onto vpp": VPP, "onto dp": {"dp": 2}}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    status, rows = parity(tmp_path_factory.mktemp("pairs"), *TINY, "--layouts", ",".join(PAIRS))
    assert status == 0
    return rows


@pytest.fixture(scope="module")
def fours(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    status, rows = parity(tmp_path_factory.mktemp("fours"), *TINY, "--layouts", ",".join(FOURS))
    assert status == 0
    return rows


def must_be_one_process(rows: Rows, name: str) -> None:
    """The first step's gradients, five steps' losses and norms, and twenty steps' losses are those of one process."""
    found, expected = rows[name], rows["one-process"]
    assert max(found["gradients"].values()) < 1e-5
    assert len(found["losses"]) == 20
    apart = [abs(loss - other) for loss, other in zip(found["losses"], expected["losses"], strict=True)]
    assert max(apart[:5]) < 1e-6
    assert max(apart) < 5e-5
    norms = list(zip(found["norms"], expected["norms"], strict=True))[:5]
    assert max(abs(norm - other) / other for norm, other in norms) < 1e-5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PAIRS)
def test_tiny_as_one_process(pairs: Rows, name: str) -> None:
    must_be_one_process(pairs, name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FOURS)
def test_tiny_in_four_processes_as_in_one(fours: Rows, name: str) -> None:
    must_be_one_process(fours, name)


@pytest.mark.timeout(600)
def test_tiny_learns_as_transformers_does(pairs: Rows) -> None:
    ours, theirs = (pairs[name]["losses"] for name in ("one-process", "transformers"))
    assert max(abs(a - b) for a, b in zip(ours[:5], theirs[:5], strict=True)) < 1e-6
    assert theirs[-1] < theirs[0] - 2


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
    others = {name: tiny_run(folder / name, **COMMON, **layout) for name, layout in (LAYOUTS | BF16).items()}
    others |= {name: tiny_run(folder / name, **COMMON, **layout, **load) for name, layout in RESHARDED.items()}
    train_all(*others.values())
    return alone | others


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
