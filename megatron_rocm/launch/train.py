"""`megatron-rocm train`: what was typed becomes a resolution, and that a plan on paper or a run."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_rocm.config.help import help_text
from megatron_rocm.config.request import read
from megatron_rocm.errors import UsageError
from megatron_rocm.platform import machine
from megatron_rocm.platform.process import PARENT, die_with_parent
from megatron_rocm.platform.settings import LIBRARY_PREFIXES

FAMILIES = ("llama2", "llama3")


def main(arguments: Sequence[str]) -> int:
    """Plan (DRY_RUN=1), summarize (NO_TRAINING=1) or train. Returns the training's exit status."""
    family, words = _family(list(arguments))
    if "--help" in words or "-h" in words:
        print(help_text(family))
        return 0
    request = read(family, words, os.environ, LIBRARY_PREFIXES)
    if "NO_TRAINING" in request.said and request.said["NO_TRAINING"].value:
        from megatron_rocm.launch.summary import report

        print(report(request))
        return 0
    from megatron_rocm.resolve import resolve

    dry = request.text("DRY_RUN") == "1"
    here = machine.find(request.text("TARGET"), {**os.environ, **request.exports})
    resolution = resolve(request, here, dict(os.environ), dry_run=dry)
    if dry:
        from megatron_rocm.launch import dry_run

        print(dry_run.text(resolution))
        return 0
    from megatron_rocm.launch.run import launch

    if PARENT in os.environ:  # started by the demo or another program of ours
        die_with_parent()
    return launch(resolution)


def _family(words: list[str]) -> tuple[str, list[str]]:
    """The family named by `--family`, and the words that remain. llama3 for help."""
    if "--family" not in words:
        if "--help" in words or "-h" in words:
            return "llama3", words
        raise UsageError(f"train needs --family {' or '.join(FAMILIES)}")
    at = words.index("--family")
    family = words[at + 1] if at + 1 < len(words) else ""
    if family not in FAMILIES:
        raise UsageError(f"--family {family}: choose {' or '.join(FAMILIES)}")
    return family, words[:at] + words[at + 2 :]
