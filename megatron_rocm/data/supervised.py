"""Packed sequences for fine-tuning on disk: written once, read by memory map, without torch.

PREFIX.bin and PREFIX.idx are a megatron-core pair in which a sequence is an example and a document is a pack of them,
so whatever reads such pairs reads these. PREFIX.mask.npy has one byte for each token of PREFIX.bin: 1 where it is to be
learnt. PREFIX.json names the tokenizer and, under `supervised`, the length of sequence that the packs were made for.
No padding is stored.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megatron_rocm.data.indexed import (
    HEADER,
    SIDECAR_FORMAT,
    open_index,
    partial,
    read_header,
    read_sidecar,
    token_dtype,
)
from megatron_rocm.data.pairs import PairWriter
from megatron_rocm.data.tokenizer import TokenizerInfo
from megatron_rocm.errors import UsageError

AT_ONCE = 1 << 20  # tokens
Item = dict[str, np.ndarray]


class PackWriter:
    """Collects examples on disk, then writes them pack by pack; the files get their names together, `.idx` last.

    Left by an exception, it takes its partial files with it. Raises UsageError, naming `key`, where another process
    writes the same prefix.
    """

    def __init__(self, prefix: str, tokenizer: TokenizerInfo, seq_length: int, key: str = "--output-prefix") -> None:
        self.prefix, self.tokenizer, self.seq_length = prefix, tokenizer, seq_length
        self._lengths: list[np.ndarray] = []
        self._pair = PairWriter(prefix, token_dtype(tokenizer.vocab_size), key)
        self._ids = open(partial(prefix, "examples"), "w+b")  # noqa: SIM115
        self._mask = open(partial(prefix, "targets"), "w+b")  # noqa: SIM115

    def add(self, ids: np.ndarray, mask: np.ndarray, lengths: np.ndarray) -> None:
        """Append examples: ids one after the other, 1 in `mask` for each id that is to be learnt, their lengths."""
        self._ids.write(np.ascontiguousarray(ids, self._pair.dtype).data)
        self._mask.write(np.ascontiguousarray(mask, np.uint8).data)
        self._lengths.append(np.asarray(lengths, np.int32))

    @property
    def lengths(self) -> np.ndarray:
        """Of all examples so far, int32."""
        return np.concatenate([np.empty(0, np.int32), *self._lengths])

    def finish(self, bins: np.ndarray, packs: int, source: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Write the examples by their bin, in their order within one, and return the sidecar.

        `bins`: the pack of each example, 0 to `packs` - 1, none empty. `source` and `more` go to the sidecar.
        """
        lengths = self.lengths
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)[:-1]])
        order = np.argsort(bins, kind="stable")
        targets = 0
        with open(partial(self.prefix, "mask"), "wb") as masks:
            write_npy_header(masks, int(lengths.sum(dtype=np.int64)))
            for places in self._places(starts[order], lengths[order]):
                self._pair.write(self._map(self._ids, self._pair.dtype)[places])
                mask = self._map(self._mask, np.dtype(np.uint8))[places]
                targets += int(mask.sum(dtype=np.int64))
                masks.write(mask.data)
            masks.flush()
            os.fsync(masks.fileno())
        ends = np.cumsum(np.bincount(bins, minlength=packs), dtype=np.int64)
        self._pair.index(len(lengths), packs, [lengths[order]], [ends])
        sidecar = {
            "format": SIDECAR_FORMAT,
            "tokenizer": asdict(self.tokenizer),
            "documents": packs,
            "tokens": int(lengths.sum(dtype=np.int64)),
            **more,
            "checksum": self._pair.checksum,
            "supervised": {"seq_length": self.seq_length, "examples": len(lengths), "targets": targets},
            "source": source,
        }
        # What stood here before stops being whole first.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        os.replace(partial(self.prefix, "mask"), mask_path(self.prefix))
        self._pair.finish(sidecar)
        return sidecar

    def _map(self, file: IO[bytes], dtype: np.dtype) -> np.ndarray:
        file.flush()
        return np.memmap(file, dtype, "r")

    @staticmethod
    def _places(starts: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Where the tokens of examples that begin at `starts` lie, about AT_ONCE at a time."""
        ends = np.cumsum(lengths, dtype=np.int64)
        cuts = np.unique(np.searchsorted(ends, np.arange(AT_ONCE, int(ends[-1]) + AT_ONCE, AT_ONCE), side="left") + 1)
        low = 0
        for high in np.minimum(cuts, len(lengths)).tolist():
            if high > low:
                some = lengths[low:high].astype(np.int64)
                before = np.cumsum(some) - some
                yield np.repeat(starts[low:high] - before, some) + np.arange(int(some.sum()))
                low = high

    def __enter__(self) -> PackWriter:
        self._pair.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._ids, self._mask):
            file.close()
        for name in ("examples", "targets", "mask"):
            Path(partial(self.prefix, name)).unlink(missing_ok=True)
        self._pair.__exit__(kind, error, trace)


class Packs:
    """The packs of PREFIX as items for training. Torch-free; the files are memory-mapped, so copies cost nothing.

    Item i is a dict of arrays:
        tokens        [seq_length] int64, the pack's examples one after the other, then EOD as padding
        labels        [seq_length] int64, the token that follows in the same example; EOD where none does
        loss_mask     [seq_length] float32, 1 where the label is to be learnt
        position_ids  [seq_length] int64, from 0 in each example, and in the padding
        boundaries    [examples + 1, or + 2 with padding] int32, from 0 to seq_length: where attention must not reach
                      across, the padding being a document of its own

    Raises UsageError, naming `key`, where the files are not whole, no packs, or made for longer sequences.
    """

    def __init__(self, prefix: str, seq_length: int | None = None, key: str = "DATA_PATH") -> None:
        index, head = open_index(prefix, key), read_header(prefix, key)
        sidecar = read_sidecar(prefix)
        made_for = (sidecar or {}).get("supervised", {}).get("seq_length")
        if sidecar is None or not isinstance(made_for, int):
            raise UsageError(
                f"{key}={prefix}: is not packed for fine-tuning: {prefix}.json says nothing of it. Make it with "
                "`megatron-rocm data pack`"
            )
        self.seq_length = made_for if seq_length is None else seq_length
        self.eod = sidecar["tokenizer"]["eod"]
        self._lengths, self._dtype, self.tokens = index.lengths, index.dtype, index.tokens
        self._ends = np.memmap(f"{prefix}.idx", np.int64, "r", HEADER.size + 12 * head.sequences, (head.boundaries,))
        self._firsts = np.concatenate([[0], np.cumsum(self._pack_lengths())])
        longest = int(np.diff(self._firsts).max())
        if longest > self.seq_length:
            raise UsageError(
                f"SEQ_LENGTH={self.seq_length}: {key}={prefix} has packs of {longest:,} tokens, made for sequences of "
                f"{made_for:,}. Give SEQ_LENGTH={made_for}, or pack the data again"
            )
        self._ids = np.memmap(f"{prefix}.bin", self._dtype, "r")
        self._mask = _open_mask(prefix, self.tokens, key)

    def _pack_lengths(self) -> np.ndarray:
        sums = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        return np.diff(sums[self._ends])

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(self, number: int) -> Item:
        if not 0 <= number < len(self):
            raise IndexError(f"pack {number} of {len(self)}")
        first, end = int(self._firsts[number]), int(self._firsts[number + 1])
        lengths = np.asarray(self._lengths[self._ends[number] : self._ends[number + 1]], np.int64)
        size, used = self.seq_length, end - first
        boundaries = np.concatenate([[0], np.cumsum(lengths), [size] if used < size else []]).astype(np.int32)

        tokens = np.full(size, self.eod, np.int64)
        tokens[:used] = self._ids[first:end]
        labels = np.full(size, self.eod, np.int64)
        labels[:-1] = tokens[1:]
        loss_mask = np.zeros(size, np.float32)
        loss_mask[: used - 1] = self._mask[first + 1 : end]
        # The last token of an example predicts nothing: what follows it is another one's beginning.
        last = boundaries[1:] - 1
        labels[last] = self.eod
        loss_mask[last] = 0
        position_ids = np.arange(size) - np.repeat(boundaries[:-1].astype(np.int64), np.diff(boundaries))
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": position_ids,
            "boundaries": boundaries,
        }


def mask_path(prefix: str) -> Path:
    """Where the mask of PREFIX lies."""
    return Path(f"{prefix}.mask.npy")


def write_npy_header(file: IO[bytes], size: int) -> None:
    """The head of a .npy file of `size` bytes of uint8, which then follow."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (size,)})


def _open_mask(prefix: str, tokens: int, key: str) -> np.ndarray:
    path = mask_path(prefix)
    try:
        mask = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, struct.error) as error:
        raise UsageError(
            f"{key}={prefix}: {path} can't be read ({error}): copy all files again, or pack anew"
        ) from None
    if mask.dtype != np.uint8 or mask.shape != (tokens,):
        raise UsageError(f"{key}={prefix}: {path} does not belong to its .bin: copy all files again, or pack anew")
    return mask
