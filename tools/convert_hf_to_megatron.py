#!/usr/bin/env python3
"""`megatron-rocm convert hf-to-megatron SRC DST …` by the name that people look for."""

import sys

from megatron_rocm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
