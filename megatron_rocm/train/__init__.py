"""Training a resolved run: `python -m megatron_rocm.train --config RUN.json` under torchrun. Read loop.py first."""
