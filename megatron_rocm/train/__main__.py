"""`python -m megatron_rocm.train --config RUN.json`: one process of a run, started by torchrun.

Exit status: 0 finished or stopped as asked, 2 a mistake that the user can put right (one message, no traceback), 1
everything else.
"""

from __future__ import annotations

import sys

from megatron_rocm.train import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds
    from megatron_rocm.train.process import main

    sys.exit(main(sys.argv[1:]))
