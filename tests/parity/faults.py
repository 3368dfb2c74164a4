"""The parity worker with faults: PLANTED in the environment says by JSON which layout has which of FAULTS.

The layouts that it does not name are measured as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.platform import cpu

cpu.install()

from megatron.core.distributed import DistributedDataParallel  # noqa: E402

from megatron_rocm.model import build  # noqa: E402
from megatron_rocm.parity import measure, worker  # noqa: E402

FINALIZE = sys.modules["megatron.core.distributed.finalize_model_grads"]  # its package has a function of that name
Llama, scale_gradients = build.Llama, DistributedDataParallel.scale_gradients


def with_wrong_base(*args: Any, **kwargs: Any) -> Any:
    return Llama(*args, **{**kwargs, "rotary_base": 10_000})


def halved(self: DistributedDataParallel, factor: Any) -> None:
    scale_gradients(self, factor / 2)


def crash(*args: Any) -> None:
    raise RuntimeError("planted")


FAULTS = {
    "gradients not reduced over data parallel ranks": (
        DistributedDataParallel, "finish_grad_sync", lambda self, force_all_reduce=False: None
    ),
    "gradients of norms not reduced over tensor parallel ranks": (
        FINALIZE, "_allreduce_non_tensor_model_parallel_grads", lambda *args: None
    ),
    "gradients divided by the data parallel size once more": (DistributedDataParallel, "scale_gradients", halved),
    "another rotary base": (build, "Llama", with_wrong_base),
    "no update": (measure, "update", lambda optimizer, norm: None),
    "a crash": (measure, "build", crash),
}  # fmt: skip


def planted(original: Any) -> Any:
    """`original`, which takes a run first, with the fault of that run's layout."""
    by_layout = json.loads(os.environ["PLANTED"])

    def with_fault(run: RunConfig, *args: Any) -> Any:
        fault = by_layout.get(Path(run.launch.log_dir).name)
        with patch.object(*FAULTS[fault]) if fault else contextlib.nullcontext():
            return original(run, *args)

    return with_fault


if __name__ == "__main__":
    measure.measure = planted(measure.measure)
    measure.measure_references = planted(measure.measure_references)
    sys.exit(worker.main(sys.argv[1:]))
