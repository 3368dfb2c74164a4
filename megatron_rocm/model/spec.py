"""Which modules a transformer block of this pipeline stage is built from, for each tier of machine."""

from __future__ import annotations

from typing import Literal

from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE, get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_rocm.errors import UsageError
from megatron_rocm.model.attention import SdpaCoreAttention
from megatron_rocm.model.mlp import SwiGluMlp
from megatron_rocm.model.norm import RMSNorm
from megatron_rocm.model.rotary import RotarySelfAttention

# What the torch-only layers are, by the field of TransformerConfig that would ask for something else.
_TORCH_ONLY = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "qk_clip": False,
    "log_max_attention_logit": False,
    "experimental_attention_variant": None,
    "multi_latent_attention": False,
    "num_moe_experts": None,
    "window_size": None,
    "softmax_type": "vanilla",
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "fp8": None,
    "fp4": None,
}


def block_spec(
    config: TransformerConfig, vp_stage: int | None = None, tier: Literal["torch", "te"] = "torch"
) -> TransformerBlockSubmodules:
    """The layers and the final norm of this rank's pipeline stage; `GPTModel` takes it as `transformer_layer_spec`.

    `tier` is "torch" for megatron-core's local layers with our attention and norm, "te" for Transformer Engine's.
    `vp_stage` is the model chunk under interleaved pipelining, else None. Checkpoints of both tiers have the same keys.
    Raises UsageError for what the tier lacks.
    """
    if tier == "te":
        if not HAVE_TE:
            raise UsageError(
                "the Transformer Engine layers need Transformer Engine, which is not installed here: "
                "install megatron-rocm[te] or use the torch-only layers"
            )
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)

    for field, only in _TORCH_ONLY.items():
        asked = getattr(config, field)
        if asked != only:
            raise UsageError(
                f"megatron-core's TransformerConfig has {field}={asked}: the torch-only layers know {only} alone; "
                "use Transformer Engine's layers, on a GPU, for it"
            )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.module = RotarySelfAttention
    layer.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    layer.submodules.mlp = SwiGluMlp
    # A layer spec alone would leave megatron-core's own norm at the end of the block.
    layers = [layer] * get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
