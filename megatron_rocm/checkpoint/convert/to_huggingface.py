"""Any source → a Hugging Face folder that transformers, vLLM and others load. No model is built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_rocm.checkpoint.convert import huggingface
from megatron_rocm.checkpoint.convert.destination import new_folder
from megatron_rocm.checkpoint.convert.safetensors import header
from megatron_rocm.checkpoint.convert.source import Source, stream
from megatron_rocm.checkpoint.convert.stream import Stream
from megatron_rocm.checkpoint.convert.table import weights

MAX_SHARD_BYTES = 5 * 10**9
Described = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # type and shape of tensors by name


def write_huggingface(
    source: Source,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    tokenizer: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the weights, configuration and tokenizer of `source` as a Hugging Face folder; returns it.

    Weights keep the type they are stored in unless `dtype` says another. The folder appears whole or not at all.
    Raises UsageError for a bad source, and for an existing destination unless it is empty or to be overwritten.
    """
    out = Path(out).absolute()
    shards = list(_plan(source, dtype, max_shard_bytes))
    size = sum(_bytes(shard) for shard in shards)
    last = len(shards)
    names = [f"model-{i + 1:05d}-of-{last:05d}.safetensors" for i in range(last)] if last > 1 else ["model.safetensors"]
    with new_folder(out, size, source=source.folder, overwrite=overwrite, ours=_not_replaced) as partial:
        source.describe(partial, tokenizer, next(iter(shards[0].values()))[0])
        pieces = (piece for _, tensors in stream(source, dtype) for piece in tensors.items())
        for file, shard in zip(names, shards, strict=True):
            with Stream(partial / file, hashed=False) as written:
                written.write(header(shard))
                for expected in shard:
                    name, tensor = next(pieces)
                    assert name == expected
                    written.write(tensor.contiguous())
        if last > 1:
            places = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": size}, "weight_map": places}
            huggingface.write_json(partial / "model.safetensors.index.json", index)
    return out


def _plan(source: Source, dtype: torch.dtype | None, max_shard_bytes: int) -> Iterator[Described]:
    """What goes into each file: at most `max_shard_bytes`, or one weight."""
    shard: Described = {}
    for weight in weights(source.model):
        kind = dtype or source.dtype(weight)
        more = {name: (kind, shape) for name, shape in weight.hugging_face_shapes(source.model).items()}
        if shard and _bytes(shard) + _bytes(more) > max_shard_bytes:
            yield shard
            shard = {}
        shard.update(more)
    yield shard


def _bytes(tensors: Described) -> int:
    return sum(torch.Size(shape).numel() * kind.itemsize for kind, shape in tensors.values())


def _not_replaced(out: Path) -> str:
    if not (out / huggingface.CONFIG).is_file():
        return f"not a Hugging Face folder (no {huggingface.CONFIG})"
    folders = sorted(path.name for path in out.iterdir() if path.is_dir() and not path.name.startswith("."))
    return f"more than a Hugging Face model, with the folders {', '.join(folders)}" if folders else ""
