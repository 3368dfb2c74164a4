"""The command `megatron-rocm`: a thin sub-command for each thing the package does."""

from __future__ import annotations

import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence

from megatron_rocm import __version__
from megatron_rocm.errors import UsageError

# Sub-command → (module that has `main(arguments) -> int`, what it does). Imported when asked for: help is instant.
COMMANDS = {
    "train": ("megatron_rocm.launch.train", "train Llama: --family llama2|llama3 [KEY=VALUE …] [FILE.yaml …]"),
    "parity": ("megatron_rocm.parity.command", "compare all layouts that this machine allows: [KEY=VALUE …]"),
    "prepare": ("megatron_rocm.data.prepare", "make a data set from text: [KEY=VALUE …]"),
    "data": ("megatron_rocm.data.command", "preprocess text; inspect, merge, split, concat or index .bin/.idx pairs"),
    "checkpoint": ("megatron_rocm.checkpoint.command", "ls, show, verify, diff or prune checkpoints: ls|… DIR"),
    "convert": ("megatron_rocm.checkpoint.convert.command", "Llama weights between Hugging Face, Meta and Megatron"),
    "tune": ("megatron_rocm.tune.command", "the fastest right kernel for each matrix product: [KEY=VALUE …]"),
    "doctor": ("megatron_rocm.doctor.command", "can this machine train, how fast, and what would mend it; --json"),
    "demo": ("megatron_rocm.demo", "data, training, export and a few generated lines, on any machine"),
}

# What a file or a folder of the user's refuses; other errors of the system are ours to explain.
THEIRS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EPIPE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line. Returns its exit status: 2 for a mistake, 130 for Ctrl-C, else the sub-command's own."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _dispatch(words))


def guarded(command: Callable[[], int]) -> int:
    """Run what a script of its own does; the exit status as `main` has it, with the same messages."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no "×" gets "?" for it
    try:
        status = command()
        if sys.stdout:  # None where it was closed: `>&-`
            sys.stdout.flush()
        return status
    except UsageError as error:
        print(f"megatron-rocm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in THEIRS:
            raise
        if error.filename is None:  # the output; nothing of it is left to be flushed at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno == errno.EPIPE:  # `… --help | head`
            return 128 + signal.SIGPIPE
        print(f"megatron-rocm: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        print(f"megatron-rocm {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UsageError(f"{words[0]}: no such command; there are {', '.join(COMMANDS)}")
    return importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])


def _usage() -> str:
    rows = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["megatron-rocm COMMAND …", "", *rows, "", "COMMAND --help tells more; --version"])


if __name__ == "__main__":
    sys.exit(main())
