"""Checkpoints that Megatron-LM itself has saved in `torch_dist` format: what their arguments say in our words.

`common.pt` holds `args`, the Namespace of its command line. Source of the names: megatron/training/arguments.py and
checkpointing.py of NVIDIA/Megatron-LM.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rocm.checkpoint.choose import RELEASE
from megatron_rocm.errors import UsageError


def _groups(args: Namespace) -> int:
    return int(args.num_query_groups if args.group_query_attention else args.num_attention_heads)


def _dtype(args: Namespace) -> str:
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


# Section and field of RunConfig → Megatron-LM's argument, or how to tell from its arguments.
FIELDS: tuple[tuple[str, str, str | Callable[[Namespace], Any]], ...] = (
    ("model", "num_layers", "num_layers"),
    ("model", "hidden_size", "hidden_size"),
    ("model", "ffn_hidden_size", "ffn_hidden_size"),
    ("model", "num_attention_heads", "num_attention_heads"),
    ("model", "num_query_groups", _groups),
    ("model", "kv_channels", "kv_channels"),
    ("model", "tied_embeddings", lambda args: not args.untie_embeddings_and_output_weights),
    ("model", "rotary_base", "rotary_base"),
    ("model", "rope_scaling", "use_rope_scaling"),
    ("model", "norm_eps", lambda args: getattr(args, "norm_epsilon", None) or args.layernorm_epsilon),
    ("precision", "dtype", _dtype),
    ("training", "global_batch_size", "global_batch_size"),
    ("training", "seq_length", "seq_length"),
    ("training", "seed", "seed"),
    ("optimizer", "name", "optimizer"),
    ("optimizer", "lr", "lr"),
    ("optimizer", "min_lr", "min_lr"),
    ("optimizer", "weight_decay", "weight_decay"),
    ("optimizer", "adam_beta1", "adam_beta1"),
    ("optimizer", "adam_beta2", "adam_beta2"),
    ("optimizer", "adam_eps", "adam_eps"),
    ("optimizer", "clip_grad", "clip_grad"),
)

# Argument → what it has to be for the network to be a Llama; those that are not there pass.
LLAMA: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False, None),
    "position_embedding_type": ("rope",),
    "rotary_interleaved": (False,),
    "rotary_percent": (1.0,),
    "num_experts": (None, 0),
    "multi_latent_attention": (False,),
    "qk_layernorm": (False,),
    "apply_layernorm_1p": (False,),
}


def with_position(common: dict[str, Any], path: Path) -> dict[str, Any]:
    """The common state with the position in the data where our own checkpoints have it.

    One that is of no iteration, which Megatron-LM calls a release, is `weights_only`.
    """
    args = common.get("args")
    samples = getattr(args, "consumed_train_samples", None) or 0
    return {"consumed_train_samples": samples, "weights_only": path.name == RELEASE, **common}


def configuration(args: Namespace, path: Path) -> dict[str, Any]:
    """The sections of a RunConfig as far as Megatron-LM's arguments tell them.

    Raises UsageError for another network than a Llama.
    """
    wrong = [
        f"{name}={getattr(args, name)}" for name, right in LLAMA.items() if getattr(args, name, right[0]) not in right
    ]
    if wrong:
        raise UsageError(f"{path}: Megatron-LM trained another network than a Llama there: {', '.join(wrong)}")
    found: dict[str, Any] = {}
    for section, field, source in FIELDS:
        try:
            value = source(args) if callable(source) else getattr(args, source)
        except AttributeError:
            continue  # of another version
        found.setdefault(section, {})[field] = value
    return found
