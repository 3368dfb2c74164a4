"""`megatron-rocm data …`: looking at .bin/.idx pairs, putting them together, taking them apart, their index files."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
from collections.abc import Sequence
from typing import NoReturn

from megatron_rocm.errors import UsageError

# Sub-command → (module, its function of the arguments, what it does). Imported when asked for: help is instant.
COMMANDS = {
    "preprocess": ("preprocess", "main", "text to a pair, with the flags of Megatron's preprocess_data.py"),
    "preprocess-nemo": ("preprocess", "main_nemo", "the same, with the flags of the NeMo pretraining guide"),
    "inspect": ("inspect_command", "main", "documents, lengths, samples, and a check of every offset: PREFIX"),
    "merge": ("combine_command", "merge", "one pair of all in a folder: --input FOLDER --output-prefix OUT"),
    "concat": ("combine_command", "concat", "one pair of those named: PREFIX … --output-prefix OUT"),
    "split": ("combine_command", "split", "several pairs of one, by documents: PREFIX --shares 99,1"),
    "index": ("index_command", "main", "make the index files of a run beforehand: [KEY=VALUE …] [FILE.yaml …]"),
    "pack": ("pack_command", "main", "prompts and answers, or packed .npy files, to sequences for fine-tuning"),
    "wiki": ("wiki", "main", "a wiki's articles as JSON Lines, from its dump: --language en"),
    "c4": ("c4_command", "main", "C4 for MLPerf's Llama 3.1 405B: consolidate|preprocess [KEY=VALUE …]"),
}


class Parser(argparse.ArgumentParser):
    """Of `megatron-rocm data COMMAND`; a mistake is a UsageError like all others."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"megatron-rocm data {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.removeprefix('megatron-rocm ')}: {message}; `{self.prog} --help` shows the usage")


def main(arguments: Sequence[str]) -> int:
    """Run a sub-command. Returns its exit status; raises UsageError for a mistake and for damaged data."""
    if not arguments or arguments[0] in ("-h", "--help"):
        rows = [f"  {name:<15} {what}" for name, (_, _, what) in COMMANDS.items()]
        print("\n".join(["megatron-rocm data COMMAND …", "", *rows, "", "COMMAND --help tells more"]))
        return 0
    if arguments[0] not in COMMANDS:
        raise UsageError(f"data {arguments[0]}: no such command; there are {', '.join(COMMANDS)}")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads, of no use here, cost a tenth of a second
    gc.set_threshold(1_000_000)  # a tokenizer is some hundred thousand lists, which Python would search again and again
    module, function, _ = COMMANDS[arguments[0]]
    return int(getattr(importlib.import_module(f"megatron_rocm.data.{module}"), function)(arguments[1:]))
