"""A job in parts, on as many machines as there are, and the one pair that they make together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rocm.data.combine import Combined, concat
from megatron_rocm.data.indexed import read_sidecar
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import to_ourselves

SAME = ("corpus", "key", "append_eod", "bos")  # of a sidecar's `source`


def prefix(whole: str, shard: tuple[int, int]) -> str:
    """PREFIX of a shard's files: beside those of the whole."""
    index, count = shard
    return f"{whole}.shard-{index:05}-of-{count:05}"


def merge(whole: str, count: int, overwrite: bool = False) -> Combined | None:
    """Put the `count` shards of PREFIX one after the other; None where that had been done.

    Raises UsageError for a shard that is missing, unfinished, damaged, or of another job than the first.
    """
    parts = [prefix(whole, (index, count)) for index in range(count)]
    sources = [_finished(part, (index, count)) for index, part in enumerate(parts)]
    for part, source in zip(parts, sources, strict=True):
        for name in SAME:
            if source.get(name) != sources[0].get(name):
                raise UsageError(
                    f"--merge-shards={count}: {part} is of another job than {parts[0]}: its {name} is "
                    f"{source.get(name)!r}, not {sources[0].get(name)!r}. Make both with the same command"
                )
    with to_ourselves(whole, "--output-prefix"):
        if _merged(whole, parts):
            return None
        if not any((read_sidecar(part) or {}).get("documents") for part in parts):
            raise UsageError(f"--merge-shards={count}: no shard of {whole} has a document. Give text, see --input")
        stamps = {source.get("whole") for source in sources}
        facts = {name: sources[0][name] for name in ("input", *SAME) if name in sources[0]}
        if len(stamps) == 1:
            facts["stamp"] = stamps.pop()
        return concat(parts, whole, key="--merge-shards", overwrite=overwrite, source=facts)


def _finished(part: str, shard: tuple[int, int]) -> dict[str, Any]:
    sidecar = read_sidecar(part) if Path(f"{part}.idx").exists() else None
    index, count = shard
    if sidecar is None:
        state = "is not finished" if Path(f"{part}.journal").exists() else "is missing"
        raise UsageError(f"--merge-shards={count}: {part} {state}. Run the same command with --shard={index}/{count}")
    source: dict[str, Any] = sidecar["source"]
    if source.get("shard") != [index, count]:
        raise UsageError(
            f"--merge-shards={count}: {part} says that it is shard {source.get('shard')}, not [{index}, {count}]. "
            f"Run the command with --shard={index}/{count} again"
        )
    return source


def _merged(whole: str, parts: list[str]) -> bool:
    """Whether the output is there, made of just these parts."""
    sidecar = read_sidecar(whole) if Path(f"{whole}.idx").exists() else None
    if sidecar is None:
        return False
    made_of = [part["checksum"] for part in sidecar["source"].get("parts") or ()]
    return made_of == [(read_sidecar(part) or {}).get("checksum") for part in parts]
