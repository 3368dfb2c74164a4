"""What megatron-core 0.16 takes from Transformer Engine, as data, and what of it the installed one lacks.

AMD's builds have version numbers of their own, so names and signatures decide here, and no number.
docs/transformer_engine.md has the same table for NVIDIA's and AMD's releases.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PACKAGE = "transformer_engine"


@dataclass(frozen=True)
class Use:
    """What megatron-core does with a group of symbols, and what happens where one is missing.

    `ours` is whether a run of this program can come to it.
    """

    what: str
    without: str
    ours: bool = True


@dataclass(frozen=True)
class Need:
    """A symbol of Transformer Engine that `at`, a file of megatron-core, imports or calls.

    `keywords` are the keyword arguments it is called with, `positional` how many arguments by position, `members`
    the attributes that are read from it. Below version `since` of Transformer Engine megatron-core does without.
    """

    name: str
    use: str
    at: str
    keywords: tuple[str, ...] = ()
    positional: int = 0
    members: tuple[str, ...] = ()
    since: str = ""


TORCH_TIER = "nothing stands in: take a base image whose build has it, or train with torch alone (uninstall it)"

USES: Mapping[str, Use] = {
    "start": Use("what megatron-core imports before anything else", TORCH_TIER),
    "layers": Use("linear layers and norms", TORCH_TIER),
    "attention": Use("attention", TORCH_TIER),
    "overlap": Use(
        "TP overlapped by Transformer Engine, weight gradients put off, symmetric memory", "they are off", ours=False
    ),
    "random": Use("random states of tensor parallel processes", "megatron-core's own tracker is used", ours=False),
    "rope": Use("fused rotary embedding", "ROPE_FUSION=0: megatron-core's own, unfused"),
    "qkv rope": Use("rotary embedding on the undivided QKV", "FUSED_SINGLE_QKV_ROPE=0: on Q and K apart"),
    "loss": Use("fused cross entropy", "CROSS_ENTROPY_FUSION_IMPL=native: megatron-core's own"),
    "optimizer": Use("fused Adam and SGD, gradient norms", "megatron-core takes Apex or torch's own, slower"),
    "precision aware": Use("the optimizer's state in fewer bits", "core.optimizer.use_precision_aware_optimizer=0"),
    "recompute": Use("recomputation with FP8", "RECOMPUTE=0, or BF16"),
    "offload": Use("activation offload", "CPU_OFFLOADING_NUM_LAYERS=0; RECOMPUTE=1 saves memory too"),
    "fp8": Use("FP8 of any recipe", "TE_FP8=0: BF16"),
    "fp8 delayed": Use("TE_FP8_RECIPE=delayed", "another TE_FP8_RECIPE"),
    "fp8 tensorwise": Use("TE_FP8_RECIPE=tensorwise", "another TE_FP8_RECIPE"),
    "fp8 blockwise": Use("TE_FP8_RECIPE=blockwise", "another TE_FP8_RECIPE"),
    "fp8 mxfp8": Use("TE_FP8_RECIPE=mxfp8", "another TE_FP8_RECIPE"),
    "fp8 parameters": Use("parameters kept and gathered in FP8", "FP8_PARAM_GATHER=0: gathered in BF16"),
    "fp8 checkpoint": Use("checkpoints of FP8 parameters", "FP8_PARAM_GATHER=0"),
    "megatron fsdp": Use("Megatron-FSDP over Transformer Engine's layers", "MEGATRON_FSDP=0"),
    "megatron fsdp fp8": Use("Megatron-FSDP with FP8 parameters", "FP8_PARAM_GATHER=0, or MEGATRON_FSDP=0"),
    "newer": Use("newer forms of what is there", "megatron-core does without", ours=False),
    "op fuser": Use("`use_transformer_engine_op_fuser` and `use_te_activation_func`", "both are off", ours=False),
    "moe": Use("mixture of experts", "Llama has none", ours=False),
    "graphs": Use("CUDA graphs", "they are off", ours=False),
    "fp4": Use("FP4 and recipes of one's own", "TE_FP4 is refused", ours=False),
    "fine offload": Use("fine-grained activation offload", "it is off", ours=False),
    "split": Use("a fused split of QKV", "torch.split", ours=False),
    "batch invariant": Use("batch-invariant kernels", "they are off", ours=False),
    "inference": Use("megatron-core's inference engine", "we have our own", ours=False),
    "mamba": Use("context parallel slices of packed rows, for Mamba and LLaVA", "Llama has none", ours=False),
}

_EXTENSION = "extensions/transformer_engine.py"
_LINEAR = (
    "in_features", "out_features", "sequence_parallel", "fuse_wgrad_accumulation", "tp_group", "tp_size",
    "get_rng_state_tracker", "init_method", "bias", "return_bias", "parallel_mode", "params_dtype", "device",
    "rng_tracker_name",
)  # fmt: skip
_LAYER_NORM_LINEAR = (
    "in_features", "out_features", "eps", "sequence_parallel", "fuse_wgrad_accumulation", "tp_group", "tp_size",
    "get_rng_state_tracker", "init_method", "bias", "return_bias", "parallel_mode", "return_layernorm_output",
    "zero_centered_gamma", "params_dtype", "device", "normalization",
)  # fmt: skip
_OVERLAP = ("delay_wgrad_compute", "symmetric_ar_type", "ub_overlap_ag", "ub_name")
_NORM = ("hidden_size", "eps", "sequence_parallel", "zero_centered_gamma", "params_dtype", "device")
_ATTENTION = (
    "num_attention_heads", "kv_channels", "attention_dropout", "attn_mask_type", "sequence_parallel", "tp_size",
    "get_rng_state_tracker", "tp_group", "layer_number", "num_gqa_groups", "attention_type", "softmax_scale",
    "cp_group", "cp_global_ranks", "cp_stream", "cp_comm_type",
)  # fmt: skip
_ATTENTION_FORWARD = (
    "attn_mask_type", "qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded",
    "max_seqlen_q", "max_seqlen_kv",
)  # fmt: skip
_GROUPED = (
    "num_gemms", "in_features", "out_features", "sequence_parallel", "fuse_wgrad_accumulation", "tp_group", "tp_size",
    "get_rng_state_tracker", "init_method", "bias", "return_bias", "parallel_mode", "params_dtype", "device",
    "delay_wgrad_compute", "ub_name", "rng_tracker_name",
)  # fmt: skip
_PRECISION_AWARE = (
    "exp_avg_dtype", "exp_avg_sq_dtype", "master_weights", "use_decoupled_grad", "master_weight_dtype",
    "store_param_remainders",
)  # fmt: skip
_OPS = "GELU GEGLU SiLU SwiGLU ReLU ReGLU BasicLinear Bias LayerNorm RMSNorm AllReduce ReduceScatter".split()
_PERMUTATIONS = "moe_permute moe_permute_with_probs moe_sort_chunks_by_index moe_sort_chunks_by_index_with_probs moe_unpermute".split()  # noqa: E501
_GRAPHS = "make_graphed_callables save_fp8_tensors restore_fp8_tensors set_capture_start set_capture_end".split()


def _row(name: str, use: str, at: str, *keywords: str, **more: Any) -> Need:
    return Need(f"{PACKAGE}.{name}", use, at, keywords, **more)


# Rows of use "start" are imported without a way round: where one fails, megatron-core ends, or takes the whole of
# Transformer Engine for missing. The recipes are pydantic's dataclasses, which drop what they don't know
# (`override_linear_precision`, `params_dtype` and `device` of DelayedScaling).
NEEDS: tuple[Need, ...] = (
    _row("pytorch.fp8.FP8GlobalStateManager", "start", "tensor_parallel/random.py", members=("is_fp8_enabled", "get_fp8_recipe")),
    _row("pytorch.fp8.fp8_autocast", "start", _EXTENSION, "enabled", "fp8_recipe", "fp8_group"),
    _row("pytorch.distributed.activation_recompute_forward", "start", "tensor_parallel/random.py", "activation_recompute", "recompute_phase"),
    _row("pytorch.distributed.CudaRNGStatesTracker", "start", _EXTENSION, members=("reset", "add", "set_states")),
    _row("pytorch.tensor.QuantizedTensor", "start", "fp8_utils.py", members=("dequantize",)),
    _row("pytorch.ops.Sequential", "start", _EXTENSION),
    _row("pytorch.ops.FusibleOperation", "start", _EXTENSION),
    _row("pytorch.GroupedLinear", "start", _EXTENSION),
    _row("pytorch.router.fused_topk_with_score_function", "start", _EXTENSION, since="2.7.0.dev0"),
    _row("pytorch.router.fused_compute_score_for_moe_aux_loss", "start", _EXTENSION, since="2.7.0.dev0"),
    _row("pytorch.router.fused_moe_aux_loss", "start", _EXTENSION, since="2.7.0.dev0"),
    _row("common.recipe.DelayedScaling", "start", _EXTENSION),
    _row("pytorch.Linear", "layers", _EXTENSION, *_LINEAR),
    _row("pytorch.Linear.forward", "layers", _EXTENSION, "is_first_microbatch"),
    _row("pytorch.LayerNormLinear", "layers", _EXTENSION, *_LAYER_NORM_LINEAR),
    _row("pytorch.LayerNormLinear.forward", "layers", _EXTENSION, "is_first_microbatch"),
    _row("pytorch.RMSNorm", "layers", _EXTENSION, *_NORM),
    _row("pytorch.LayerNorm", "layers", _EXTENSION, *_NORM),
    _row("pytorch.DotProductAttention", "attention", _EXTENSION, *_ATTENTION),
    _row("pytorch.DotProductAttention.forward", "attention", _EXTENSION, *_ATTENTION_FORWARD, positional=5),
    _row("pytorch.Linear", "overlap", _EXTENSION, *_OVERLAP, "ub_overlap_rs"),
    _row("pytorch.LayerNormLinear", "overlap", _EXTENSION, *_OVERLAP, "ub_bulk_wgrad", "ub_bulk_dgrad", "ub_overlap_rs_dgrad"),
    _row("pytorch.distributed.get_all_rng_states", "random", "tensor_parallel/random.py"),
    _row("pytorch.attention.rope.apply_rotary_pos_emb", "rope", _EXTENSION, "tensor_format", "interleaved", "fused", "cu_seqlens", "cp_size", "cp_rank", positional=2, since="2.3.0"),
    _row("pytorch.attention.rope.apply_fused_qkv_rotary_pos_emb", "qkv rope", "transformer/attention.py", positional=4),
    _row("pytorch.cross_entropy.parallel_cross_entropy", "loss", _EXTENSION, positional=7, since="2.7.0"),
    _row("pytorch.optimizers.FusedAdam", "optimizer", "optimizer/__init__.py", "lr", "weight_decay", "betas", "eps", "adam_w_mode"),
    _row("pytorch.optimizers.FusedAdam", "precision aware", "optimizer/__init__.py", *_PRECISION_AWARE, since="2.1.0.dev0"),
    _row("pytorch.optimizers.FusedSGD", "optimizer", "optimizer/__init__.py", "lr", "weight_decay", "momentum"),
    _row("pytorch.optimizers.multi_tensor_applier", "optimizer", "optimizer/clip_grads.py"),
    _row("pytorch.optimizers.multi_tensor_l2norm", "optimizer", "optimizer/clip_grads.py"),
    _row("pytorch.optimizers.multi_tensor_scale", "optimizer", "optimizer/clip_grads.py"),
    _row("pytorch.module.base.get_dummy_wgrad", "newer", "tensor_parallel/layers.py", "zero", positional=2),
    _row("pytorch.distributed.checkpoint", "recompute", _EXTENSION),
    _row("pytorch.cpu_offload.get_cpu_offload_context", "offload", _EXTENSION, positional=6, since="2.5.0"),
    _row("common.recipe.Format", "fp8", "fp8_utils.py", members=("E4M3", "HYBRID")),
    _row("pytorch.fp8_autocast", "fp8", "fp8_utils.py", "enabled", "fp8_recipe", "fp8_group"),
    _row("pytorch.fp8_model_init", "fp8 parameters", "fp8_utils.py", "enabled"),
    _row("common.recipe.DelayedScaling", "fp8 delayed", _EXTENSION, "margin", "fp8_format", "amax_compute_algo", "amax_history_len", "fp8_dpa", "fp8_mha"),
    _row("common.recipe.Float8CurrentScaling", "fp8 tensorwise", "fp8_utils.py", "fp8_format", "fp8_dpa"),
    _row("common.recipe.Float8BlockScaling", "fp8 blockwise", "fp8_utils.py", "fp8_format"),
    _row("common.recipe.MXFP8BlockScaling", "fp8 mxfp8", "fp8_utils.py", "fp8_format"),
    _row("pytorch.tensor.mxfp8_tensor.MXFP8Tensor", "fp8 mxfp8", "fp8_utils.py"),
    _row("pytorch.tensor.utils.replace_raw_data", "fp8 parameters", "fp8_utils.py", positional=2),
    _row("pytorch.tensor.utils.cast_master_weights_to_fp8", "fp8 parameters", "fp8_utils.py", positional=5),
    _row("pytorch.tensor.utils.cast_master_weights_to_fp8", "newer", "fp8_utils.py", "manual_post_all_gather_processing"),
    _row("pytorch.tensor.utils.post_all_gather_processing", "newer", "fp8_utils.py", positional=1),
    _row("pytorch.float8_tensor.Float8Tensor", "fp8 checkpoint", "dist_checkpointing/strategies/torch.py", members=("make_like",)),
    _row("pytorch.module.base.TransformerEngineBaseModule", "megatron fsdp", "distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py"),
    _row("pytorch.tensor.float8_blockwise_tensor.Float8BlockwiseQTensor", "megatron fsdp fp8", "distributed/fsdp/src/megatron_fsdp/mixed_precision.py"),
    _row("pytorch.quantized_model_init", "newer", "distributed/fsdp/src/megatron_fsdp/mixed_precision.py"),
    *(_row(f"pytorch.ops.{name}", "op fuser", _EXTENSION) for name in _OPS),
    _row("pytorch.GroupedLinear", "moe", _EXTENSION, *_GROUPED),
    *(_row(f"pytorch.permutation.{name}", "moe", _EXTENSION) for name in _PERMUTATIONS),
    _row("pytorch.Fp8Padding", "moe", _EXTENSION),
    _row("pytorch.Fp8Unpadding", "moe", _EXTENSION),
    *(_row(f"pytorch.graph.{name}", "graphs", "transformer/cuda_graphs.py") for name in _GRAPHS),
    _row("pytorch.distributed.is_fp8_activation_recompute_enabled", "graphs", "transformer/cuda_graphs.py"),
    _row("pytorch.utils.make_weak_ref", "graphs", "transformer/cuda_graphs.py"),
    _row("common.recipe.CustomRecipe", "fp4", "fp8_utils.py", "qfactory"),
    _row("common.recipe.NVFP4BlockScaling", "fp4", "fp4_utils.py"),
    _row("pytorch.tensor.nvfp4_tensor.NVFP4Tensor", "fp4", "fp4_utils.py"),
    _row("pytorch.cpu_offload_v1", "fine offload", _EXTENSION),
    _row("pytorch.attention._SplitAlongDim", "split", _EXTENSION),
    _row("pytorch.cpp_extensions.general_gemm", "batch invariant", _EXTENSION, "workspace"),
    _row("pytorch.module.base.get_workspace", "batch invariant", _EXTENSION),
    _row("pytorch.module.linear.general_gemm", "batch invariant", "transformer/custom_layers/batch_invariant_kernels.py"),
    _row("pytorch.module.layernorm_linear.general_gemm", "batch invariant", "transformer/custom_layers/batch_invariant_kernels.py"),
    _row("pytorch.constants.TE_DType", "inference", "tensor_parallel/inference_layers.py"),
    _row("pytorch.distributed.gather_along_first_dim", "inference", "tensor_parallel/inference_layers.py"),
    _row("pytorch.distributed.reduce_scatter_along_first_dim", "inference", "tensor_parallel/inference_layers.py"),
)  # fmt: skip


# Uses without which no layer of Transformer Engine's trains.
VITAL = ("start", "layers", "attention")


def missing(uses: Iterable[str] = USES) -> list[str]:
    """What our runs' `uses` need and the installed Transformer Engine lacks, a line each; [] where all fits.

    Lines come in the order of NEEDS: those of VITAL uses first. Imports Transformer Engine and torch, and raises what
    that raises: ModuleNotFoundError where it is not installed, errors of many kinds where it was built for another
    torch or driver.
    """
    from packaging.version import Version

    importlib.import_module(f"{PACKAGE}.pytorch")
    version = Version(_version())
    asked = {use for use in uses if USES[use].ours}
    needs = [need for need in NEEDS if need.use in asked and version >= Version(need.since or "0")]
    return [f"{need.name} {what}: {_where(need)}" for need in needs for what in _lacks(need)]


def _version() -> str:
    """As megatron-core asks for it (megatron/core/utils.py, get_te_version)."""
    said = getattr(importlib.import_module(PACKAGE), "__version__", None)
    return str(said) if said else importlib.metadata.version("transformer-engine")


def _where(need: Need) -> str:
    use = USES[need.use]
    return f"megatron-core's {need.at} needs it for {use.what}; {use.without}"


def _lacks(need: Need) -> Iterator[str]:
    """What is wrong with one symbol, in words that follow its name."""
    try:
        found = _find(need.name)
    except (ImportError, AttributeError) as error:
        absent = isinstance(error, AttributeError) or (error.name or "").startswith(PACKAGE)
        yield "is missing" if absent else f"can't be imported ({' '.join(str(error).split())})"
        return
    if without := [name for name in need.members if not hasattr(found, name)]:
        yield f"has no {', '.join(without)}"
    accepts = _signature(found)
    if accepts is None:
        return
    keywords, positional = accepts
    if keywords is not None and (refused := [name for name in need.keywords if name not in keywords]):
        yield f"takes no {', '.join(refused)}"
    if positional is not None and need.positional > positional:
        yield f"takes {positional} arguments by position, not {need.positional}"


def _find(name: str) -> Any:
    """The object of a dotted name, modules imported on the way. Raises ImportError or AttributeError."""
    words = name.split(".")
    found: Any = importlib.import_module(words[0])
    for count, word in enumerate(words[1:], 2):
        if not hasattr(found, word) and hasattr(found, "__path__"):
            importlib.import_module(".".join(words[:count]))
        found = getattr(found, word)
    return found


def _signature(found: Any) -> tuple[set[str] | None, int | None] | None:
    """Keyword names and the number of positional arguments that a call may have; None for any, or where unknown."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = {parameter.kind for parameter in parameters}
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    keywords = {parameter.name for parameter in parameters if parameter.kind in by_name}
    positional = sum(parameter.kind in by_position for parameter in parameters)
    return (
        None if inspect.Parameter.VAR_KEYWORD in kinds else keywords,
        None if inspect.Parameter.VAR_POSITIONAL in kinds else positional,
    )
