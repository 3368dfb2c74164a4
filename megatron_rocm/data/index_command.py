"""`megatron-rocm data index`: the index files of a run made beforehand, on any machine, without torch."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from megatron_rocm.config.blend import PATH_VARIABLES, chosen
from megatron_rocm.config.presets import PRESETS, default_seq_length
from megatron_rocm.config.request import RunRequest, read
from megatron_rocm.config.schema import variables
from megatron_rocm.data import native
from megatron_rocm.data.epoch_index import cache_folder, ensure, plan
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.settings import LIBRARY_PREFIXES

FAMILIES = tuple(dict.fromkeys(family for family, _ in PRESETS))
HELP = f"""megatron-rocm data index [--family {"|".join(FAMILIES)}] [KEY=VALUE …] [FILE.yaml …]

Makes the index files that a run with the same variables reads: the order of its documents and samples. That run then
checks them and starts at once. Any machine that sees the data will do; what is there and whole is left as it is.

  DATA_PATH        as for the run: a prefix, weights and prefixes, or a YAML file of them; or TRAIN_DATA_PATH, …
  SPLIT            [99,1,0]
  SEQ_LENGTH       [that of MODEL_SIZE and --family; one of the two is needed]
  SEED             [1234]
  EVAL_ITERS       above 0: the validation split's too [-1]
  DATA_CACHE_PATH  folder of the index files [`cache` beside the first prefix]

Every other variable of a run may stand there too, so that its own command line or YAML file serves.
"""


def main(arguments: Sequence[str]) -> int:
    """Make what is missing or damaged. Returns 0; raises UsageError for whatever would stop the run itself."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP, end="")
        return 0
    family, words = _family(list(arguments))
    request = read(family, words, os.environ, LIBRARY_PREFIXES)
    paths = chosen({name: request.said[name].value for name in PATH_VARIABLES if name in request.said})
    if not paths:
        raise UsageError("data index needs DATA_PATH: the prefix of a .bin/.idx pair, or weights and prefixes")
    names = ("train", "valid") if _value(request, "EVAL_ITERS") > 0 else ("train",)
    folder = cache_folder(request.text("DATA_CACHE_PATH"), paths)
    if native.compiled is None:
        print("the compiled module is not there: NumPy makes the same files, in several times the time")
    split, seed = _value(request, "SPLIT"), _value(request, "SEED")
    for name, epochs in plan(paths, split, names, _seq_length(request), seed).items():
        for epoch in epochs:
            began = time.monotonic()
            made = ensure(epoch, folder)
            print(
                f"{name} split of {epoch.prefix}: {epoch.stop - epoch.start:,} documents, {epoch.tokens:,} tokens, "
                f"{epoch.samples:,} samples: {'made' if made else 'there, checked'} in {time.monotonic() - began:.1f} s"
                f"\n  {folder / epoch.file_name}"
            )
    return 0


def _family(words: list[str]) -> tuple[str, list[str]]:
    """The family named by `--family`, by default llama3, and the words that remain."""
    if "--family" not in words:
        return "llama3", words
    at = words.index("--family")
    family = words[at + 1] if at + 1 < len(words) else ""
    if family not in FAMILIES:
        raise UsageError(f"--family {family}: choose {' or '.join(FAMILIES)}")
    return family, words[:at] + words[at + 2 :]


def _value(request: RunRequest, name: str) -> Any:
    """What was said for a variable, else its default."""
    if name in request.said:
        return request.said[name].value
    return next(variable.default for variable in variables() if variable.name == name)


def _seq_length(request: RunRequest) -> int:
    if "SEQ_LENGTH" in request.said:
        return _value(request, "SEQ_LENGTH")
    size = request.text("MODEL_SIZE").lower().removesuffix("b")
    if (request.family, size) not in PRESETS:
        raise UsageError(
            "data index needs SEQ_LENGTH, or a MODEL_SIZE of the family whose default it takes: "
            "what a run trains without either depends on the machine it runs on"
        )
    return default_seq_length(request.family, size)
