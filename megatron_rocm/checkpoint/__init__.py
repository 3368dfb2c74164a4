"""Checkpoints: megatron-core's torch_dist format in Megatron-LM's folder layout; `convert` knows other formats."""
