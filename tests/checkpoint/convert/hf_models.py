"""Small random models of every family, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "bos_token_id": 3,
    "eos_token_id": 7, "initializer_range": 0.1, "tie_word_embeddings": False,
}  # fmt: skip

# Family → its config.json's own fields, the type of its weights, and the most bytes a file may have.
FAMILIES: dict[str, tuple[dict[str, Any], torch.dtype, str]] = {
    "llama2": ({"num_key_value_heads": 4, "max_position_embeddings": 4096}, torch.float16, "100KB"),
    "llama3": ({"rope_theta": 500_000.0, "max_position_embeddings": 8192}, torch.bfloat16, "1GB"),
    "llama3.1": ({"rope_theta": 500_000.0, "rope_scaling": {**LLAMA3, "factor": 8.0}}, torch.bfloat16, "100KB"),
    "llama3.2": (
        {
            "rope_theta": 500_000.0,
            "rope_scaling": {**LLAMA3, "factor": 32.0},
            "tie_word_embeddings": True,
            "head_dim": 32,
        },
        torch.float32,
        "1GB",
    ),
    "codellama": ({"rope_theta": 1_000_000.0, "num_key_value_heads": 1, "vocab_size": 316}, torch.bfloat16, "1GB"),
}  # fmt: skip


def make(family: str, folder: Path, **changes: Any) -> Path:
    """A Hugging Face folder of random weights, norms too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields, dtype, most = FAMILIES[family]
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **fields, **changes}))
    with torch.no_grad():
        for weight in model.parameters():  # norms of 1 would hide a wrong mapping
            weight.copy_(torch.randn(weight.shape) * 0.1 + (weight.dim() == 1))
    model.to(dtype).save_pretrained(folder, max_shard_size=most)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """As AutoModelForCausalLM has them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
