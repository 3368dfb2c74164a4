"""`megatron-rocm parity`: what was typed becomes a plan, and that a table."""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from megatron_rocm.config.request import RunRequest, read
from megatron_rocm.errors import UsageError
from megatron_rocm.launch.train import FAMILIES
from megatron_rocm.parity.compare import compare
from megatron_rocm.parity.layouts import ASKED, LAYOUTS, WARMUP, plan
from megatron_rocm.parity.table import plan_lines
from megatron_rocm.platform import machine
from megatron_rocm.platform.settings import LIBRARY_PREFIXES

STEPS = 5
OPTIONS = ("LAYERS", "STEPS", "LAYOUTS", "PROCESSES")  # may be typed as KEY=VALUE too
HELP = f"""megatron-rocm parity [--family {"|".join(FAMILIES)}] [--layers N] [--steps N] [--layouts A,B,…]
                     [--processes N] [KEY=VALUE …] [FILE.yaml …]

Trains a few steps from the same weights on the same samples in transformers' LlamaForCausalLM in FP32, in one process
of ours, and in every layout that this machine allows; compares losses, gradient norms before clipping, and in the first
step the gradient of every parameter. KEY=VALUE are those of `megatron-rocm train`: your own configuration. Unless they
are said, MODEL_SIZE is tiny and LR_WARMUP_ITERS {WARMUP}. DRY_RUN=1 shows what would be run.

  --family {"|".join(FAMILIES)}  whose sizes MODEL_SIZE names [llama3]
  --layers N              cut the model to so many layers: widths as they are, in less memory and time [all]
  --steps N               steps [{STEPS}]
  --layouts A,B,…         only these, beside one process [all]
  --processes N           layouts of at most so many processes [the GPUs there are; 2 on a CPU]

Exit status: 0 all agree, 1 a mismatch, 2 a mistake in the command.

layouts
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"parity: {message}; `megatron-rocm parity --help` shows the usage")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="megatron-rocm parity", add_help=False, allow_abbrev=False)
    parser.add_argument("--family", choices=FAMILIES, default="llama3")
    parser.add_argument("--layers", type=_count)
    parser.add_argument("--steps", type=_count, default=STEPS)
    parser.add_argument("--layouts", type=lambda text: text.split(","), default=[])
    parser.add_argument("--processes", type=_count)
    parser.add_argument("words", nargs="*")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_count.__name__ = "whole number above 0"  # as argparse names it


def main(arguments: Sequence[str]) -> int:
    """Compare. 1 where a layout differs from its reference by more than rounding explains."""
    if "--help" in arguments or "-h" in arguments:
        rows = [(layout.name, layout.what) for layout in LAYOUTS] + [(ASKED, "what TP=, PP= and the like make of it")]
        print(HELP + "\n".join(f"  {name:<22}  {what}" for name, what in rows))
        return 0
    words = []
    for word in arguments:
        name, _, value = word.partition("=")
        words += [f"--{name.lower()}", value] if name in OPTIONS else [word]
    options = _parser().parse_intermixed_args(words)
    request = read(options.family, options.words, os.environ, LIBRARY_PREFIXES)
    request = replace(request, layers=options.layers)
    here = machine.find(request.text("TARGET"), {**os.environ, **request.exports})
    planned = plan(request, here, os.environ, options.layouts, options.processes)
    if request.text("DRY_RUN") == "1":
        print("\n".join(plan_lines(planned)))
        return 0
    return compare(planned, options.steps, _folder(request))


def _folder(request: RunRequest) -> Path:
    now = datetime.datetime.now()
    return Path(
        request.text("LOG_DIR") or f"experiment/parity_{request.text('MODEL_SIZE', 'tiny')}/{now:%Y-%m-%d_%H-%M-%S}"
    )
