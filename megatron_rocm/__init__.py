"""Train Llama with megatron-core on AMD, NVIDIA or a CPU: one request, resolved once, run anywhere."""

__version__ = "0.1.0"
