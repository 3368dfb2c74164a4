from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from support import tiny_run

from megatron_rocm.errors import UsageError
from megatron_rocm.model.build import ddp_config, optimizer_config, require_attention, transformer_config

DEEP = {"num_layers": 126, "pp": 8, "count_embedding_and_loss": True}


def test_sizes_reach_megatron_core() -> None:
    config = transformer_config(tiny_run(kv_channels=32))
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (4, 64, 160)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (4, 2, 32)
    assert config.gated_linear_unit and not config.add_bias_linear and config.normalization == "RMSNorm"


def test_the_loss_is_a_sum_over_tokens() -> None:
    assert transformer_config(tiny_run()).calculate_per_token_loss


@pytest.mark.parametrize("vpp", [1, 8])
def test_126_layers_over_8_stages(vpp: int) -> None:
    """Embedding and loss count as a layer each: 15, 16 × 6, 15, with and without interleaving."""
    config = transformer_config(tiny_run(**DEEP, vpp=vpp))
    chunks = [None] if vpp == 1 else range(vpp)
    layers = [
        sum(get_num_layers_to_build(config, vp_stage=chunk, pp_rank=rank) for chunk in chunks) for rank in range(8)
    ]
    assert layers == [15, 16, 16, 16, 16, 16, 16, 15]


def test_interleaved_stages_never_batch_their_messages() -> None:
    config = transformer_config(tiny_run(pp=2, vpp=2))
    assert config.overlap_p2p_comm and not config.batch_p2p_comm


def test_gloo_sends_what_is_not_freed() -> None:
    """Freed outputs were sent half overwritten: the loss was off by 0.07 after four steps of PP=2 VPP=2."""
    assert not transformer_config(tiny_run(pp=2)).deallocate_pipeline_outputs
    assert transformer_config(tiny_run(pp=2, vendor="amd")).deallocate_pipeline_outputs


