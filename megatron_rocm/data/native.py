"""What an index is made with: compiled (csrc/native.cpp) where that was built, else numpy, to the same bits."""

from __future__ import annotations

import importlib
from bisect import bisect_left, insort
from types import ModuleType

import numpy as np

from megatron_rocm.errors import UsageError

SHUFFLED = (np.dtype(np.int32), np.dtype(np.uint32), np.dtype(np.int64))
CHUNK = 1 << 20  # documents that numpy takes at once


def _compiled() -> ModuleType | None:
    try:
        return importlib.import_module("megatron_rocm.data._native")
    except ImportError:
        return None


compiled = _compiled()


def shuffle(array: np.ndarray, random: np.random.RandomState) -> None:
    """`random.shuffle(array)`, in place, with the same outcome and the same state left in `random`.

    `array`: 1-D, contiguous, of int32, uint32 or int64. Raises ValueError for another.
    """
    if array.ndim != 1 or array.dtype not in SHUFFLED or not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError("shuffle takes a contiguous row of int32, uint32 or int64 that may be written to")
    if compiled is None or array.size > 2**32:
        random.shuffle(array)
        return
    state = random.get_state(legacy=False)
    twister = state["state"]
    twister["pos"] = compiled.shuffle(array.view(f"u{array.itemsize}"), twister["key"], twister["pos"])
    random.set_state(state)


def sample_index(lengths: np.ndarray, seq_length: int, tokens: int, documents: np.ndarray | None = None) -> np.ndarray:
    """Where each sample begins: [samples + 1, 2] of (place among the documents, offset in that document in tokens).

    What megatron.core.datasets.helpers.build_sample_idx gives without the last, partial sequence and with one token
    more than `seq_length` to each. `lengths`: int32, tokens of the documents, in the order they are read; or, with
    `documents`, int32, of that order and of however many epochs, by their number: looking them up takes longer than all
    the rest. `tokens`: what the places hold in all. Raises ValueError where they hold less, IndexError for a document
    without a length.
    """
    places = len(lengths if documents is None else documents)
    out = np.empty(((tokens - 1) // seq_length + 1, 2), sample_dtype(places))
    if compiled is None:
        _sample_index(lengths, documents, seq_length, out)
    elif documents is None:
        compiled.sample_index(lengths, seq_length, out)
    else:
        compiled.sample_index(np.ascontiguousarray(lengths), np.ascontiguousarray(documents), seq_length, out)
    return out


def sample_dtype(places: int) -> np.dtype:
    """The type of megatron-core's sample index over so many documents."""
    return np.dtype(np.int32 if places <= np.iinfo(np.int32).max else np.int64)


def _sample_index(lengths: np.ndarray, documents: np.ndarray | None, seq_length: int, out: np.ndarray) -> None:
    """A chunk at a time: memory stays small."""
    out[0] = 0
    row, before = 1, 0
    for start in range(0, len(lengths if documents is None else documents), CHUNK):
        if documents is None:
            chunk = lengths[start : start + CHUNK]
        elif documents[start : start + CHUNK].min() < 0:
            raise IndexError("sample_index: a document has no length")
        else:
            chunk = lengths[documents[start : start + CHUNK]]
        ends = np.cumsum(chunk, dtype=np.int64) + before
        boundaries = np.arange(row, min(len(out), int(ends[-1] - 1) // seq_length + 1), dtype=np.int64) * seq_length
        places = np.searchsorted(ends, boundaries, side="right")
        out[row : row + len(boundaries), 0] = start + places
        out[row : row + len(boundaries), 1] = boundaries - (ends[places] - chunk[places])
        row, before = row + len(boundaries), int(ends[-1])
    if row != len(out):
        raise ValueError("sample_index: the documents hold fewer tokens than was said")


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: the bin of each length (int64, from 0), and how many bins there are.

    The longest first, each into the fullest bin that it still fits in. `lengths` and `capacity` are in tokens; lengths
    alone decide, equal ones by their place. Raises UsageError for a length above `capacity`.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    if len(order) and lengths[order[0]] > capacity:
        raise UsageError(
            f"SEQ_LENGTH={capacity}: sequence {order[0]} has {lengths[order[0]]} tokens and fits no bin; "
            "give a larger SEQ_LENGTH, or leave such sequences out"
        )
    if len(order) and lengths[order[-1]] < 0:
        raise ValueError("pack: a length below 0")
    longest_first, bins = lengths[order], np.empty(len(lengths), np.int64)
    count = (compiled.pack if compiled is not None else _pack)(longest_first, capacity, bins)
    placed = np.empty_like(bins)
    placed[order] = bins
    return placed, count


def _pack(lengths: np.ndarray, capacity: int, bins: np.ndarray) -> int:
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of `by_room`, in order
    opened = 0
    for number, length in enumerate(lengths.tolist()):
        room = capacity
        best = bisect_left(rooms, length)
        if best == len(rooms):
            chosen, opened = opened, opened + 1
        else:
            room = rooms[best]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[best]
        bins[number] = chosen
        if room - length not in by_room:
            by_room[room - length] = []
            insort(rooms, room - length)
        by_room[room - length].append(chosen)
    return opened
