#!/usr/bin/env python3
"""`megatron-rocm data wiki …` by the name that people look for: a wiki's articles as JSON Lines.

Without arguments it is the classical Chinese Wikipedia, a small one; any other by --language and --date.
"""

import sys

from megatron_rocm.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", "wiki", *sys.argv[1:]]))
