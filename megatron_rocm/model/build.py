"""RunConfig → megatron-core's configuration objects and a Llama as its GPTModel.

The three `*_config` functions are pure: they need no process group, so that a RunConfig can be checked against
megatron-core's own classes anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.model import fp8, fsdp, megatron_fsdp
from megatron_rocm.model.gradients import DataParallel
from megatron_rocm.model.init import fill
from megatron_rocm.model.llama import Llama, core
from megatron_rocm.model.spec import block_spec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Transformer Engine's switches, and the backends with which megatron-core (language_module.py:92) sets them to 1.
ATTENTION_VARIABLES = {
    "NVTE_FLASH_ATTN": (AttnBackend.flash, AttnBackend.auto),
    "NVTE_FUSED_ATTN": (AttnBackend.fused, AttnBackend.auto),
    "NVTE_UNFUSED_ATTN": (AttnBackend.unfused, AttnBackend.auto),
}


def transformer_config(run: RunConfig) -> TransformerConfig:
    """megatron-core's view of the model and its layout. Raises what TransformerConfig raises (ValueError)."""
    model, parallel, precision = run.model, run.parallel, run.precision
    gpu = run.hardware.vendor != "cpu"
    te = run.hardware.tier == "te"
    dtype = DTYPES[precision.dtype]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        deterministic_mode=run.training.deterministic,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        account_for_embedding_in_pipeline_split=parallel.count_embedding_and_loss,
        account_for_loss_in_pipeline_split=parallel.count_embedding_and_loss,
        # Interleaved stages with batched p2p are silently wrong at PP=2 (loss off by 0.36 after five steps).
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
        # An output is freed once its sending has begun. A GPU's stream sends it first; gloo sends what is there then.
        deallocate_pipeline_outputs=gpu,
        # The loss is a sum over tokens, divided once by the step's token count. DDP reads this when it is built:
        # set later, it leaves gradients divided by the data parallel size as well.
        calculate_per_token_loss=True,
        transformer_impl="transformer_engine" if te else "local",
        attention_backend=_attention_backend(run),
        use_cpu_initialization=not gpu,
        # torch.compiled or Triton kernels: on a CPU they cost 24 s at the first step and bring nothing.
        bias_activation_fusion=gpu,
        bias_dropout_fusion=gpu,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=te and precision.rope_fusion,
        # Of documents within a row it knows nothing: megatron-core asserts that it is off for them.
        fused_single_qkv_rope=te
        and precision.rope_fusion
        and precision.fused_single_qkv_rope
        and not run.data.reset_attention_mask,
        gradient_accumulation_fusion=te and not parallel.fsdp and precision.gradient_accumulation_fusion,
        # In FP32 and FP16 the fused kernel rounds gradients to BF16, and Megatron-LM calls it not deterministic.
        cross_entropy_loss_fusion=gpu
        and precision.dtype == "bf16"
        and precision.cross_entropy_loss_fusion
        and not run.training.deterministic,
        cross_entropy_fusion_impl=precision.cross_entropy_fusion_impl if te else "native",
        **_activations(run),
        **_fp8(run),
        **run.core.transformer,
    )


def _fp8(run: RunConfig) -> dict[str, Any]:
    """Which products are computed in FP8, and how they are scaled."""
    how = run.fp8
    if not how.enabled:
        return {}
    return {
        "fp8": how.format,
        "fp8_recipe": how.recipe,
        "fp8_amax_history_len": how.amax_history,
        "fp8_amax_compute_algo": how.amax_algo,
        "fp8_param": how.param_gather,
        "first_last_layers_bf16": how.first_last_bf16,
        "num_layers_at_start_in_bf16": how.bf16_start,
        "num_layers_at_end_in_bf16": how.bf16_end,
        "disable_parameter_transpose_cache": not how.transpose_cache,
    }


def _fp8_weights(run: RunConfig) -> dict[str, bool]:
    """What DistributedDataParallelConfig and OptimizerConfig both want to know of weights kept in FP8."""
    # Those of MXFP8 lie in no buffer of their own: they are gathered through that of the gradients.
    mxfp8 = run.fp8.enabled and run.fp8.param_gather and run.fp8.recipe == "mxfp8"
    return {"reuse_grad_buf_for_mxfp8_param_ag": True} if mxfp8 else {}


def _attention_backend(run: RunConfig) -> AttnBackend:
    if run.hardware.tier != "te":
        return AttnBackend.auto  # read by Transformer Engine only
    if run.training.deterministic:
        return AttnBackend.auto  # it then takes a kernel that is deterministic
    if run.precision.dtype == "fp32":
        return AttnBackend.unfused  # the others' kernels are for 16 bits
    return AttnBackend.flash if run.precision.flash_attention else AttnBackend.fused


def require_attention(backend: AttnBackend, environment: Mapping[str, str]) -> None:
    """Raise UsageError where an exported variable asks Transformer Engine for another attention than `backend`.

    megatron-core sets these variables itself, and stops where it finds them otherwise.
    """
    for name, kinds in ATTENTION_VARIABLES.items():
        expected = "1" if backend in kinds else "0"
        if environment.get(name, expected) != expected:
            raise UsageError(
                f"{name}={environment[name]}, but this run's attention is {backend.name}, which needs {expected}: "
                f"unset {name}, and choose by USE_FLASH_ATTN=1 or 0 (PRECISION=fp32 knows unfused alone)"
            )


