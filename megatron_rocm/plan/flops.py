"""Floating point operations of a training step."""

from __future__ import annotations

from megatron_rocm.config.schema import RunConfig


def flops_per_token(run: RunConfig) -> float:
    """Operations per trained token, forward and backward, recomputation not counted.

    Each matrix product costs 2 operations per weight and token forward and twice that backward; causal attention
    does half of its two seq × seq products. Source: num_floating_point_operations in Megatron-LM's
    megatron/training/training.py, which AMD's scripts report too (it counts the padded vocabulary and causal halves).
    """
    model, seq = run.model, run.training.seq_length
    width = model.num_attention_heads * model.kv_channels
    projections = model.hidden_size * (2 * width + 2 * model.num_query_groups * model.kv_channels)
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    attention = width * seq  # scores and weighted sum, halved by causality
    logits = model.hidden_size * model.padded_vocab_size
    return 6.0 * (model.num_layers * (projections + mlp + attention) + logits)
