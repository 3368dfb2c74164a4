"""A checkpoint of any layout goes on in any other: every value is the same, and so is the curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, execute, losses, tiny_run

from megatron_rocm.checkpoint.convert.torch_dist import TorchDist
from megatron_rocm.checkpoint.folder import latest
from megatron_rocm.checkpoint.keys import MASTER, MASTERS, STATE
from megatron_rocm.checkpoint.shards import boxes
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.train.adam_state import steps_in

VOCABULARY = 301  # no layout's size divides it
TP = {"tp": 2, "sequence_parallel": True, "padded_vocab_size": 384}
SHARDED = {"distributed_optimizer": True}
FSDP = {"fsdp": True}
# Each takes over from the one before; `core` saves as megatron-core would. By number of processes.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "tp": {**TP},
        "fsdp": {"dp": 2, **FSDP},
        "vpp": {"pp": 2, "vpp": 2},
        "core, plain": {"dp": 2},
        "cp, fsdp": {"cp": 2, **FSDP},
        "dp, distributed": {"dp": 2, **SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True},
        "tp, distributed": {**TP, **SHARDED},
        "core, distributed": {"dp": 2, **SHARDED},
        "pp, distributed": {"pp": 2, **SHARDED, "padded_vocab_size": 512},
    },
    1: {"one": {}, "one, distributed": SHARDED, "one, fsdp": FSDP},
    3: {"dp 3, distributed": {"dp": 3, **SHARDED}, "dp 3, fsdp": {"dp": 3, **FSDP}, "dp 3": {"dp": 3}},
}
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": "bf16"},
    "tied": {"dtype": "bf16", "tied_embeddings": True},
    "sgd": {"name": "sgd"},
}
# Kinds that go through some layouts only.
SOME = {
    "fp32": ("fsdp", "vpp", "core, plain", "tp, distributed", "core, distributed", "one", "dp 3, distributed", "dp 3"),
    "tied": ("tp", "fsdp", "vpp", "one, distributed", "dp 3, fsdp"),
    "sgd": ("fsdp", "vpp", "one", "dp 3, fsdp"),
}
# Four steps in each; twenty in all, with the warmup that any run has: Adam's first updates are the gradient's signs, in
# which rounding shows undamped.
WARM = {"lr_warmup_iters": 10}
CURVE: dict[int, list[dict[str, Any]]] = {2: [TP, {"pp": 2}, {"dp": 2, **FSDP}], 1: [{}], 3: [{"dp": 3, **SHARDED}]}
STEPS = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each kind a run of two processes, its checkpoint saved anew in each layout; a curve through layouts."""
    folder = tmp_path_factory.mktemp("reshard")

    def run(where: str, **fields: Any) -> RunConfig:
        common = {"global_batch_size": 6, "vocab_size": VOCABULARY, "padded_vocab_size": VOCABULARY}
        return tiny_run(folder / where, **{**common, **fields})

    newest = {kind: str(folder / kind / "trained" / "saved") for kind in KINDS}
    last = 0
    for processes in LAYOUTS:
        runs = []
        if processes == 2:
            for kind, fields in KINDS.items():
                first = {"tp": 2, "padded_vocab_size": 384} if kind != "tied" else {"dp": 2, **FSDP}
                runs.append(run(f"{kind}/trained", train_iters=3, save=newest[kind], **{**first, **fields}))
        if processes == 1:
            runs.append(run("undisturbed", train_iters=20, **WARM))
        for kind, fields in KINDS.items():
            for name, layout in LAYOUTS[processes].items():
                if name not in SOME.get(kind, (name,)):
                    continue
                there = str(folder / kind / name / "saved")
                runs.append(run(f"{kind}/{name}", load=newest[kind], save=there, **{**layout, **fields}))
                newest[kind] = there
        for layout in CURVE[processes]:
            last += STEPS
            save = str(folder / "curve" / "saved")
            runs.append(run(f"curve/{last}", train_iters=last, save=save, **WARM, **layout))
        for one in runs:
            Path(one.launch.log_dir).mkdir(parents=True)
            one.save(Path(one.launch.log_dir) / "run.json")
        files = [str(Path(one.launch.log_dir) / "run.json") for one in runs]
        execute(runs[0], str(ROOT / "tests" / "checkpoint" / "resave.py"), *files, timeout=900)
    return folder


def contents(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint in `folder`, however the layout has named it; steps; padding cut off."""
    path = latest(folder)
    assert path
    file = TorchDist(path)
    common = torch.load(path / "common.pt", weights_only=True)
    found = {"steps": torch.tensor(steps_in(common["optimizer"]))}
    for key in file._tensors:
        value = file._read(key, None)
        weight = key.rpartition(STATE)[2].partition(".")[2] if key.startswith(STATE) else key
        if weight.endswith(("word_embeddings.weight", "output_layer.weight")):
            assert not value[VOCABULARY:].any(), key
            value = value[:VOCABULARY]
        if not key.startswith(STATE):
            found[key] = value.to(dtype)
            master = next(prefix for prefix in MASTERS if prefix + key in file._tensors)
            found[MASTER + key] = file._read(master + key, None)[: len(value)]
        elif not key.startswith(MASTERS[:2]):
            found[key] = value
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_the_same_in_every_layout(trained: Path, kind: str) -> None:
    dtype = torch.bfloat16 if kind in ("bf16", "tied") else torch.float32
    expected = contents(trained / kind / "trained" / "saved", dtype)
    kept = {"momentum_buffer"} if kind == "sgd" else {"exp_avg", "exp_avg_sq"}
    assert {key.split(".")[2] for key in expected if key.startswith(STATE)} == {"param", *kept}
    assert expected["steps"] == (0 if kind == "sgd" else 3)
    assert all(value.any() for key, value in expected.items() if key.startswith(STATE))
    for name in SOME.get(kind, [name for layouts in LAYOUTS.values() for name in layouts]):
        found = contents(trained / kind / name / "saved", dtype)
        assert found.keys() == expected.keys(), name
        wrong = [key for key, value in expected.items() if not torch.equal(found[key], value)]
        assert not wrong, (name, wrong)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_curve_goes_on_through_layouts(trained: Path) -> None:
    whole = losses(tiny_run(trained / "undisturbed"))
    parts = sorted((trained / "curve").glob("*/metrics.jsonl"), key=lambda path: int(path.parent.name))
    found = [loss for path in parts for loss in losses(tiny_run(path.parent))]
    assert len(found) == len(whole) == 20
    assert max(abs(a - b) for a, b in zip(found, whole, strict=True)) < 5e-5


@pytest.mark.parametrize("shape", [(7, 5), (6, 1), (1, 6), (35,)])
def test_boxes_cover_a_range_once(shape: tuple[int, ...]) -> None:
    size = torch.Size(shape).numel()
    for first in range(size + 1):
        for last in range(first, size + 1):
            whole = torch.full(shape, -1)
            found = list(boxes(first, last, shape))
            assert len(found) <= 3
            for at, corner, box in found:
                values = torch.arange(at, at + torch.Size(box).numel()).view(box)
                place = tuple(slice(start, start + length) for start, length in zip(corner, box, strict=True))
                assert (whole[place] == -1).all()
                whole[place] = values
            expected = torch.arange(size)
            expected[:first] = expected[last:] = -1
            assert torch.equal(whole.view(-1), expected)
