"""Which layers a pipeline stage is built from, and what each tier refuses."""

import pytest


def config(**fields):
    from megatron.core.transformer import TransformerConfig

    plain = dict(num_layers=8, hidden_size=16, num_attention_heads=2, normalization="RMSNorm", transformer_impl="local")
    return TransformerConfig(**{**plain, **fields})


@pytest.fixture
def first_stage(monkeypatch):
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "_MPU_PIPELINE_MODEL_PARALLEL_RANK", 0)


def test_torch_layers_are_ours(first_stage):
    from megatron_rocm.model.attention import SdpaCoreAttention
    from megatron_rocm.model.norm import RMSNorm
    from megatron_rocm.model.spec import block_spec

    block = block_spec(config())
    assert len(block.layer_specs) == 8
    assert block.layer_norm is RMSNorm
    for layer in block.layer_specs:
        assert layer.submodules.input_layernorm is layer.submodules.pre_mlp_layernorm is RMSNorm
        assert layer.submodules.self_attention.submodules.core_attention is SdpaCoreAttention


@pytest.mark.parametrize(("chunks", "vp_stage", "layers"), [(None, None, 4), (2, 1, 2)])
def test_a_stage_gets_its_layers(first_stage, chunks, vp_stage, layers):
    import torch

    from megatron_rocm.model.spec import block_spec

    pipeline = dict(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    cfg = config(**pipeline, virtual_pipeline_model_parallel_size=chunks, overlap_p2p_comm=True, batch_p2p_comm=False)
    assert len(block_spec(cfg, vp_stage).layer_specs) == layers


@pytest.mark.parametrize(
    ("field", "value"),
    [("normalization", "LayerNorm"), ("window_size", (128, 0)), ("num_moe_experts", 4), ("qk_layernorm", True)],
)
def test_torch_layers_refuse_what_they_are_not(field, value):
    from megatron_rocm.errors import UsageError
    from megatron_rocm.model.spec import block_spec

    with pytest.raises(UsageError, match=f"TransformerConfig has {field}="):
        block_spec(config(**{field: value}))


def test_transformer_engine_is_asked_for_where_it_is_missing(monkeypatch):
    from megatron_rocm.errors import UsageError
    from megatron_rocm.model import spec

    monkeypatch.setattr(spec, "HAVE_TE", False)
    with pytest.raises(UsageError, match="not installed"):
        spec.block_spec(config(), tier="te")


def test_transformer_engine_layers_are_megatron_core_s(monkeypatch):
    from megatron_rocm.model import spec

    asked = {}
    monkeypatch.setattr(spec, "HAVE_TE", True)
    monkeypatch.setattr(spec, "get_gpt_decoder_block_spec", lambda config, **options: asked.update(options))
    spec.block_spec(config(), 1, tier="te")
    assert asked == {"use_transformer_engine": True, "vp_stage": 1}
