"""Endless torch datasets over megatron-core's GPTDataset.

Item i of a split is a function of the data, SPLIT, SEQ_LENGTH and SEED alone: neither how long the run is nor how it
is laid out over processes changes it. A run that consumed n samples goes on with item n.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_rocm.data.facts import SPLITS, Blend, require_sample, split_ranges
from megatron_rocm.data.indexed import open_index
from megatron_rocm.errors import UsageError

log = logging.getLogger(__name__)

Item = dict[str, torch.Tensor]
# The blend's pattern repeats after so many samples: weights hold to a millionth, and any position is found at once.
BLEND_PERIOD = 1 << 20
INDEX_FILES = ("document", "sample", "shuffle")


class Endless(Protocol):
    """Item i for any i >= 0: tokens, labels, position_ids (int64) and loss_mask (float32), each [SEQ_LENGTH]."""

    def __getitem__(self, index: int) -> Item: ...


class Splits(NamedTuple):
    """A split that was not asked for, or has no share of the data, is None."""

    train: Endless | None
    valid: Endless | None
    test: Endless | None


@dataclass(frozen=True)
class _Ids:
    """The tokenizer as far as GPTDataset asks. Padding is an id that data can't hold, so nothing is masked."""

    vocab_size: int
    eod: int
    pad: int = -1

    @property
    def unique_identifiers(self) -> OrderedDict[str, int]:
        return OrderedDict(vocab_size=self.vocab_size, eod=self.eod)


def build(
    paths: Blend | None,
    split: str,
    seq_length: int,
    seed: int,
    cache_path: str | Path | None,
    eod: int,
    vocab_size: int,
    names: Sequence[str] = SPLITS,
    *,
    reset_position_ids: bool = False,
    eod_mask_loss: bool = False,
) -> Splits:
    """The splits in `names`. No `paths` means mock data, which needs no files and has no EODs.

    `reset_position_ids` counts from 0 again after each EOD; `eod_mask_loss` leaves out of the loss what follows an EOD.
    Which samples there are, and the index files, depend on neither.

    Index files go to `cache_path`, by default `cache` beside the first prefix; under torch.distributed every rank must
    call this, one process per folder builds and the others wait. Raises UsageError, on every rank alike, for data that
    does not fill one sequence and for a cache that can't be written.
    """
    if not paths:
        made = {name: MockDataset(seq_length, vocab_size, eod, seed, SPLITS.index(name)) for name in names}
        return Splits(*(made.get(name) for name in SPLITS))

    cache = Path(cache_path) if cache_path else Path(paths[0][1]).parent / "cache"
    prefixes = [prefix for _, prefix in paths]
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=(prefixes, None),
        split=split,
        path_to_cache=str(cache),
        tokenizer=_Ids(vocab_size, eod),
        reset_position_ids=reset_position_ids,
        reset_attention_mask=False,  # of a mask that is not made: model/documents.py tells attention
        eod_mask_loss=eod_mask_loss,
        create_attention_mask=False,
    )
    shares = [one for one, bounds in zip(SPLITS, split_ranges(split, 10**9), strict=True) if len(bounds)]
    wanted = [name for name in SPLITS if name in names and name in shares]

    def open_all() -> dict[str, list[OneEpoch]]:
        return {name: [_one_epoch(prefix, name, config) for prefix in prefixes] for name in wanted}

    _in_turns(open_all)
    weights = np.array([1.0 if weight is None else weight for weight, _ in paths])
    splits: dict[str, Endless] = {}
    for name, parts in open_all().items():
        endless = [EndlessDataset(part, seed) for part in parts]
        splits[name] = endless[0] if len(endless) == 1 else BlendedDataset(endless, weights)
    return Splits(*(splits.get(name) for name in SPLITS))


def _in_turns(build_files) -> None:  # type: ignore[no-untyped-def]
    """Call it on global rank 0, then on one rank of each node, whose folder may be the node's own; then all may read.

    An error of one rank is raised on all: the others would wait for it for ever.
    """
    if not torch.distributed.is_initialized():
        build_files()
        return
    rank, local_rank = torch.distributed.get_rank(), int(os.environ.get("LOCAL_RANK", "0"))
    for my_turn in (rank == 0, rank != 0 and local_rank == 0):
        fault = None
        if my_turn:
            try:
                build_files()
            except UsageError as error:
                fault = str(error)
        faults: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(faults, fault)
        for one in faults:
            if one is not None:
                raise UsageError(one)


def _one_epoch(prefix: str, name: str, config: GPTDatasetConfig) -> OneEpoch:
    index = open_index(prefix)
    documents = split_ranges(config.split, len(index.lengths))[SPLITS.index(name)]
    require_sample(index, name, documents, config.split, config.sequence_length)
    indices = np.arange(documents.start, documents.stop, dtype=np.int32)
    low_level = GPTDataset.build_low_level_dataset(prefix, config)
    return OneEpoch(low_level, prefix, indices, None, Split[name], config)


