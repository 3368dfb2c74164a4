"""Checkpoints in other formats. table.py is the weight mapping, export.py writes Hugging Face folders with it."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import NoReturn

from megatron_rocm.errors import UsageError

TO_HF = "megatron-to-hf"
LATER = ("hf-to-megatron", "meta-to-megatron")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"convert: {message}; `megatron-rocm convert --help` shows the usage")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="megatron-rocm convert", description="Convert a run's checkpoint to a Hugging Face folder.")
    parser.add_argument("direction", help=TO_HF)
    parser.add_argument("source", help="SAVE_CKPT_PATH of a run, or an iter_… folder in it")
    parser.add_argument("destination", help="the folder to make")
    parser.add_argument("--iteration", type=int, metavar="N", help="which checkpoint (default: the latest)")
    parser.add_argument("--check", action="store_true", help="run both models and compare their logits")
    parser.add_argument("--overwrite", action="store_true", help="replace a Hugging Face folder that is there")
    parser.add_argument("--tokenizer", metavar="PATH", help="the run's tokenizer, where it has moved")
    return parser


def main(argv: Sequence[str]) -> int:
    """`megatron-rocm convert …`. Returns the exit status: 1 where --check finds a difference. Raises UsageError."""
    if argv and argv[0] in LATER:
        raise UsageError(f"convert {argv[0]} is not in this version; there is {TO_HF}")
    args = _parser().parse_args(argv)
    if args.direction != TO_HF:
        raise UsageError(f"convert {args.direction}: there is no such direction; there is {TO_HF}")

    from megatron_rocm.checkpoint.convert.export import export

    folder = export(
        args.source, args.destination, iteration=args.iteration, overwrite=args.overwrite, tokenizer=args.tokenizer
    )
    print(f"wrote {folder}")
    if not args.check:
        return 0

    # Of fused kernels that are missing and of names that will go: nothing that concerns this comparison.
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")
    from megatron_rocm.checkpoint.convert.check import check

    agreement = check(args.source, folder, iteration=args.iteration)
    print(agreement)
    return 0 if agreement else 1
