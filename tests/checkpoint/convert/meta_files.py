"""Writes a Hugging Face model as Meta releases its own: what the converter does, the other way round."""

from __future__ import annotations

import json
from pathlib import Path

import torch

# Hugging Face's name → Meta's, and the dimension that its ranks cut.
NAMES = {
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0), "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}  # fmt: skip


def pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: Meta's rows 2i and 2i+1 of a head are rows i and i + half of Hugging Face's."""
    size = len(weight) // heads
    rows = [
        head * size + pair + half * size // 2 for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]
    return weight[rows]


def write(weights: dict[str, torch.Tensor], config: dict, folder: Path, ranks: int, rows: bool) -> Path:
    """`rows`: whether the embedding is cut by its rows, as Llama 3's, or its columns, as Llama 2's."""
    folder.mkdir(parents=True)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    whole: dict[str, tuple[torch.Tensor, int | None]] = {
        "tok_embeddings.weight": (weights["model.embed_tokens.weight"], 0 if rows else 1),
        "norm.weight": (weights["model.norm.weight"], None),
        "output.weight": (weights["lm_head.weight"], 0),
        "rope.freqs": (torch.zeros(8), None),
    }
    for layer in range(config["num_hidden_layers"]):
        for theirs, (ours, cut) in NAMES.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours.endswith(("wq", "wk")):
                weight = pairs(weight, heads if ours.endswith("wq") else groups)
            whole[f"layers.{layer}.{ours}.weight"] = weight, cut
    for rank in range(ranks):
        shard = {
            name: (weight if cut is None else weight.chunk(ranks, cut)[rank]).clone()
            for name, (weight, cut) in whole.items()
        }
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    params = {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "n_heads": heads,
        "multiple_of": 32, "norm_eps": config["rms_norm_eps"], "vocab_size": -1,
    }  # fmt: skip
    if groups != heads:
        params["n_kv_heads"] = groups
    rope = config["rope_parameters"]
    if rope["rope_theta"] != 10_000:
        params["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] == "llama3":
        params["use_scaled_rope"] = True
    (folder / "params.json").write_text(json.dumps(params))
    return folder
