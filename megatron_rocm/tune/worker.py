"""`python -m megatron_rocm.tune.worker TASK.json ANSWER.jsonl`: products in a process of their own.

The libraries read their tuning files once, when they are first used, so every set of kernels has its own process; a
kernel that crashes or hangs takes that process with it and no more. The answer is a line when a product is begun and
one when it is done, so that what it died of is known.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from megatron_rocm.errors import UsageError
from megatron_rocm.platform.process import die_with_parent
from megatron_rocm.tune.shapes import Gemm

JUDGE, TRY = "judge", "try"  # compare with float64, or only multiply once: TunableOp tunes at the first call


def main(arguments: Sequence[str]) -> int:
    """Do what TASK.json says: {"what": "judge" or "try", "gemms": […]}. Exit status 2 where there is no GPU for it."""
    die_with_parent()
    task_file, answer_file = arguments
    task = json.loads(Path(task_file).read_text())
    with open(answer_file, "w") as answer:
        try:
            _work(task, answer)
        except UsageError as error:
            _say(answer, refused=str(error))
            return 2
    return 0


def _work(task: dict[str, Any], answer: TextIO) -> None:
    from megatron_rocm.tune import library, products
    from megatron_rocm.tune.judge import gaussian, judge, operands

    device = products.device()
    _say(answer, library=library.file(), revision=library.revision())  # known even where a kernel ends this process
    for number, fields in enumerate(task["gemms"]):
        gemm = Gemm(**fields)
        _say(answer, begun=gemm.key)
        if task["what"] == JUDGE:
            verdict = judge(gemm, device)
            _say(answer, done=gemm.key, verdict=asdict(verdict))
            if not (verdict.right or products.usable(device)):
                return  # a kernel that has gone astray leaves nothing behind that others could be judged by
        else:
            products.multiply(gemm, *operands(gemm, gaussian, device, seed=number))
            _say(answer, done=gemm.key)
    _say(answer, library=library.file(), revision=library.revision(), results=library.tunable_results())


def _say(answer: TextIO, **fields: Any) -> None:
    print(json.dumps(fields), file=answer, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
