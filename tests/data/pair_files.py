"""Pairs as megatron-core itself writes them, and as it reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write(prefix: Path | str, documents: Sequence[Sequence[Sequence[int]]], vocab_size: int = 500) -> str:
    """Write documents, each of some sequences of ids (none for an empty one), with IndexedDatasetBuilder."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(vocab_size))
    for sequences in documents:
        for ids in sequences:
            builder.add_item(torch.tensor(ids))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def some(seed: int, count: int, vocab_size: int = 500) -> list[list[list[int]]]:
    """So many documents: of one sequence, of several, and empty ones, each with ids of its own."""
    random = np.random.RandomState(seed)
    return [
        [random.randint(0, vocab_size, random.randint(1, 40)).tolist() for _ in range(random.choice([0, 1, 1, 1, 3]))]
        for _ in range(count)
    ]


def read(prefix: Path | str) -> list[list[list[int]]]:
    """The documents of a pair, by megatron-core's IndexedDataset, which can't open one without any."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    if not Path(f"{prefix}.bin").stat().st_size:
        return []
    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices.tolist()
    return [[dataset[number].tolist() for number in range(*pair)] for pair in zip(bounds, bounds[1:], strict=False)]


def describe(prefix: str, tokenizer: dict[str, object], **source: object) -> str:
    """Give a pair the sidecar that `prepare` would write; its tokens are counted."""
    documents = read(prefix)
    tokens = sum(len(ids) for sequences in documents for ids in sequences)
    sidecar = {"format": 1, "tokenizer": tokenizer, "documents": len(documents), "tokens": tokens, "bytes": 7}
    Path(f"{prefix}.json").write_text(json.dumps({**sidecar, "source": {"append_eod": True, **source}}))
    return prefix
