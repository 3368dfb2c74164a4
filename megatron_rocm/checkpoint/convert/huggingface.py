"""The files of a Hugging Face model folder beside its weights: configuration and tokenizer, read and written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_rocm.config.presets import PRESETS
from megatron_rocm.config.schema import Model, RunConfig
from megatron_rocm.data.hub import find_files
from megatron_rocm.data.tokenizer import TokenizerInfo, inspect
from megatron_rocm.errors import UsageError

CONFIG, GENERATION = "config.json", "generation_config.json"
VOCAB_MULTIPLE = 128  # Megatron-LM's make_vocab_size_divisible_by

# Llama 3.1's scaling. megatron-core has these numbers fixed (models/common/embeddings/rotary_pos_embedding.py).
LLAMA3_ROPE = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip

# What a tokenizer may consist of beside its main file.
TOKENIZER_COMPANIONS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", *TOKENIZER_COMPANIONS)
ALL_FILES = (CONFIG, GENERATION, *TOKENIZER_FILES)

# Key of a Llama's config.json, the only value that our model computes, and the value that transformers takes where
# there is none.
FIXED = (
    ("model_type", "llama", None),
    ("hidden_act", "silu", "silu"),
    ("attention_bias", False, False),
    ("mlp_bias", False, False),
    ("quantization_config", None, None),
    ("partial_rotary_factor", 1.0, 1.0),
)

# Of a Model: what is at least 1.
COUNTS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "max_position_embeddings", "rotary_base",
)  # fmt: skip
# What makes a model one of the presets, whatever its vocabulary and the range of its positions.
SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "rotary_base")


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. Raises UsageError."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{folder}: no Hugging Face model here (no {CONFIG})") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: can't be read ({error})") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path}: is not the configuration of a model")
    return config


def model_of(config: dict[str, Any], path: Path) -> Model:
    """The Model section of what a config.json describes. Raises UsageError for what is not a Llama that we train."""
    try:
        rope = dict(config.get("rope_parameters") or {})
        said = {**rope, **config}
        for key, only, default in FIXED:
            if said.get(key, default) != only:
                raise UsageError(
                    f"{path}: {key} is {json.dumps(said.get(key))[:80]}; only {json.dumps(only)} can be converted"
                )
        heads, hidden, vocab = config["num_attention_heads"], config["hidden_size"], config["vocab_size"]
        factor = _scaling(dict(config.get("rope_scaling") or rope), path)
        return with_names({
            "num_layers": config["num_hidden_layers"],
            "hidden_size": hidden,
            "ffn_hidden_size": config["intermediate_size"],
            "num_attention_heads": heads,
            "num_query_groups": config.get("num_key_value_heads") or heads,
            "kv_channels": config.get("head_dim") or hidden // heads,
            "vocab_size": vocab,
            "max_position_embeddings": config.get("max_position_embeddings", 2048),
            "rotary_base": whole_base(rope.get("rope_theta") or config.get("rope_theta") or 10_000),
            "rope_scaling_factor": factor,
            "tied_embeddings": config.get("tie_word_embeddings", False),
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "init_std": config.get("initializer_range", 0.02),
        })  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise UsageError(f"{path}: does not describe a Llama ({reason(error)})") from error


def whole_base(theta: Any) -> int:
    """The rotary base of a configuration's `rope_theta`. Raises ValueError for one that is no whole number."""
    if int(theta) != theta:
        raise ValueError(f"rope_theta is {theta}, and should be a whole number")
    return int(theta)


def reason(error: Exception) -> str:
    """What is wrong with values of a configuration, on one line."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
    return f"{type(error).__name__}: {error}"


def with_names(shape: dict[str, Any]) -> Model:
    """A Model section of its numbers alone, `rope_scaling_factor` None where the rotary embedding is not scaled.

    Family, size and title are those of the published model of this shape where there is one. Raises ValueError for
    numbers that no model has.
    """
    known = [one for one, preset in PRESETS.items() if all(getattr(preset, key) == shape[key] for key in SHAPE)]
    factor = shape["rope_scaling_factor"]
    newer = factor is not None or shape["rotary_base"] == 500_000
    family, size = known[0] if known else ("llama3" if newer else "llama2", "other")
    preset = PRESETS.get((family, size))
    model = Model.model_validate({
        **shape,
        "family": family,
        "size": size,
        "title": preset.title if preset else f"Llama of {shape['num_layers']} layers",
        "padded_vocab_size": -(-shape["vocab_size"] // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        "rope_scaling": factor is not None,
        # A run with ROPE_SCALING=0 has its preset's factor, without effect.
        "rope_scaling_factor": factor or (preset and preset.rope_scaling_factor) or 1.0,
    })  # fmt: skip
    if wrong := [f"{key} is {getattr(model, key)}" for key in COUNTS if getattr(model, key) < 1]:
        raise ValueError(", ".join(wrong))
    if model.num_attention_heads % model.num_query_groups:
        raise ValueError(f"{model.num_attention_heads} attention heads for {model.num_query_groups} key-value heads")
    return model


def _scaling(rope: dict[str, Any], path: Path) -> float | None:
    """The factor of Llama 3.1's RoPE scaling; None where there is none."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    said = {**rope, "rope_type": kind}
    if any(said.get(key) != value for key, value in LLAMA3_ROPE.items()):
        raise UsageError(
            f"{path}: RoPE scaling {json.dumps(rope)}: only Llama 3.1's, {json.dumps(LLAMA3_ROPE)}, is trained"
        )
    return float(rope["factor"])


def copy_description(source: Path, folder: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Write a model's own configuration into `folder`, with the type of its weights."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    write_json(folder / CONFIG, {**config, **dict.fromkeys(keys, str(dtype).removeprefix("torch."))})
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, folder / GENERATION)


def copy_tokenizer_files(source: Path, folder: Path) -> None:
    """Copy what there is of a tokenizer. Raises UsageError where `source` is no folder."""
    if not source.is_dir():
        raise UsageError(f"--tokenizer {source}: is not a folder of a Hugging Face tokenizer")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def llama_config(model: Model, *, dtype: str, bos: int | None, eos: int | None) -> dict[str, Any]:
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


def generation_config(bos: int | None, eos: int | None) -> dict[str, Any]:
    ids = {"bos_token_id": bos, "eos_token_id": eos}
    return {"_from_model_config": True, **{name: id for name, id in ids.items() if id is not None}}


def tokenizer_info(folder: str) -> TokenizerInfo:
    """What a folder's tokenizer is. Raises UsageError."""
    kind = "HuggingFaceTokenizer" if (Path(folder) / "tokenizer.json").is_file() else "Llama2Tokenizer"
    try:
        return inspect(folder, kind)
    except UsageError as error:
        raise UsageError(f"--tokenizer: {error}") from error


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
