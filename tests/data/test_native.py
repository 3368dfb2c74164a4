"""The same bits as numpy's shuffle and megatron-core's sample index, compiled and in NumPy; and how well bins fill."""

import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from megatron_rocm.data import native
from megatron_rocm.errors import UsageError

COMPILED = native.compiled


@pytest.fixture(params=["compiled", "numpy"])
def way(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(native, "compiled", None)
    elif COMPILED is None:
        pytest.skip("the compiled module was not built on this machine")


def test_it_is_compiled_where_it_can_be():
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("no C++ compiler, or no Python.h")
    assert native.compiled is not None


AROUND_POWERS = [2**power + more for power in (2, 5, 8, 10, 13, 16) for more in (-1, 0, 1)]
AROUND_BLOCKS = [623, 624, 625, 70_000, 200_003]


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
@pytest.mark.parametrize("size", [0, 1, 2, 3, *AROUND_POWERS, *AROUND_BLOCKS])
def test_shuffle_is_numpys(way, size, dtype):
    theirs, ours = np.random.RandomState(size), np.random.RandomState(size)
    for _ in range(2):  # the second goes on in the midst of the generator's words
        wanted = np.arange(size, dtype=dtype)
        found = wanted.copy()
        theirs.shuffle(wanted)
        native.shuffle(found, ours)
        assert np.array_equal(found, wanted) and found.dtype == dtype
    assert same_state(theirs, ours)


def same_state(one, other):
    """Every word, the position among them, and the normal deviate that is kept for the next call."""
    (_, *first), (_, *second) = one.get_state(), other.get_state()
    return all(np.array_equal(left, right) for left, right in zip(first, second, strict=True))


@pytest.mark.parametrize("drawn", [0, 1, 623, 624, 625, 1247])
def test_shuffle_from_any_place_in_the_stream(way, drawn):
    """Also after numpy kept one of two normal deviates, which a shuffle leaves alone."""
    theirs, ours = np.random.RandomState([7, 3]), np.random.RandomState([7, 3])
    wanted, found = np.arange(1000), np.arange(1000)
    for random in (theirs, ours):
        random.tomaxint(drawn)
        random.normal()
    theirs.shuffle(wanted)
    native.shuffle(found, ours)
    assert np.array_equal(found, wanted) and same_state(theirs, ours)
    assert theirs.normal() == ours.normal() and theirs.randint(10**9) == ours.randint(10**9)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(9).reshape(3, 3),
        np.arange(9)[::2],
        np.arange(9.0),
        np.arange(9, dtype=np.int16),
        np.broadcast_to(1, 9),
    ],
)
def test_shuffle_refuses_what_it_would_not_shuffle_in_place(way, array):
    with pytest.raises(ValueError, match="contiguous row of int32"):
        native.shuffle(array, np.random.RandomState(0))


def random_lengths(seed, count, longest):
    random = np.random.RandomState(seed)
    lengths = random.randint(0, longest + 1, count).astype(np.int32)
    lengths[random.rand(count) < 0.2] = 0
    return lengths


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize(
    ("count", "longest", "seq_length"),
    [(100, 60, 16), (1000, 7, 33), (50, 5000, 64), (3, 10, 1), (1, 100, 9), (2000, 1, 5), (400, 90, 20_000)],
)
def test_sample_index_is_megatron_cores(way, monkeypatch, count, longest, seq_length, epochs):
    """Documents longer and shorter than a sample, many of them empty, and less than one sample in all."""
    from megatron.core.datasets import helpers

    monkeypatch.setattr(native, "CHUNK", 64)  # seams of NumPy's chunks
    lengths = random_lengths(count, count, longest)
    lengths[0] = 0
    lengths[-1] += 1
    tokens = int(lengths.sum())
    documents = np.tile(np.arange(count, dtype=np.int32), epochs)
    np.random.RandomState(epochs).shuffle(documents)
    for order in (documents, np.sort(documents)):
        wanted = helpers.build_sample_idx(lengths, order, seq_length, epochs, tokens, True, True)
        pairs = np.stack([order, lengths[order]], axis=1)
        for found in (
            native.sample_index(lengths, seq_length, epochs * tokens, order),
            native.sample_index(lengths[order], seq_length, epochs * tokens),
            native.sample_index(pairs[:, 1], seq_length, epochs * tokens),
        ):
            assert np.array_equal(found, wanted) and found.dtype == wanted.dtype


