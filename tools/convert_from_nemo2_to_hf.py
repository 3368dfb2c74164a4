#!/usr/bin/env python3
"""Checkpoint → Hugging Face, by a NeMo guide's flags: --source --output-path."""

import sys

from megatron_rocm.checkpoint.convert.nemo import nemo2_to_hf
from megatron_rocm.cli import guarded

if __name__ == "__main__":
    sys.exit(guarded(lambda: nemo2_to_hf(sys.argv[1:])))
