#!/usr/bin/env python3
"""Meta's Code Llama → checkpoint, by Llemma's flags: --input_dir --config_file --output_dir --num_output_shards."""

import sys

from megatron_rocm.checkpoint.convert.llemma import main
from megatron_rocm.cli import guarded

if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