def test_sample_index_of_more_places_than_int32_holds(way):
    """Such an index takes 16 GiB; the same code fills a small one of its type."""
    assert native.sample_dtype(2**31 - 1) == np.int32 and native.sample_dtype(2**31) == np.int64
    lengths, documents = random_lengths(0, 500, 40), np.random.RandomState(0).permutation(500).astype(np.int32)
    for numbers in (None, documents):
        wanted = native.sample_index(lengths, 16, int(lengths.sum()), numbers)
        found = np.empty(wanted.shape, np.int64)
        if native.compiled is None:
            native._sample_index(lengths, numbers, 16, found)
        else:
            native.compiled.sample_index(lengths, *([] if numbers is None else [numbers]), 16, found)
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize(
    ("documents", "tokens", "error"),
    [(None, 71, ValueError), ([0, 1], 71, ValueError), ([0, 2], 60, IndexError), ([0, -1], 60, IndexError)],
)
def test_sample_index_of_documents_that_are_not_there(way, documents, tokens, error):
    numbers = None if documents is None else np.array(documents, np.int32)
    with pytest.raises(error):
        native.sample_index(np.array([50, 10], np.int32), 10, tokens, numbers)


def first_fit_decreasing(lengths, capacity):
    rooms = []
    for length in sorted(lengths, reverse=True):
        for number, room in enumerate(rooms):
            if room >= length:
                rooms[number] -= length
                break
        else:
            rooms.append(capacity - length)
    return len(rooms)


@pytest.mark.parametrize("seed", range(8))
def test_packing(way, seed):
    random = np.random.RandomState(seed)
    capacity = int(random.choice([64, 500, 4096]))
    lengths = np.minimum(random.lognormal(np.log(capacity / 6), 1, 700).astype(np.int64), capacity)
    bins, count = native.pack(lengths, capacity)
    assert np.array_equal(np.unique(bins), np.arange(count))  # none is empty
    assert np.bincount(bins, lengths).max() <= capacity
    assert -(-lengths.sum() // capacity) <= count <= first_fit_decreasing(lengths, capacity) + 1
    again, _ = native.pack(lengths.astype(np.int32), capacity)
    assert np.array_equal(bins, again)


def test_packing_puts_the_longest_first_and_each_where_it_fits_best(way):
    bins, count = native.pack(np.array([2, 7, 6, 3, 1, 1]), 10)
    # 7 and 6 open a bin each; 3 fills the first, 2 and both 1 fill the second.
    assert (bins.tolist(), count) == ([1, 0, 1, 0, 1, 1], 2)


def test_both_ways_pack_alike(monkeypatch):
    if COMPILED is None:
        pytest.skip("the compiled module was not built on this machine")
    for seed in range(20):
        random = np.random.RandomState(seed)
        lengths = random.randint(0, 101, random.randint(0, 600))
        with monkeypatch.context() as without:
            without.setattr(native, "compiled", None)
            wanted = native.pack(lengths, 100)
        found = native.pack(lengths, 100)
        assert np.array_equal(found[0], wanted[0]) and found[1] == wanted[1]


def test_packing_nothing(way):
    bins, count = native.pack(np.array([], np.int64), 8)
    assert len(bins) == count == 0


def test_packing_refuses_what_fits_no_bin(way):
    with pytest.raises(UsageError, match="SEQ_LENGTH=8: sequence 1 has 9 tokens and fits no bin"):
        native.pack(np.array([8, 9, 1]), 8)
    with pytest.raises(ValueError, match="below 0"):
        native.pack(np.array([8, -1]), 8)
