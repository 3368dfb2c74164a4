"""FP8 that goes wrong: values beyond their scale, Inf, NaN and jumps, each with its step, layer, tensor and rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fp8_state
import pytest
import torch
import torch.distributed as dist
from planting import left, plant, planted, told
from support import tiny_run

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.train import amax, culprit, faults

PROJ, FC1 = "self_attention.linear_proj", "mlp.linear_fc1"
STEP = 4  # micro batches


class Layer(torch.nn.Module):
    def __init__(self, number: int, **recipe: Any) -> None:
        super().__init__()
        self.layer_number = number
        self.mlp = torch.nn.Module()
        self.mlp.linear_fc1 = torch.nn.Linear(2, 2)
        self.mlp.linear_fc1.fp8_meta = fp8_state.meta(**{"length": 64, **recipe})


class Model(torch.nn.Module):
    """What amax looks for of a GPTModel with Transformer Engine's layers."""

    def __init__(self, **recipe: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_layers=2)
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList([Layer(1, **recipe), Layer(2, **recipe)])

    def see(self, layer: int, key: str, *amaxes: float, times: int = 1) -> Model:
        for _ in range(times):
            fp8_state.update(self.decoder.layers[layer - 1].mlp.linear_fc1.fp8_meta, key, *amaxes)
        return self


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process, without megatron-core's groups."""
    monkeypatch.setattr(amax, "core", lambda chunk: chunk)
    monkeypatch.setattr(culprit, "on", lambda ranks: f"on rank {', '.join(map(str, ranks))}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def worst(model: Model) -> Any:
    return amax.worst([model], STEP, faults.MOST_CUT)


def usual(**recipe: Any) -> Model:
    """Twelve micro batches of both layers, the weight's value new in every fourth."""
    model = Model(**recipe)
    for number in range(12):
        weight = 0.5 if number % STEP == 0 else 0.0
        for layer in (1, 2):
            model.see(layer, "scaling_fwd", 3.0, weight, 0.0).see(layer, "scaling_bwd", 1e-3, 0.0)
    return model


def test_usual_values_are_nothing() -> None:
    assert worst(usual()) is None
    assert worst(usual().see(1, "scaling_fwd", 3.0 * 7.9)) is None
    assert worst(Model()) is None


@pytest.mark.parametrize(
    ("key", "amaxes", "what", "times"),
    [
        ("scaling_fwd", (300.0, 0.0), "the input of layer 2 of 2 (mlp.linear_fc1) on rank 0 is 300", 100.0),
        ("scaling_fwd", (3.0, 10.0), "the weight of layer 2 of 2 (mlp.linear_fc1) on rank 0 is 10", 20.0),
        ("scaling_bwd", (1.0, 0.0), "the output's gradient of layer 2 of 2 (mlp.linear_fc1) on rank 0 is 1", 1000.0),
    ],
)
def test_what_exceeds_its_scale_is_named(key: str, amaxes: tuple[float, ...], what: str, times: float) -> None:
    model = usual(length=8) if "weight" not in what else Model(length=8)
    if "weight" in what:
        model.see(2, "scaling_fwd", 3.0, 0.5, times=8)
    seen = worst(model.see(2, key, *amaxes))
    assert seen.times == pytest.approx(times) and seen.what == f"the largest value of {what}"


def test_a_margin_holds_more() -> None:
    assert worst(usual(margin=2).see(1, "scaling_fwd", 90.0)) is None
    assert worst(usual(margin=1).see(1, "scaling_fwd", 90.0)).times == pytest.approx(15.0)


def test_a_jump_of_an_earlier_step_is_past() -> None:
    model = usual().see(1, "scaling_fwd", 300.0)
    assert worst(model)
    assert worst(model.see(1, "scaling_fwd", 3.0, times=STEP)) is None


def test_the_first_values_are_compared_with_none() -> None:
    model = Model().see(1, "scaling_fwd", 1.0, times=amax.FEWEST - 1)
    assert worst(model.see(1, "scaling_fwd", 1000.0)) is None
    assert worst(Model().see(1, "scaling_fwd", 1.0, times=amax.FEWEST).see(1, "scaling_fwd", 1000.0))


def test_each_is_compared_with_what_made_its_scale() -> None:
    rows = (100.0, *[1.0] * 12, 50.0)
    for algo, times in (("max", None), ("most_recent", 50.0)):
        model = Model(algo=algo)
        for row in rows:
            model.see(1, "scaling_fwd", row)
        seen = worst(model)
        assert seen is None if times is None else seen.times == pytest.approx(times)


def test_a_short_history_is_compared_as_far_as_it_goes() -> None:
    assert worst(usual(length=4, algo="most_recent").see(1, "scaling_fwd", 300.0)).times == pytest.approx(100.0)
    assert worst(usual(length=1).see(1, "scaling_fwd", 300.0)) is None


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_no_number_is_the_worst_and_is_forgotten(value: float) -> None:
    model = usual().see(1, "scaling_fwd", 900.0).see(2, "scaling_fwd", value)
    seen = worst(model)
    assert seen.times == math.inf and "the input of layer 2 of 2" in seen.what
    amax.forget([model])
    assert worst(model).times == pytest.approx(300.0)


def test_modules_without_such_a_state_are_passed_over() -> None:
    model = usual()
    model.decoder.layers[0].mlp.linear_fc1.fp8_meta = {"recipe": SimpleNamespace(), "scaling_fwd": SimpleNamespace()}
    model.decoder.layers[1].mlp.linear_fc1.fp8_meta = {"fp8_checkpoint": False, "fp8_group": None}
    assert worst(model) is None


def test_policies_of_what_is_seen() -> None:
    training = tiny_run(spike_factor=2.0, spike_policy="skip", nan_policy="rollback").training
    assert faults.of_amax(training, math.inf, "it is inf").policy == "rollback"  # type: ignore[union-attr]
    cut = faults.of_amax(training, 9.0, "it is 9")
    assert cut and (cut.kind, cut.policy) == ("spike", "skip") and "FP8: it is 9, 9 times what its scale" in cut.what
    assert faults.of_amax(training, faults.MOST_CUT, "it is 8") is None
    assert faults.of_amax(tiny_run(nan_policy="warn").training, 1e9, "SPIKE_FACTOR is 0") is None


FP8 = {"enabled": True, "recipe": "delayed", "amax_history": 64, "spike_factor": 2.0, "train_iters": 5}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    folder = tmp_path_factory.mktemp("pairs")
    cut = plant("output", 1, 2, "self_attention.linear_qkv", value=1000.0, fp8=PROJ)
    plans = {
        "quiet": {"fp8": PROJ},
        "cut, tp": cut,
        "cut, skip, pp": {**cut, "rank": 0},
        "cut, off": cut,
        "cut, tensorwise": cut,
        "nan": plant("output", 1, 3, FC1, fp8=PROJ),
        "jump": plant("loss", 1, value=8.0, sample=39, fp8=PROJ),
        "inf": plant("output", 0, 1, "self_attention.linear_qkv", value=math.inf, fp8=PROJ),
    }
    fields: dict[str, dict[str, Any]] = {
        "quiet": {"tp": 2},
        "cut, tp": {"tp": 2},
        "cut, skip, pp": {"pp": 2, "spike_policy": "skip"},
        "cut, off": {"tp": 2, "spike_factor": 0.0},
        "cut, tensorwise": {"tp": 2, "recipe": "tensorwise"},
        "nan": {"tp": 2, "nan_policy": "stop"},
        "jump": {"dp": 2, "spike_policy": "skip", "train_iters": 11},
        "inf": {"dp": 2, "nan_policy": "skip"},
    }
    runs = {name: tiny_run(folder / name, **{**FP8, **of}) for name, of in fields.items()}
    planted(plans, *runs.values())
    return runs


def seen(run: RunConfig) -> list[str | None]:
    return [step["fault"] for step in left(run, "steps.json")]


@pytest.mark.timeout(300)
def test_a_quiet_run_says_nothing(pairs: dict[str, RunConfig]) -> None:
    assert seen(pairs["quiet"]) == [None] * 5 and "FP8" not in told(pairs["quiet"])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "ranks"), [("cut, tp", "on rank 1 (TP 1"), ("cut, skip, pp", "on rank 0 (TP 0")])
