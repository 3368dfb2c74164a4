"""The files of a Hugging Face model folder beside its weights: configuration and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_rocm.config.schema import Model, RunConfig
from megatron_rocm.data.hub import find_files
from megatron_rocm.data.tokenizer import inspect
from megatron_rocm.errors import UsageError

# Llama 3.1's scaling. megatron-core has these numbers fixed (models/common/embeddings/rotary_pos_embedding.py).
LLAMA3_ROPE = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip

# What a tokenizer may consist of beside its main file.
TOKENIZER_COMPANIONS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip


def llama_config(model: Model, *, dtype: str, bos: int | None, eos: int) -> dict[str, Any]:
    """A config.json that transformers from 4.43 to 5 reads alike. `dtype` is torch's name, as "bfloat16"."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": float(model.rotary_base),
        "rope_scaling": {"factor": model.rope_scaling_factor, **LLAMA3_ROPE} if model.rope_scaling else None,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }


def generation_config(bos: int | None, eos: int) -> dict[str, Any]:
    ids = {"bos_token_id": bos, "eos_token_id": eos}
    return {"_from_model_config": True, **{name: id for name, id in ids.items() if id is not None}}


def copy_tokenizer(run: RunConfig, tokenizer: str | None, folder: Path) -> int | None:
    """Put the run's tokenizer, or the one named in its place, into `folder`. Returns the id that begins a text.

    A run on mock data without a tokenizer has none to copy. Raises UsageError where it is not to be had.
    """
    name = tokenizer or run.data.tokenizer_model
    if name is None:
        return None
    kind = run.data.tokenizer_type
    try:
        files, info = find_files(name, kind), inspect(name, kind)
    except UsageError as error:
        raise UsageError(f"the checkpoint's tokenizer: {error}. --tokenizer names it where it lies now") from error
    if info.vocab_size != run.model.vocab_size or info.eod != run.data.eod:
        raise UsageError(
            f"the tokenizer {name} has {info.vocab_size:,} ids and ends documents with {info.eod}; the checkpoint was "
            f"trained with {run.model.vocab_size:,} and {run.data.eod}: name the right one with --tokenizer"
        )
    for companion in TOKENIZER_COMPANIONS:
        path = files.companion(companion)
        if path is not None:
            shutil.copyfile(path, folder / companion)
    shutil.copyfile(files.main, folder / ("tokenizer.model" if files.sentencepiece else "tokenizer.json"))
    settings = folder / "tokenizer_config.json"
    if not settings.exists():
        name = "LlamaTokenizer" if files.sentencepiece else "PreTrainedTokenizerFast"
        settings.write_text(json.dumps({"tokenizer_class": name}) + "\n")
    return info.bos
