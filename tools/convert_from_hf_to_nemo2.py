#!/usr/bin/env python3
"""Hugging Face → checkpoint, by a NeMo guide's flags: --source --output-path …"""

import sys

from megatron_rocm.checkpoint.convert.nemo import hf_to_nemo2
from megatron_rocm.cli import guarded

if __name__ == "__main__":
    sys.exit(guarded(lambda: hf_to_nemo2(sys.argv[1:])))
