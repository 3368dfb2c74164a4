"""Endless torch datasets over megatron-core's GPTDataset.

Item i of a split is a function of the data, SPLIT, SEQ_LENGTH and SEED alone: neither how long the run is nor how it
is laid out over processes changes it. A run that consumed n samples goes on with item n.
"""

from __future__ import annotations

import functools
import os
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

from megatron_rocm.config.blend import Paths, blends
from megatron_rocm.data import native
from megatron_rocm.data.epoch_index import Epoch, cache_folder, ensure, load, plan, positions
from megatron_rocm.data.facts import SPLITS, blends_of
from megatron_rocm.data.mixture import shares
from megatron_rocm.errors import UsageError

Item = dict[str, torch.Tensor]
# The blend's pattern repeats after so many samples: weights hold to a millionth, and any position is found at once.
BLEND_PERIOD = 1 << 20


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
    paths: Paths | None,
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
    blend_by: str = "token",
) -> Splits:
    """The splits in `names`: shares of a blend by `split`, or blends of their own, `paths` by name.

    No `paths` means mock data, which needs no files and has no EODs. `blend_by` says what weights count (mixture.py).

    `reset_position_ids` counts from 0 again after each EOD; `eod_mask_loss` leaves out of the loss what follows an EOD.
    Which samples there are, and the index files, depend on neither.

    Index files go to `cache_path`, by default `cache` beside the first prefix; under torch.distributed every rank must
    call this, one process per folder builds and the others wait. Raises UsageError, on every rank alike, for data that
    does not fill one sequence and for a cache that can't be written.
    """
    if not paths:
        made = {name: MockDataset(seq_length, vocab_size, eod, seed, SPLITS.index(name)) for name in names}
        return Splits(*(made.get(name) for name in SPLITS))

    cache = cache_folder(cache_path, paths)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([prefix for blend in blends(paths) for _, prefix in blend], None),
        split=split,
        path_to_cache=str(cache),
        tokenizer=_Ids(vocab_size, eod),
        reset_position_ids=reset_position_ids,
        reset_attention_mask=False,  # of a mask that is not made: model/documents.py tells attention
        eod_mask_loss=eod_mask_loss,
        create_attention_mask=False,
    )

    @functools.cache
    def epochs() -> dict[str, list[Epoch]]:
        return plan(paths, split, names, seq_length, seed)

    _in_turns(lambda: [ensure(epoch, cache) for parts in epochs().values() for epoch in parts])
    splits: dict[str, Endless] = {}
    for name, blend in blends_of(paths, split, names).items():
        parts = epochs()[name]
        weights = shares(blend, [one.stop - one.start for one in parts], [one.tokens for one in parts], blend_by)
        endless = [EndlessDataset(OneEpoch(epoch, name, config), seed) for epoch in parts]
        splits[name] = endless[0] if len(endless) == 1 else BlendedDataset(endless, np.array(weights))
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


class OneEpoch(GPTDataset):
    """megatron-core's GPTDataset of one epoch, in its order, over an index file of ours that is there.

    megatron-core writes its own in place (a killed run leaves half a file, which the next one reads), on global rank 0
    only (a cache on the node's own disk stays empty elsewhere), and under a name that prefix and settings alone make
    up (data prepared anew under its old name is read through the old index).
    """

    def __init__(self, epoch: Epoch, name: str, config: GPTDatasetConfig) -> None:
        self._epoch = epoch
        low_level = GPTDataset.build_low_level_dataset(epoch.prefix, config)
        # The documents' numbers: kept by megatron-core and read nowhere, so not as an array.
        super().__init__(low_level, epoch.prefix, range(epoch.start, epoch.stop), None, Split[name], config)

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return load(self._epoch, Path(self.config.path_to_cache))


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
            order = positions(self.size)
            native.shuffle(order, np.random.RandomState([self._seed, epoch]))
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
