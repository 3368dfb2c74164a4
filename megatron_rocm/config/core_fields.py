"""`core.transformer.<field>=`, `core.optimizer.<field>=` and `core.ddp.<field>=`: what the schema does not name.

The fields are those of megatron-core's own configuration classes, read from its source: importing it takes seconds.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from pathlib import Path
from typing import Any

from megatron_rocm.errors import UsageError

PREFIX = "core."
# kind → the classes' files under megatron/core, base class first
SOURCES = {
    "transformer": ("model_parallel_config.py", "transformer/transformer_config.py"),
    "optimizer": ("optimizer/optimizer_config.py",),
    "ddp": ("distributed/distributed_data_parallel_config.py",),
}
CLASSES = {
    "transformer": ("ModelParallelConfig", "TransformerConfig"),
    "optimizer": ("OptimizerConfig",),
    "ddp": ("DistributedDataParallelConfig",),
}
# Fields that a run sets itself → the variable that decides them; "" where none does.
OURS = {
    "transformer": {
        "num_layers": "MODEL_SIZE", "hidden_size": "MODEL_SIZE", "ffn_hidden_size": "MODEL_SIZE",
        "num_attention_heads": "MODEL_SIZE", "num_query_groups": "MODEL_SIZE", "kv_channels": "MODEL_SIZE",
        "normalization": "", "layernorm_epsilon": "", "gated_linear_unit": "", "activation_func": "",
        "add_bias_linear": "", "add_qkv_bias": "", "hidden_dropout": "", "attention_dropout": "", "init_method_std": "",
        "params_dtype": "PRECISION", "pipeline_dtype": "PRECISION", "bf16": "PRECISION", "fp16": "PRECISION",
        "tensor_model_parallel_size": "TP", "pipeline_model_parallel_size": "PP",
        "virtual_pipeline_model_parallel_size": "VPP", "context_parallel_size": "CP",
        "sequence_parallel": "SEQ_PARALLEL", "account_for_embedding_in_pipeline_split": "",
        "account_for_loss_in_pipeline_split": "", "overlap_p2p_comm": "", "batch_p2p_comm": "",
        "deallocate_pipeline_outputs": "", "calculate_per_token_loss": "", "transformer_impl": "",
        "attention_backend": "USE_FLASH_ATTN", "use_cpu_initialization": "", "perform_initialization": "",
        "bias_activation_fusion": "", "bias_dropout_fusion": "", "masked_softmax_fusion": "", "persist_layer_norm": "",
        "apply_rope_fusion": "ROPE_FUSION", "fused_single_qkv_rope": "FUSED_SINGLE_QKV_ROPE",
        "gradient_accumulation_fusion": "GRADIENT_ACCUMULATION_FUSION",
        "cross_entropy_loss_fusion": "CROSS_ENTROPY_LOSS_FUSION",
        "cross_entropy_fusion_impl": "CROSS_ENTROPY_FUSION_IMPL", "recompute_granularity": "RECOMPUTE_GRANULARITY",
        "recompute_method": "RECOMPUTE_METHOD", "recompute_num_layers": "RECOMPUTE_NUM_LAYERS",
        "recompute_modules": "RECOMPUTE_MODULES", "cpu_offloading": "CPU_OFFLOADING_NUM_LAYERS",
        "cpu_offloading_num_layers": "CPU_OFFLOADING_NUM_LAYERS", "deterministic_mode": "DETERMINISTIC",
        "fp8": "TE_FP8", "fp8_recipe": "TE_FP8_RECIPE", "fp8_param": "FP8_PARAM_GATHER",
        "fp8_amax_history_len": "FP8_AMAX_HISTORY", "fp8_amax_compute_algo": "FP8_AMAX_ALGO",
        "first_last_layers_bf16": "FP8_FIRST_LAST_LAYERS_BF16", "num_layers_at_start_in_bf16": "FP8_BF16_START",
        "num_layers_at_end_in_bf16": "FP8_BF16_END", "disable_parameter_transpose_cache": "FP8_TRANSPOSE_CACHE",
    },
    "optimizer": {
        "optimizer": "OPTIMIZER", "lr": "LR", "min_lr": "MIN_LR", "weight_decay": "WEIGHT_DECAY",
        "adam_beta1": "ADAM_BETA1", "adam_beta2": "ADAM_BETA2", "adam_eps": "ADAM_EPS", "sgd_momentum": "",
        "clip_grad": "CLIP_GRAD", "bf16": "PRECISION", "fp16": "PRECISION", "params_dtype": "PRECISION",
        "use_distributed_optimizer": "USE_DISTRIBUTED_OPTIMIZER", "overlap_param_gather": "OVERLAP_PARAM_GATHER",
        "loss_scale": "LOSS_SCALE", "initial_loss_scale": "INITIAL_LOSS_SCALE", "min_loss_scale": "MIN_LOSS_SCALE",
        "loss_scale_window": "LOSS_SCALE_WINDOW", "hysteresis": "HYSTERESIS",
        "optimizer_cpu_offload": "OPTIMIZER_CPU_OFFLOAD", "optimizer_offload_fraction": "OPTIMIZER_OFFLOAD_FRACTION",
        "fp8_recipe": "TE_FP8_RECIPE", "reuse_grad_buf_for_mxfp8_param_ag": "FP8_PARAM_GATHER",
    },
    "ddp": {
        "grad_reduce_in_fp32": "GRAD_REDUCE_IN_BF16", "overlap_grad_reduce": "OVERLAP_GRAD_REDUCE",
        "overlap_param_gather": "OVERLAP_PARAM_GATHER", "use_distributed_optimizer": "USE_DISTRIBUTED_OPTIMIZER",
        "use_megatron_fsdp": "MEGATRON_FSDP", "num_distributed_optimizer_instances": "HSDP_NUM_REPLICAS",
        "data_parallel_sharding_strategy": "MEGATRON_FSDP",
        "check_for_nan_in_grad": "", "average_in_collective": "", "fp8_param_gather": "FP8_PARAM_GATHER",
        "reuse_grad_buf_for_mxfp8_param_ag": "FP8_PARAM_GATHER", "keep_fp8_transpose_cache": "FP8_TRANSPOSE_CACHE",
    },
}  # fmt: skip
TEXT_TYPES = {"int": int, "float": float, "str": str}


def split(name: str) -> tuple[str, str]:
    """`core.transformer.qk_layernorm` as ("transformer", "qk_layernorm"). Raises UsageError for another form."""
    kind, _, field = name.removeprefix(PREFIX).partition(".")
    if kind not in SOURCES or not field:
        raise UsageError(f"{name}: write {', '.join(f'core.{kind}.<field>' for kind in SOURCES)}")
    return kind, field


def value(name: str, text: str) -> Any:
    """`text` as the type of megatron-core's field. Raises UsageError for an unknown or taken field or a wrong value."""
    kind, field = split(name)
    known = fields(kind)
    if field not in known:
        close = difflib.get_close_matches(field, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see the class's source"
        raise UsageError(f"{name}={text}: megatron-core's {CLASSES[kind][-1]} has no such field; {hint}")
    if field in OURS[kind]:
        way_out = f"set {OURS[kind][field]}" if OURS[kind][field] else "it follows from the others"
        raise UsageError(f"{name}={text}: the run sets this field itself; {way_out}")
    return _typed(name, text, known[field])


def _typed(name: str, text: str, annotation: str) -> Any:
    words = annotation.replace("Optional[", "").replace("]", "").strip("'\"")
    if annotation.startswith("Optional[") and text == "None":
        return None
    if words == "bool" and text.lower() in ("0", "1", "true", "false"):
        return text.lower() in ("1", "true")
    if words in TEXT_TYPES:
        try:
            return TEXT_TYPES[words](text)
        except ValueError:
            pass
    elif words != "bool":
        raise UsageError(f"{name}={text}: a field of type {annotation} can't be given as text")
    raise UsageError(f"{name}={text}: must be of type {annotation}")


@functools.lru_cache
def fields(kind: str) -> dict[str, str]:
    """Field → annotation of megatron-core's class, as its source has them."""
    spec = importlib.util.find_spec("megatron")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("megatron-core is not installed: pip install megatron-core")
    found: dict[str, str] = {}
    for folder in spec.submodule_search_locations:
        for file, name in zip(SOURCES[kind], CLASSES[kind], strict=True):
            path = Path(folder) / "core" / file
            if path.is_file():
                found |= _fields(path, name)
    return found


def _fields(path: Path, name: str) -> dict[str, str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {
                line.target.id: ast.unparse(line.annotation)
                for line in node.body
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            }
    return {}
