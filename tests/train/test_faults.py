"""A step whose loss or gradient is no number, or whose loss jumps: found, traced to its place, and dealt with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from planting import left, plant, planted, told
from support import losses, metrics, tiny_run

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.train import faults

QKV, FC1, FC2 = "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"
SHARDED = {
    "dp": 2, "distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True, "dtype": "bf16",
}  # fmt: skip


# Name: fields of the run, what is planted, where that is said to be. Sample 9 is the third step's.
PLACES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "tp": (
        {"tp": 2}, plant("output", 1, 3, QKV),
        f"the output of layer 3 of 4 ({QKV}), in micro batch 1, on rank 1 (TP 1, CP 0, DP 0, PP 0)",
    ),
    "tp, summed": (
        {"tp": 2, "sequence_parallel": True, "recompute": True}, plant("output", 0, 2, FC2),
        f"the output of layer 2 of 4 ({FC2}), in micro batch 1, on rank 0 (TP 0, CP 0, DP 0, PP 0)",
    ),
    "pp, first stage": (
        {"pp": 2}, plant("output", 0, 2, FC2),
        f"the output of layer 2 of 4 ({FC2}), in micro batch 1, on rank 0 (TP 0, CP 0, DP 0, PP 0)",
    ),
    "pp, last stage": (
        {"pp": 2}, plant("output", 1, 4, FC1),
        f"the output of layer 4 of 4 ({FC1}), in micro batch 1, on rank 1 (TP 0, CP 0, DP 0, PP 1)",
    ),
    "vpp": (
        {"pp": 2, "vpp": 2}, plant("output", 0, 3, QKV),
        f"the output of layer 3 of 4 ({QKV}), in micro batch 1, on rank 0 (TP 0, CP 0, DP 0, PP 0)",
    ),
    "cp": (
        {"cp": 2}, plant("output", 1, 2, FC1),
        f"the output of layer 2 of 4 ({FC1}), in micro batch 1, on rank 1 (TP 0, CP 1, DP 0, PP 0)",
    ),
    "fsdp": (
        {"dp": 2, "fsdp": True}, plant("output", 1, 2, QKV),
        f"the output of layer 2 of 4 ({QKV}), in micro batch 1, on rank 1 (TP 0, CP 0, DP 1, PP 0)",
    ),
    "weight": (
        {"tp": 2}, plant("weight", 1, 1, FC2),
        f"the weight of layer 1 of 4 ({FC2}.weight), before the step, on rank 1 (TP 1, CP 0, DP 0, PP 0)",
    ),
    "gradient, tp": (
        {"tp": 2}, plant("gradient", 1, 3, FC1),
        f"the gradient of the output of layer 3 of 4 ({FC1}), in micro batch 1, on rank 1 (TP 1, CP 0, DP 0, PP 0)",
    ),
    "gradient, pp": (
        {"pp": 2}, plant("gradient", 0, 1, FC1),
        f"the gradient of the output of layer 1 of 4 ({FC1}), in micro batch 1, on rank 0 (TP 0, CP 0, DP 0, PP 0)",
    ),
    "gradient, dp": (
        SHARDED, plant("gradient", 1, 2, QKV),
        f"the gradient of the output of layer 2 of 4 ({QKV}), in micro batch 1, on rank 1 (TP 0, CP 0, DP 1, PP 0)",
    ),
}  # fmt: skip
# Each is hit in its third of five steps; the update is left out.
SKIPS = {
    "skip, loss, dp": ({**SHARDED, "nan_policy": "skip"}, plant("output", 1, 3, FC2)),
    "skip, gradient, dp": ({**SHARDED, "nan_policy": "skip"}, plant("gradient", 1, 3, FC2)),
    "skip, gradient, tp": ({"tp": 2, "nan_policy": "skip"}, plant("gradient", 0, 1, QKV)),
    "skip, gradient, fsdp": ({"dp": 2, "fsdp": True, "nan_policy": "skip"}, plant("gradient", 0, 1, QKV)),
    "skip, gradient, megatron fsdp": (
        {"dp": 2, "megatron_fsdp": True, "nan_policy": "skip"},
        plant("gradient", 1, 2, QKV),
    ),
    "skip, loss, pp": ({"pp": 2, "nan_policy": "skip"}, plant("output", 0, 1, QKV)),
}
SPIKE = {"spike_factor": 2.0, "train_iters": 12}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """All runs of two processes, trained in one start of them."""
    folder = tmp_path_factory.mktemp("pairs")
    runs = {name: tiny_run(folder / name, train_iters=5, **fields) for name, (fields, _, _) in PLACES.items()}
    runs |= {name: tiny_run(folder / name, train_iters=5, **fields) for name, (fields, _) in SKIPS.items()}
    runs["spike"] = tiny_run(folder / "spike", dp=2, distributed_optimizer=True, spike_policy="skip", **SPIKE)
    runs["rollback"] = tiny_run(
        folder / "rollback",
        **SHARDED,
        train_iters=7,
        nan_policy="rollback",
        save=str(folder / "saved"),
        save_interval=2,
    )
    runs["continued"] = tiny_run(
        folder / "continued", **SHARDED, train_iters=7, load=str(folder / "saved/iter_0000004")
    )
    plans = {name: plan for name, (_, plan, _) in PLACES.items()} | {name: plan for name, (_, plan) in SKIPS.items()}
    plans["spike"] = plant("loss", 1, value=8.0, sample=39)
    plans["rollback"] = plant("output", 1, 2, QKV, sample=21)
    plans["continued"] = {"start": 24}
    planted(plans, *runs.values())
    return runs


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PLACES)
def test_names_step_layer_and_rank(pairs: dict[str, RunConfig], name: str) -> None:
    end = left(pairs[name], "end.json")
    what = "lm loss is finite, but the grad norm" if name.startswith("gradient") else "lm loss"
    assert end.startswith(f"iteration 3: the {what} is nan; first not finite is {PLACES[name][2]}. Training ends"), end
    assert "NAN_POLICY=stop" in end
    assert len(left(pairs[name], "steps.json")) == 3
    digests = [step["digest"] for step in left(pairs[name], "steps.json")]
    assert digests[0] != digests[1] and (digests[1] == digests[2] or name == "weight")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SKIPS)
def test_skip_leaves_everything_as_it_was(pairs: dict[str, RunConfig], name: str) -> None:
    steps = left(pairs[name], "steps.json")
    assert left(pairs[name], "end.json") == "finished"
    assert [step["updated"] for step in steps] == [True, True, False, True, True]
    digests = [step["digest"] for step in steps]
    assert digests[1] == digests[2] and len(set(digests)) == 4
    assert steps[3]["learning_rate"] == steps[2]["learning_rate"] > steps[4]["learning_rate"]
    assert [row["consumed_samples"] for row in metrics(pairs[name])] == [4, 8, 12, 16, 20]
    assert all(math.isfinite(step["loss"]) for step in steps[3:])
    line = next(line for line in told(pairs[name]).splitlines() if "iteration        3/" in line)
    assert "number of skipped iterations:   1 | number of nan iterations:   1 |" in line
    assert "The update is left out (NAN_POLICY=skip)" in told(pairs[name])


@pytest.mark.timeout(600)
def test_spike_is_skipped_and_named(pairs: dict[str, RunConfig]) -> None:
    steps = left(pairs["spike"], "steps.json")
    assert [step["iteration"] for step in steps if not step["updated"]] == [10]
    assert steps[9]["digest"] == steps[8]["digest"]
    what = steps[9]["fault"]
    assert "more than 2 times" in what and "is that of the samples on rank 1 (TP 0, CP 0, DP 1, PP 0)" in what
    assert "the largest gradient is that of" in what
    line = next(line for line in told(pairs["spike"]).splitlines() if "iteration       10/" in line)
    assert "number of skipped iterations:   1 | number of nan iterations:   0 |" in line


@pytest.mark.timeout(600)
def test_rollback_goes_on_from_the_checkpoint_past_the_batch(pairs: dict[str, RunConfig]) -> None:
    """As a run does that is started from that checkpoint at the sample after the batch."""
    run, reference = pairs["rollback"], pairs["continued"]
    assert left(run, "end.json") == "finished"
    assert [step["iteration"] for step in left(run, "steps.json")] == [1, 2, 3, 4, 5, 6, 5, 6, 7]
    assert [row["iteration"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["consumed_samples"] for row in metrics(run)][4:] == [28, 32, 36]
    assert losses(run)[4:] == losses(reference)
    assert [step["digest"] for step in left(run, "steps.json")[-3:]] == [
        step["digest"] for step in left(reference, "steps.json")
    ]


@pytest.mark.timeout(600)
def test_policies_of_one_process(tmp_path: Path) -> None:
    save = {"save_interval": 3, "train_iters": 14}
    whole = tiny_run(tmp_path / "whole", **SPIKE, spike_policy="skip")
    begun = tiny_run(
        tmp_path / "begun", spike_factor=2.0, spike_policy="skip", train_iters=6, save=str(tmp_path / "begun/saved")
    )
    resumed = tiny_run(tmp_path / "resumed", **SPIKE, spike_policy="skip", load=str(tmp_path / "begun/saved"))
    warned = tiny_run(tmp_path / "warned", train_iters=5, nan_policy="warn")
    again = tiny_run(tmp_path / "again", **save, nan_policy="rollback", save=str(tmp_path / "again/saved"))
    both = tiny_run(tmp_path / "both", **SPIKE, nan_policy="skip")
    early = tiny_run(tmp_path / "early", **save, nan_policy="rollback", save=str(tmp_path / "early/saved"))
    spike = plant("loss", 0, value=8.0, sample=39)
    planted(
        {
            "whole": spike,
            "resumed": spike,
            "warned": plant("loss", 0),
            "both": plant("loss", 0, value=8.0, backward=math.nan, sample=39),
            "again": plant("output", 0, 1, QKV, sample=19, last=999),
            "early": plant("output", 0, 1, QKV, sample=3),
        },
        *(whole, begun, resumed, warned, both, again, early),
    )
    # The median's window is the checkpoint's: without it the spike, the fourth step after the resume, would pass.
    assert [step["updated"] for step in left(whole, "steps.json")] == [True] * 9 + [False] + [True] * 2
    assert losses(resumed) == losses(whole)[6:]
    assert [step["updated"] for step in left(resumed, "steps.json")] == [True] * 3 + [False] + [True] * 2

    assert [step["updated"] for step in left(warned, "steps.json")] == [True] * 5
    assert "The update is made all the same (NAN_POLICY=warn)" in told(warned)

    # The spike alone is but warned of; its gradient is not finite, which is the worse of the two.
    assert [step["updated"] for step in left(both, "steps.json")] == [True] * 9 + [False] + [True] * 2
    assert "the lm loss is finite, but the grad norm is nan" in left(both, "steps.json")[9]["fault"]

    iterations = [step["iteration"] for step in left(again, "steps.json")]
    assert iterations == [1, 2, 3, 4, 5, 4, 4, 4]
    assert "3 times in a row" in left(again, "end.json")
    assert sorted(path.name for path in (tmp_path / "again/saved").glob("iter_*")) == ["iter_0000003"]

    assert "There is no checkpoint yet to go back to (NAN_POLICY=rollback)" in left(early, "end.json")


def test_what_is_a_spike() -> None:
    training = tiny_run(spike_factor=1.5).training
    usual = [4.0, 4.2, 4.1, 3.9, 4.0, 4.1, 4.0, 50.0]
    assert faults.of_loss(training, usual, 6.0) is None
    found = faults.of_loss(training, usual, 6.1)
    assert found and found.kind == "spike" and found.policy == "warn" and not found.leaves_out
    assert faults.of_loss(training, usual[1:], 60.0) is None  # too few to judge by
    assert faults.of_loss(tiny_run().training, usual, 1e9) is None
    assert faults.of_loss(training, usual, math.inf).kind == "nan"  # type: ignore[union-attr]


def test_the_window_of_recent_losses() -> None:
    training = tiny_run(spike_factor=1.5).training
    recent: list[float] = []
    for loss in (math.nan, *map(float, range(40)), math.inf):
        recent = faults.remember(training, recent, loss)
    assert recent == [float(loss) for loss in range(8, 40)]
    assert faults.remember(tiny_run().training, [], 1.0) == []