class OneEpoch(GPTDataset):
    """megatron-core's GPTDataset of one epoch, in its order; only its index files are kept more carefully.

    megatron-core writes them in place (a killed run leaves half a file, which the next one reads), on global rank 0
    only (a cache on the node's own disk stays empty elsewhere), and under a name that prefix and settings alone make
    up (data prepared anew under its old name is read through the old index).
    """

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        content = zlib.crc32(np.ascontiguousarray(self.dataset.sequence_lengths).data)
        base = Path(self.config.path_to_cache, f"{self.unique_description_hash}-{content:08x}-{self.index_split.name}")
        paths = [base.with_name(f"{base.name}-{kind}_index.npy") for kind in INDEX_FILES]
        if not all(path.is_file() for path in paths):
            self._write_indices(paths)
        document, sample, shuffle = (np.load(path, mmap_mode="r") for path in paths)
        return document, sample, shuffle

    def _write_indices(self, paths: list[Path]) -> None:
        random = np.random.RandomState(self.config.random_seed)
        document = self.indices.copy()
        random.shuffle(document)
        lengths = self.dataset.sequence_lengths
        tokens = int(lengths[self.indices].sum(dtype=np.int64))
        sample = helpers.build_sample_idx(lengths, document, self.config.sequence_length, 1, tokens, True, True)
        shuffle = _positions(len(sample) - 1)
        random.shuffle(shuffle)
        folder = paths[0].parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, array in zip(paths, (document, sample, shuffle), strict=True):
                partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
                try:
                    with open(partial, "wb") as file:
                        np.save(file, array)
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(
                f"DATA_CACHE_PATH={folder}: index files can't be written ({error.strerror}). "
                "Give a folder that this user may write to, with room for about 20 bytes per document and sample"
            ) from None


def _positions(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.uint32 if size < 2**32 else np.int64)


class EndlessDataset:
    """One epoch after the other: the first in GPTDataset's order, epoch e in a permutation seeded by (seed, e)."""

    def __init__(self, epoch: GPTDataset, seed: int) -> None:
        self.epoch = epoch
        self.size = len(epoch)
        self._seed = seed
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, index: int) -> Item:
        epoch, position = divmod(int(index), self.size)
        return self.epoch[position if epoch == 0 else int(self._permutation(epoch)[position])]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            # RandomState's streams are frozen across numpy versions; Generator's are not (NEP 19).
            order = _positions(self.size)
            np.random.RandomState([self._seed, epoch]).shuffle(order)
            self._order = epoch, order
        return self._order[1]


class BlendedDataset:
    """Endless datasets mixed by weight: megatron-core's blend of BLEND_PERIOD samples, over and over."""

    def __init__(self, parts: Sequence[Endless], weights: np.ndarray) -> None:
        self.parts = parts
        self._part = np.zeros(BLEND_PERIOD, np.int16)
        self._nth = np.zeros(BLEND_PERIOD, np.int64)
        helpers.build_blending_indices(self._part, self._nth, weights / weights.sum(), len(parts), BLEND_PERIOD, False)
        self._per_period = np.bincount(self._part, minlength=len(parts))

    def locate(self, index: int) -> tuple[int, int]:
        """Which part item `index` comes from, and its number there."""
        period, position = divmod(int(index), BLEND_PERIOD)
        part = int(self._part[position])
        return part, period * int(self._per_period[part]) + int(self._nth[position])

    def __getitem__(self, index: int) -> Item:
        part, number = self.locate(index)
        return self.parts[part][number]


class MockDataset:
    """Text-like random sequences that a model can learn, with no files.

    Each id follows the one before it by a step of 1, 2, 3 or 5 (chances 1/2, 1/4, 1/8, 1/8) around a ring of at most
    256 ids, so the loss falls from ln(vocabulary) towards the entropy of a step, 1.213.
    """

    STEPS = np.array([1, 1, 1, 1, 2, 2, 3, 5])

    def __init__(self, seq_length: int, vocab_size: int, eod: int, seed: int, stream: int) -> None:
        ring = np.arange(min(vocab_size, 257))
        ring = ring[ring != eod][:256]
        self._ring = ring if len(ring) else np.arange(1)
        self._seq_length = seq_length
        self._key = seed * len(SPLITS) + stream

    def __getitem__(self, index: int) -> Item:
        # Raw words of Philox: the only part of numpy's generators whose output is fixed for good.
        raw = np.random.Philox(key=np.array([self._key, index], np.uint64)).random_raw(self._seq_length + 1)
        steps = self.STEPS[(raw & np.uint64(7)).astype(np.int64)]
        steps[0] = int(raw[0] >> np.uint64(3)) % len(self._ring)
        ids = torch.from_numpy(self._ring[np.cumsum(steps) % len(self._ring)])
        return {
            "tokens": ids[:-1].clone(),
            "labels": ids[1:].clone(),
            "loss_mask": torch.ones(self._seq_length),
            "position_ids": torch.arange(self._seq_length),
        }
