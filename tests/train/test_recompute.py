"""What is recomputed changes neither losses nor gradients, and really is recomputed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import execute, metrics, tiny_run, train_all

from megatron_rocm.config.schema import RunConfig

FORWARDS = str(Path(__file__).with_name("count_forwards.py"))
EVERYTHING = ("core_attn", "mlp")


def full(method: str, layers: int) -> dict[str, object]:
    return {"recompute": True, "recompute_method": method, "recompute_num_layers": layers}


def selective(*modules: str) -> dict[str, object]:
    return {"recompute": True, "recompute_granularity": "selective", "recompute_modules": modules}


ALONE = {
    "block, 1": full("block", 1),
    "block, more than there are": full("block", 9),
    "uniform, 1": full("uniform", 1),
    "uniform, 2": full("uniform", 2),
    "core attention": selective("core_attn"),
    "mlp": selective("mlp"),
    "both": selective(*EVERYTHING),
}
# Calls of (attention, MLP) in forward and backward of a micro batch, of 4 layers.
CALLS = {
    "nothing": (4, 4),
    "block, 1": (5, 5),
    "block, more than there are": (8, 8),
    "uniform, 1": (8, 8),
    "uniform, 2": (8, 8),
    "core attention": (8, 4),
    "mlp": (4, 8),
    "both": (8, 8),
}
SEQUENCE = {"tp": 2, "sequence_parallel": True}
LAYOUTS = {
    "tp, sequence parallel, uniform": {**SEQUENCE, **full("uniform", 2)},
    "tp, sequence parallel, both": {**SEQUENCE, **selective(*EVERYTHING)},
    "tp, both": {"tp": 2, **selective(*EVERYTHING)},
    "pp, uniform": {"pp": 2, **full("uniform", 2)},
    "pp, both": {"pp": 2, **selective(*EVERYTHING)},
    "vpp, uniform": {"pp": 2, "vpp": 2, **full("uniform", 1)},
    "vpp, both": {"pp": 2, "vpp": 2, **selective(*EVERYTHING)},
    "cp, uniform": {"cp": 2, **full("uniform", 2)},
    "cp, both": {"cp": 2, **selective(*EVERYTHING)},
    "fsdp, uniform": {"dp": 2, "fsdp": True, **full("uniform", 2)},
    "fsdp, block": {"dp": 2, "fsdp": True, **full("block", 2)},
    "fsdp, core attention": {"dp": 2, "fsdp": True, **selective("core_attn")},
    "fsdp, mlp": {"dp": 2, "fsdp": True, **selective("mlp")},
    "fsdp, both": {"dp": 2, "fsdp": True, **selective(*EVERYTHING)},
    "distributed optimizer, both": {
        "dp": 2, "distributed_optimizer": True, "overlap_grad_reduce": True, **selective(*EVERYTHING)
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """All of them, trained: those of one process in one start, those of two in another."""
    folder = tmp_path_factory.mktemp("recompute")
    alone = {
        name: tiny_run(folder / name, train_iters=3, global_batch_size=2, **fields)
        for name, fields in ({"nothing": {}} | ALONE).items()
    }
    train_all(*alone.values())
    pairs = {
        name: tiny_run(folder / name, train_iters=3, global_batch_size=2, **fields) for name, fields in LAYOUTS.items()
    }
    train_all(*pairs.values())
    return alone | pairs


def rows(run: RunConfig) -> list[tuple[float, float]]:
    return [(row["lm_loss"], row["grad_norm"]) for row in metrics(run) if "lm_loss" in row]


@pytest.mark.timeout(1100)
@pytest.mark.parametrize("name", ALONE)
def test_changes_no_bit(runs: dict[str, RunConfig], name: str) -> None:
    assert len(rows(runs[name])) == 3
    assert rows(runs[name]) == rows(runs["nothing"])


@pytest.mark.timeout(1100)
@pytest.mark.parametrize("name", LAYOUTS)
def test_as_one_process_without(runs: dict[str, RunConfig], name: str) -> None:
    for (loss, norm), (one_loss, one_norm) in zip(rows(runs[name]), rows(runs["nothing"]), strict=True):
        assert abs(loss - one_loss) < 2e-6
        assert abs(norm / one_norm - 1) < 1e-5


@pytest.mark.timeout(1100)
def test_computes_again_what_it_says(tmp_path: Path) -> None:
    runs = [tiny_run(tmp_path / name, **fields) for name, fields in ({"nothing": {}} | ALONE).items()]
    for run in runs:
        Path(run.launch.log_dir).mkdir()
        run.save(Path(run.launch.log_dir) / "run.json")
    said = execute(runs[0], FORWARDS, *(f"{run.launch.log_dir}/run.json" for run in runs), timeout=500)
    counted = json.loads(said.splitlines()[-1])
    assert dict(zip(CALLS, map(tuple, counted), strict=True)) == CALLS
