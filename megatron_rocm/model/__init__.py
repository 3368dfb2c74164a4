"""Llama as a megatron-core GPTModel: configuration, layers without Transformer Engine, initial weights."""
