"""Training a resolved run: `python -m megatron_rocm.train --config RUN.json` under torchrun. Start reading at loop.py."""
