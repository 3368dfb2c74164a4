"""Train a run (first argument) and write (second) the rows, inner size and columns of every matrix product it does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.train.process import work


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.mm.default:
            self.shapes.append((*args[0].shape, args[1].shape[1]))
        return function(*args, **(kwargs or {}))


if __name__ == "__main__":
    with Recorder() as recorder:
        status = work(RunConfig.load(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(recorder.shapes))
    sys.exit(status)