@pytest.mark.parametrize(
    ("field", "off"),
    [
        ("apply_rope_fusion", {"rope_fusion": False}),
        ("fused_single_qkv_rope", {"fused_single_qkv_rope": False}),
        ("gradient_accumulation_fusion", {"gradient_accumulation_fusion": False}),
        ("cross_entropy_loss_fusion", {"cross_entropy_loss_fusion": False}),
    ],
)
def test_a_fusion_needs_transformer_engine_and_can_be_turned_off(
    field: str, off: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    # megatron-core refuses the fusion where its kernel is missing, as it is here.
    monkeypatch.setattr("megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb", print)
    gpu = {"vendor": "amd", "tier": "te", "dtype": "bf16"}
    assert getattr(transformer_config(tiny_run(**gpu)), field)
    assert not getattr(transformer_config(tiny_run(**gpu, **off)), field)
    assert not getattr(transformer_config(tiny_run(dtype="bf16")), field)


def test_fused_cross_entropy_is_for_bf16() -> None:
    assert not transformer_config(tiny_run(vendor="amd", dtype="fp32")).cross_entropy_loss_fusion
    config = transformer_config(tiny_run(vendor="amd", dtype="bf16"))
    assert config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl == "native"


@pytest.mark.parametrize(
    ("fields", "backend"),
    [
        ({"dtype": "bf16"}, AttnBackend.fused),
        ({"dtype": "bf16", "flash_attention": True}, AttnBackend.flash),
        ({"dtype": "fp32", "flash_attention": True}, AttnBackend.unfused),
    ],
)
def test_attention(fields: dict[str, object], backend: AttnBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb", print)
    assert transformer_config(tiny_run(vendor="amd", tier="te", **fields)).attention_backend == backend


@pytest.mark.parametrize("backend", [AttnBackend.flash, AttnBackend.fused, AttnBackend.unfused, AttnBackend.auto])
def test_exported_attention_is_refused_as_megatron_core_refuses_it(
    backend: AttnBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(config=SimpleNamespace(attention_backend=backend))
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        for value in "01":
            with monkeypatch.context() as patch:
                patch.setattr("os.environ", {name: value})
                try:
                    LanguageModule._set_attention_backend(module)
                except AssertionError:
                    with pytest.raises(UsageError, match=f"{name}={value}"):
                        require_attention(backend, {name: value})
                else:
                    require_attention(backend, {name: value})


@pytest.mark.parametrize(
    ("asked", "granularity", "method", "layers"),
    [
        ({}, "full", "block", 4),
        ({"recompute_num_layers": 3}, "full", "block", 3),
        ({"recompute_method": "uniform"}, "full", "uniform", 1),
        ({"recompute_method": "uniform", "recompute_num_layers": 2}, "full", "uniform", 2),
        ({"recompute_granularity": "selective"}, "selective", None, None),
    ],
)
def test_recompute_is_honoured(asked: dict[str, object], granularity: str, method: str, layers: int) -> None:
    config = transformer_config(tiny_run(recompute=True, **asked))
    assert (config.recompute_granularity, config.recompute_method) == (granularity, method)
    assert config.recompute_num_layers == layers
    assert transformer_config(tiny_run(**asked)).recompute_granularity is None


def test_modules_to_recompute() -> None:
    fields = {"recompute": True, "recompute_granularity": "selective"}
    assert transformer_config(tiny_run(**fields)).recompute_modules == ["core_attn"]
    config = transformer_config(tiny_run(**fields, recompute_modules=("core_attn", "mlp")))
    assert config.recompute_modules == ["core_attn", "mlp"]


def test_activations_wait_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb", print)
    gpu = {"vendor": "amd", "tier": "te", "dtype": "bf16"}
    config = transformer_config(tiny_run(**gpu, cpu_offloading_num_layers=3))
    assert config.cpu_offloading and config.cpu_offloading_num_layers == 3
    assert config.cpu_offloading_activations and not config.cpu_offloading_weights
    assert not transformer_config(tiny_run(**gpu)).cpu_offloading
    # megatron-core itself refuses what the rules refuse.
    for asked in ({"cpu_offloading_num_layers": 4}, {"cpu_offloading_num_layers": 1, "pp": 2}):
        with pytest.raises(ValueError, match="[oO]ffloading"):
            transformer_config(tiny_run(**gpu, **asked))


def test_rotary_embeddings_of_undivided_qkv_know_no_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb", print)
    config = transformer_config(tiny_run(vendor="amd", tier="te", dtype="bf16", reset_attention_mask=True))
    assert config.apply_rope_fusion and not config.fused_single_qkv_rope


def test_gradients_are_reduced_in_fp32_unless_asked() -> None:
    assert ddp_config(tiny_run(dtype="bf16")).grad_reduce_in_fp32
    assert not ddp_config(tiny_run(dtype="bf16", grad_reduce_in_bf16=True)).grad_reduce_in_fp32


def test_the_optimizer() -> None:
    config = optimizer_config(tiny_run(dtype="bf16", clip_grad=0.5, weight_decay=0.2))
    assert (config.optimizer, config.clip_grad, config.weight_decay) == ("adam", 0.5, 0.2)
    assert config.bf16 and config.params_dtype is torch.bfloat16 and config.decoupled_weight_decay
    assert optimizer_config(tiny_run(name="sgd")).sgd_momentum == 0.9
    assert not optimizer_config(tiny_run(dtype="bf16", fsdp=True)).bf16  # FSDP's parameters are the master copy


def test_optimizer_state_waits_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # megatron-core asks for Transformer Engine's version, which is missing here.
    monkeypatch.setattr("megatron.core.optimizer.optimizer_config.is_te_min_version", lambda version: True)
    fields = {"vendor": "amd", "dtype": "bf16", "dp": 2, "distributed_optimizer": True}
    config = optimizer_config(tiny_run(**fields, cpu_offload=True, offload_fraction=0.5))
    assert config.optimizer_cpu_offload and config.optimizer_offload_fraction == 0.5
    # Megatron-core's hybrid optimizer reads gradients where this puts them.
    assert config.use_precision_aware_optimizer and config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    assert config.overlap_cpu_optimizer_d2h_h2d and config.decoupled_weight_decay
    config = optimizer_config(tiny_run(**fields))
    assert not config.optimizer_cpu_offload and not config.use_precision_aware_optimizer
    with pytest.raises(AssertionError, match="distributed optimizer"):
        optimizer_config(tiny_run(**{**fields, "distributed_optimizer": False}, cpu_offload=True))