def test_a_cut_value_is_told_with_step_layer_tensor_and_rank(
    pairs: dict[str, RunConfig], name: str, ranks: str
) -> None:
    what = seen(pairs[name])[2]
    assert seen(pairs[name])[:2] == [None, None] and what
    assert f"FP8: the largest value of the input of layer 2 of 4 (self_attention.linear_proj) {ranks}" in what
    assert "times what its scale was made for" in what
    assert "warning: iteration 3: FP8: the largest value" in told(pairs[name])
    skips = name == "cut, skip, pp"
    assert left(pairs[name], "steps.json")[2]["updated"] != skips


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["cut, off", "cut, tensorwise"])
def test_it_is_not_looked_for_where_it_is_off_or_scaled_without_delay(pairs: dict[str, RunConfig], name: str) -> None:
    assert not any("FP8" in (what or "") for what in seen(pairs[name]))


@pytest.mark.timeout(300)
def test_a_nan_ends_the_run_with_its_place(pairs: dict[str, RunConfig]) -> None:
    end = left(pairs["nan"], "end.json")
    assert end.startswith(
        "iteration 3: the lm loss is nan; first not finite is the output of layer 3 of 4 (mlp.linear_fc1)"
    )
    assert "(NAN_POLICY=stop)" in end


@pytest.mark.timeout(300)
def test_an_inf_is_told_and_later_steps_go_on(pairs: dict[str, RunConfig]) -> None:
    steps = left(pairs["inf"], "steps.json")
    assert [step["updated"] for step in steps] == [True, True, False, True, True]
    assert "the lm loss is nan" in steps[2]["fault"] and steps[3]["fault"] is None
    assert (
        "; FP8: the largest value of the input of layer 1 of 4 (self_attention.linear_proj) on rank 0"
        in steps[2]["fault"]
    )


@pytest.mark.timeout(300)
def test_a_jump_of_the_loss_is_told(pairs: dict[str, RunConfig]) -> None:
    steps = left(pairs["jump"], "steps.json")
    assert [step["iteration"] for step in steps if step["fault"]] == [10]
    assert "more than 2 times" in steps[9]["fault"] and not steps[9]["updated"]
