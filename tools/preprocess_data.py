#!/usr/bin/env python3
"""`megatron-rocm data preprocess …` by the name, and with the flags, of Megatron-LM's tool."""

import contextlib
import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads have nothing to do here, and spin
    if "GLIBC_TUNABLES" not in os.environ:
        # Memory in huge pages, a tenth of the CPU time: glibc can be told at a process's start only.
        with contextlib.suppress(OSError):
            os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
    from megatron_rocm.cli import main

    sys.exit(main(["data", "preprocess", *sys.argv[1:]]))
