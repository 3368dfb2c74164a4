"""`driver.py KEY=VALUE … -- words for worker.py`: a real launch whose workers are the stand-in of worker.py."""

import os
import sys
from pathlib import Path

from megatron_rocm.config.request import read
from megatron_rocm.errors import UsageError
from megatron_rocm.launch import command, run
from megatron_rocm.platform import machine
from megatron_rocm.resolve import resolve

cut = sys.argv.index("--")
pairs, words = sys.argv[1:cut], sys.argv[cut + 1 :]
here = machine.find("cpu")
resolution = resolve(read("llama3", ["MODEL_SIZE=tiny", *pairs], {}), here, dict(os.environ))


def with_worker(config):  # type: ignore[no-untyped-def]
    real = command.command(config)
    status = str(Path(config.launch.log_dir) / "status.json")
    return [
        *real[: real.index("--module")],
        "--",
        str(Path(__file__).with_name("worker.py")),
        *words,
        "--status",
        status,
    ]


run.command = with_worker
try:
    sys.exit(run.launch(resolution))
except UsageError as error:
    print(f"megatron-rocm: {error}", file=sys.stderr)
    sys.exit(2)
