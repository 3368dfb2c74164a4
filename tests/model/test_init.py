"""Initial weights, with stand-ins for megatron-core's model and groups."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny_run

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.model import init

RUN = tiny_run(vocab_size=300, padded_vocab_size=512, num_layers=8)
# The parameters of a stage with one layer, as megatron-core names them, and their undivided shapes.
SHAPES = {
    "embedding.word_embeddings.weight": (512, 64),
    "decoder.layers.0.input_layernorm.weight": (64,),
    "decoder.layers.0.self_attention.linear_qkv.weight": (128, 64),
    "decoder.layers.0.self_attention.linear_proj.weight": (64, 64),
    "decoder.layers.0.mlp.linear_fc1.weight": (320, 64),
    "decoder.layers.0.mlp.linear_fc2.weight": (64, 160),
    "output_layer.weight": (512, 64),
}


def weights(
    monkeypatch: pytest.MonkeyPatch, *, tp: int = 1, rank: int = 0, layer: int = 1, tied: bool = False,
    run: RunConfig = RUN,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What `fill` gives tensor parallel rank `rank` of `tp` on a stage whose one layer is number `layer`."""
    parameters: dict[str, torch.Tensor] = {}
    for name, shape in SHAPES.items():
        cut = list(shape)
        if len(shape) == 2:
            cut[init.SHARDS[init._kind(name)][0]] //= tp
        parameters[name] = torch.full(cut, math.nan)
    stage: Any = SimpleNamespace(
        named_parameters=parameters.items,
        decoder=SimpleNamespace(layers=[SimpleNamespace(layer_number=layer)]),
        share_embeddings_and_output_weights=tied,
    )
    monkeypatch.setattr(init.mpu, "get_tensor_model_parallel_world_size", lambda: tp)
    monkeypatch.setattr(init.mpu, "get_tensor_model_parallel_rank", lambda: rank)
    init.fill(stage, run)
    return parameters


def test_every_weight_is_set_and_norms_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = weights(monkeypatch)
    assert all(torch.isfinite(weight).all() for weight in made.values())
    assert (made["decoder.layers.0.input_layernorm.weight"] == 1).all()


@pytest.mark.parametrize("tp", [2, 4])
def test_shards_are_cut_from_the_same_whole(monkeypatch: pytest.MonkeyPatch, tp: int) -> None:
    whole = weights(monkeypatch)
    shards = [weights(monkeypatch, tp=tp, rank=rank) for rank in range(tp)]
    for name, weight in whole.items():
        parts = [shard[name] for shard in shards]
        if weight.dim() == 1:
            assert all(torch.equal(part, weight) for part in parts)
        elif name.endswith("linear_fc1.weight"):  # each rank has its rows of the gate above its rows of up
            gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
            assert torch.equal(torch.cat([*gates, *ups]), weight)
        else:
            assert torch.equal(torch.cat(parts, init.SHARDS[init._kind(name)][0]), weight)


def test_layers_count_through_all_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, fifth = (weights(monkeypatch, layer=layer) for layer in (1, 1, 5))
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], fifth[name])


def test_the_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    other = weights(monkeypatch, run=tiny_run(seed=1))["output_layer.weight"]
    assert not torch.equal(weights(monkeypatch)["output_layer.weight"], other)


def test_tied_weights_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the last pipeline stage the output layer is a copy of the first stage's embedding."""
    tied, untied = weights(monkeypatch, tied=True), weights(monkeypatch)
    assert torch.equal(tied["output_layer.weight"], tied["embedding.word_embeddings.weight"])
    assert not torch.equal(untied["output_layer.weight"], untied["embedding.word_embeddings.weight"])


def test_padding_is_zero_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = weights(monkeypatch)["output_layer.weight"]
    assert (narrow[300:] == 0).all() and (narrow[:300].std(1) > 0).all()
    monkeypatch.setitem(SHAPES, "output_layer.weight", (768, 64))
    wide = weights(monkeypatch)["output_layer.weight"]
    assert torch.equal(wide[:512], narrow)


def test_deviations(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.02, divided by sqrt(2 · 8 layers) = 4 where a layer adds to the residual stream."""
    made = weights(monkeypatch)
    assert made["decoder.layers.0.mlp.linear_fc1.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("mlp.linear_fc2.weight", "self_attention.linear_proj.weight"):
        assert made[f"decoder.layers.0.{name}"].std().item() == pytest.approx(0.005, rel=0.05)
