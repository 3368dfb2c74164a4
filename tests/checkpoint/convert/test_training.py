"""Hugging Face → Megatron → one step of training → Hugging Face, for each family and in several layouts."""

import json
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, make, weights_of
from support import losses, tiny_run, train_all

from megatron_rocm.checkpoint.convert.from_huggingface import FromHuggingFace
from megatron_rocm.checkpoint.convert.from_megatron import FromMegatron
from megatron_rocm.checkpoint.convert.to_huggingface import write_huggingface
from megatron_rocm.checkpoint.convert.to_megatron import write_checkpoint

LR = 1e-3
# Of two processes: what TINY has otherwise, and a family.
LAYOUTS = {
    "tp2": ("llama3.1", {"tp": 2, "padded_vocab_size": 512}),
    "pp2": ("llama3.2", {"pp": 2}),
    "fsdp2": ("llama2", {"fsdp": True, "dp": 2, "dtype": "bf16"}),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        write_checkpoint(FromHuggingFace(make(family, root / family / "hf")), root / family / "megatron")
    return root


def run_of(root: Path, family: str, name: str, **changes):
    model = FromHuggingFace(root / family / "hf").model.model_dump()
    folder = root / name
    fields = {"lr": LR, "weight_decay": 0.0, "train_iters": 1, "seq_length": 32, **model, **changes}
    return tiny_run(folder, load=str(root / family / "megatron"), save=str(folder / "checkpoints"), **fields)


@pytest.fixture(scope="module")
def trained(converted) -> Path:
    train_all(*(run_of(converted, family, f"{family}/run") for family in FAMILIES))
    train_all(*(run_of(converted, family, name, **changes) for name, (family, changes) in LAYOUTS.items()))
    return converted


def exported(root: Path, name: str) -> Path:
    out = root / name / "exported"
    return out if out.is_dir() else write_huggingface(FromMegatron(root / name / "checkpoints"), out)


@pytest.mark.parametrize(
    ("family", "name"),
    [*((family, f"{family}/run") for family in FAMILIES), *((family, name) for name, (family, _) in LAYOUTS.items())],
)
def test_a_step_moves_every_weight_by_the_learning_rate_at_most(trained, family, name):
    """So each is where it belongs: Adam's first step is LR, whatever the gradient."""
    before, after = weights_of(trained / family / "hf"), weights_of(exported(trained, name))
    assert before.keys() == after.keys()
    for key, weight in after.items():
        moved = (weight.float() - before[key].float()).abs()
        rounding = before[key].float().abs() * torch.finfo(weight.dtype).eps
        assert (moved <= 1.01 * LR + rounding).all() and moved.max() > LR / 2, key
    mine, theirs = (
        json.loads((path / "config.json").read_text()) for path in (trained / family / "hf", exported(trained, name))
    )
    assert {**mine, "dtype": theirs["dtype"]} == theirs


def test_layouts_begin_with_the_same_loss(trained):
    """Of three families in two processes, and of the same ones in one."""
    for name, (family, _) in LAYOUTS.items():
        one, two = losses(run_of(trained, family, f"{family}/run")), losses(run_of(trained, family, name))
        assert two == pytest.approx(one, abs=2e-2 if name == "fsdp2" else 5e-5)