def _activations(run: RunConfig) -> dict[str, Any]:
    """What is computed again in the backward pass, or waits for it in host memory: the one or the other."""
    training = run.training
    if training.cpu_offloading_num_layers:
        return {"cpu_offloading": True, "cpu_offloading_num_layers": training.cpu_offloading_num_layers}
    if not training.recompute:
        return {}
    if training.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(training.recompute_modules)}
    everything = run.model.num_layers if training.recompute_method == "block" else 1
    return {
        "recompute_granularity": "full",
        "recompute_method": training.recompute_method,
        "recompute_num_layers": training.recompute_num_layers or everything,
    }


def ddp_config(run: RunConfig) -> DistributedDataParallelConfig:
    """How gradients are kept and reduced over the data parallel ranks."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=not run.precision.grad_reduce_in_bf16,
        overlap_grad_reduce=run.parallel.overlap_grad_reduce,
        overlap_param_gather=run.parallel.overlap_param_gather,
        use_distributed_optimizer=run.parallel.distributed_optimizer or run.parallel.megatron_fsdp,
        # The loop looks at the loss and the gradient norm itself, on all ranks at once.
        check_for_nan_in_grad=False,
        fp8_param_gather=run.fp8.enabled and run.fp8.param_gather,
        keep_fp8_transpose_cache=run.fp8.enabled and run.parallel.megatron_fsdp and run.fp8.transpose_cache,
        **_fp8_weights(run),
        **((megatron_fsdp.settings(run) if run.parallel.megatron_fsdp else {}) | run.core.ddp),
    )


def optimizer_config(run: RunConfig) -> OptimizerConfig:
    """AdamW, or SGD with momentum 0.9. The learning rate's course is the scheduler's."""
    optimizer = run.optimizer
    # FSDP's parameters are in FP32 whatever is computed in.
    dtype = torch.float32 if run.parallel.fsdp else DTYPES[run.precision.dtype]
    return OptimizerConfig(
        optimizer=optimizer.name,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        sgd_momentum=0.9,
        clip_grad=optimizer.clip_grad,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        **_loss_scale(run),
        params_dtype=dtype,
        use_distributed_optimizer=run.parallel.distributed_optimizer or run.parallel.megatron_fsdp,
        overlap_param_gather=run.parallel.overlap_param_gather,
        fp8_recipe=run.fp8.recipe if run.fp8.enabled else None,
        **_fp8_weights(run),
        **(_offload(run) | run.core.optimizer),
    )


def _loss_scale(run: RunConfig) -> dict[str, Any]:
    precision = run.precision
    if precision.dtype != "fp16":
        return {}
    return {
        "loss_scale": precision.loss_scale,
        "initial_loss_scale": precision.initial_loss_scale,
        "min_loss_scale": precision.min_loss_scale,
        "loss_scale_window": precision.loss_scale_window,
        "hysteresis": precision.hysteresis,
    }


def _offload(run: RunConfig) -> dict[str, Any]:
    if not run.optimizer.cpu_offload:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": run.optimizer.offload_fraction,
        # Parameters are updated while the next ones' gradients are still on their way.
        "overlap_cpu_optimizer_d2h_h2d": True,
        # Only its path hands gradients to the hybrid optimizer (Megatron-LM's arguments.py demands it too).
        "use_precision_aware_optimizer": True,
    }


def build_model(run: RunConfig) -> list[torch.nn.Module]:
    """This rank's model chunks (one, or VPP of them) with their initial weights, wrapped for data parallel training.

    Needs megatron-core's process groups.
    """
    config = transformer_config(run)
    require_attention(config.attention_backend, os.environ)
    if run.fp8.enabled:
        fp8.require(run)
    chunks = build_chunks(run, config)
    if run.parallel.fsdp:
        reduce = torch.bfloat16 if run.precision.grad_reduce_in_bf16 else torch.float32
        chunks = [fsdp.shard(config, chunk, DTYPES[run.precision.dtype], reduce) for chunk in chunks]
    ddp = ddp_config(run)
    if run.parallel.megatron_fsdp:
        chunks = [megatron_fsdp.MegatronFullySharded(config, ddp, chunk) for chunk in chunks]
    for chunk in chunks:
        fill(core(chunk), run)
    if run.parallel.megatron_fsdp:
        for chunk in chunks:
            chunk.take_over_weights()  # type: ignore[operator]
    if _fully_sharded(run):
        return chunks
    # Only the first chunk's gradients are reduced in buckets: those of the others overlap with its backward pass.
    return [DataParallel(config, ddp, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)]


def build_chunks(run: RunConfig, config: TransformerConfig) -> list[torch.nn.Module]:
    """The model chunks before any data parallel wrapping: Llama, within Float16Module in 16 bits.

    Their weights are not the run's initial ones yet. With FSDP=1 and MEGATRON_FSDP=1 the layers have no values at
    all.
    """
    chunks: list[torch.nn.Module] = []
    for number in range(run.parallel.vpp):
        stage = number if run.parallel.vpp > 1 else None
        spec = block_spec(config, stage, run.hardware.tier)
        chunk = Llama(
            config,
            fsdp.without_values(spec) if _fully_sharded(run) else spec,
            vocab_size=run.model.padded_vocab_size,
            max_sequence_length=run.training.seq_length,
            pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=run.model.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=run.model.rotary_base,
            rope_scaling=run.model.rope_scaling,
            rope_scaling_factor=run.model.rope_scaling_factor,
            vp_stage=stage,
            tokens=run.model.vocab_size,
        )
        if run.hardware.vendor != "cpu" and not _fully_sharded(run):
            chunk.cuda()
        chunks.append(Float16Module(config, chunk) if config.bf16 or config.fp16 else chunk)
    return chunks


def _fully_sharded(run: RunConfig) -> bool:
    return run.parallel.fsdp or run.parallel.megatron_fsdp
