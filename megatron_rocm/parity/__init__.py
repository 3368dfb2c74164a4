"""`megatron-rocm parity`: proof that every layout trains as one process does, and that as transformers' model."""
