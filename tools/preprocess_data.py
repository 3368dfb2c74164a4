#!/usr/bin/env python3
"""`megatron-rocm data preprocess …` by the name, and with the flags, of Megatron-LM's tool."""

import sys

from megatron_rocm.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", "preprocess", *sys.argv[1:]]))
