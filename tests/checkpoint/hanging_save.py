"""A worker whose disk never answers."""

from __future__ import annotations

import sys
import time

from megatron_rocm.checkpoint import parts


def never_ends(*_: object, **__: object) -> None:
    time.sleep(60)


if __name__ == "__main__":
    parts.write = never_ends
    from megatron_rocm.train.process import main

    sys.exit(main(["--config", sys.argv[1]]))
