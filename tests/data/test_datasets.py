from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from megatron_rocm.data import epoch_index
from megatron_rocm.data.datasets import BLEND_PERIOD, BlendedDataset, build
from megatron_rocm.errors import UsageError

SEQ = 16


@pytest.fixture
def prefix(write_data, tmp_path):
    """100 documents of 1 to 60 tokens; every token of the set is another id."""
    lengths = np.random.RandomState(0).randint(1, 61, 100)
    ids = np.split(np.arange(lengths.sum()) + 10, np.cumsum(lengths)[:-1])
    return write_data(tmp_path / "data", ids, vocab_size=100_000)


def open_splits(prefix, **changes):
    settings = {"split": "80,15,5", "seq_length": SEQ, "seed": 7, "cache_path": None, "eod": 1, "vocab_size": 100_000}
    return build([(None, prefix)], **{**settings, **changes})


def tokens(dataset, numbers):
    return [tuple(dataset[number]["tokens"].tolist()) for number in numbers]


def test_first_epoch_is_megatron_cores_gpt_dataset(prefix, tmp_path):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset

    ours = open_splits(prefix)
    config = ours.train.epoch.config
    config.path_to_cache = str(tmp_path / "theirs")
    config.blend = ([prefix], None)
    theirs = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()
    for split, reference in zip(ours, theirs, strict=True):
        assert split.size == len(reference) > 1
        for number in range(len(reference)):
            assert all(torch.equal(split[number][key], value) for key, value in reference[number].items())


def test_item(prefix):
    item = open_splits(prefix).train[0]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in item.items()} == {
        "tokens": (torch.int64, (SEQ,)),
        "labels": (torch.int64, (SEQ,)),
        "loss_mask": (torch.float32, (SEQ,)),
        "position_ids": (torch.int64, (SEQ,)),
    }
    assert torch.equal(item["tokens"][1:], item["labels"][:-1]) and item["loss_mask"].sum() == SEQ


def test_ends_of_documents_are_marked_in_the_same_samples(write_data, tmp_path):
    lengths = np.random.RandomState(0).randint(1, 13, 200)
    ids = np.split(np.arange(lengths.sum()) + 10, np.cumsum(lengths)[:-1])
    prefix = write_data(tmp_path / "data", [np.append(one[:-1], 1) for one in ids], vocab_size=100_000)
    plain = open_splits(prefix).train
    files = sorted((tmp_path / "cache").iterdir())
    marked = open_splits(prefix, reset_position_ids=True, eod_mask_loss=True).train
    assert sorted((tmp_path / "cache").iterdir()) == files  # the index files of runs without it serve
    for number in range(plain.size):
        item, before = marked[number], plain[number]
        assert torch.equal(item["tokens"], before["tokens"]) and torch.equal(item["labels"], before["labels"])
        assert before["loss_mask"].sum() == SEQ and torch.equal(before["position_ids"], torch.arange(SEQ))
        # As Megatron-LM has it: what is predicted from an EOD, the next document's first token, is left out.
        assert torch.equal(item["loss_mask"] == 0, item["tokens"] == 1)
        place, wanted = 0, []
        for token in item["tokens"].tolist():
            wanted.append(place)
            place = 0 if token == 1 else place + 1
        assert item["position_ids"].tolist() == wanted


def test_every_epoch_has_the_same_samples_in_another_order(prefix):
    train = open_splits(prefix).train
    size = train.size
    epochs = [tokens(train, range(number * size, (number + 1) * size)) for number in range(3)]
    assert len(set(epochs[0])) == size
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_an_item_depends_on_nothing_read_before_it(prefix):
    numbers = [5, 3000, 1, 10**7 + 3, 700]
    forward = tokens(open_splits(prefix).train, numbers)
    assert forward == [tokens(open_splits(prefix).train, [number])[0] for number in numbers]
    assert forward != tokens(open_splits(prefix, seed=8).train, numbers)


def test_splits_share_nothing(prefix):
    splits = open_splits(prefix)
    seen = [{id for one in tokens(split, range(split.size)) for id in one} for split in splits]
    assert not seen[0] & seen[1] and not seen[1] & seen[2] and not seen[0] & seen[2]


def test_only_what_was_asked_for(prefix):
    assert [split is not None for split in open_splits(prefix, names=("train", "valid"))] == [True, True, False]
    assert [split is not None for split in open_splits(prefix, split="9,1,0")] == [True, True, False]


def test_too_little_text(prefix):
    with pytest.raises(UsageError, match=rf"DATA_PATH={prefix}: its valid split .* SEQ_LENGTH=1000"):
        open_splits(prefix, seq_length=1000)
    assert open_splits(prefix, seq_length=1000, names=("train",)).train


class Counted:
    """Item i is i."""

    def __getitem__(self, index):
        return {"number": index}


def test_blend_begins_as_megatron_cores():
    from megatron.core.datasets import helpers

    weights = np.array([5.0, 3.0, 2.0])
    blend = BlendedDataset([Counted()] * 3, weights)
    part, number = np.zeros(10_000, np.int16), np.zeros(10_000, np.int64)
    helpers.build_blending_indices(part, number, weights / 10, 3, 10_000, False)
    assert [blend.locate(index) for index in range(10_000)] == list(zip(part.tolist(), number.tolist(), strict=True))


def test_blend_goes_on_for_ever():
    weights = np.array([0.7, 0.299, 0.001])
    blend = BlendedDataset([Counted()] * 3, weights)
    around = [blend.locate(index) for index in range(3 * BLEND_PERIOD - 5000, 3 * BLEND_PERIOD + 5000)]
    for part in range(3):
        numbers = [number for one, number in around if one == part]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))  # none twice, none left out
        assert abs(len(numbers) - weights[part] * 10_000) < 5
    began = time.monotonic()
    part, number = blend.locate(10**12)
    assert abs(number - weights[part] * 10**12) < 10**7 and time.monotonic() - began < 0.1
    assert blend[10**12] == {"number": number}


def test_blend_of_files(prefix, write_data, tmp_path):
    other = write_data(tmp_path / "other", [[5] * 200] * 50, vocab_size=100_000)
    paths = [(3.0, prefix), (1.0, other)]
    settings = {"split": "1", "seq_length": SEQ, "seed": 7, "cache_path": tmp_path / "c", "eod": 1, "vocab_size": 10**5}
    train = build(paths, **settings).train
    found = [item == (5,) * SEQ for item in tokens(train, range(4000))]
    assert sum(found) == 1000
    alone = build([(None, prefix)], **settings).train
    assert [one for one, of_other in zip(tokens(train, range(4000)), found, strict=True) if not of_other] == tokens(
        alone, range(3000)
    )


def count_makes(monkeypatch):
    """A list that grows with every index that is made."""
    made = []
    original = epoch_index.make
    monkeypatch.setattr(epoch_index, "make", lambda epoch: (made.append(epoch), original(epoch))[1])
    return made


def test_cache_is_used_and_follows_the_data(prefix, write_data, tmp_path, monkeypatch):
    first = open_splits(prefix).train
    made = count_makes(monkeypatch)
    assert tokens(open_splits(prefix).train, range(9)) == tokens(first, range(9)) and not made
    # Other documents, as many as before, under the same name.
    write_data(prefix, [[number] * (number + 1) for number in range(100)], vocab_size=100_000)
    again = open_splits(prefix).train
    assert len(made) == 3 and len(tokens(again, range(again.size))) > first.size


def test_default_cache_lies_beside_the_data(prefix, tmp_path):
    open_splits(prefix)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "data.bin", "data.idx"}
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) == 3 and all(name.startswith("data-") and name.endswith(".epoch") for name in names)


def test_unwritable_cache(prefix, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"DATA_CACHE_PATH={tmp_path}/file: index files can't be written"):
        open_splits(prefix, cache_path=tmp_path / "file")


WORKER = """
    import os, sys
    import torch.distributed as dist
    from megatron_rocm.data import datasets, epoch_index
    from megatron_rocm.errors import UsageError
    rank, prefix, folder = int(os.environ["RANK"]), *sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    wrote = []
    original = epoch_index.make
    epoch_index.make = lambda epoch: (wrote.append(1), original(epoch))[1]
    for caches, local_ranks in (("cc", "01"), ("de", "00"), ("df", "00")):
        os.environ["LOCAL_RANK"] = local_ranks[rank]
        wrote.clear()
        try:
            train = datasets.build([(None, prefix)], "80,15,5", 16, 7, f"{folder}/{caches[rank]}", 1, 100_000).train
            print(len(wrote), sum(train[index]["tokens"].sum().item() * index for index in range(300)))
        except UsageError as error:
            print(error)
    dist.destroy_process_group()
"""


def test_ranks_take_turns(prefix, tmp_path):
    """One folder for all; a folder of each node's own; and a second node whose folder can't be written."""
    (tmp_path / "f").touch()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER), prefix, str(tmp_path)],
            env={**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [rank.communicate(timeout=150)[0].splitlines() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    train = open_splits(prefix, cache_path=tmp_path / "alone").train
    checksum = sum(train[index]["tokens"].sum().item() * index for index in range(300))
    assert [answer[:2] for answer in answers] == [
        [f"3 {checksum}", f"3 {checksum}"],
        [f"0 {checksum}", f"3 {checksum}"],
    ]
    assert answers[0][2] == answers[1][2] and answers[0][2].startswith(f"DATA_CACHE_PATH={tmp_path}/f: ")


def mock(**changes):
    settings = {"split": "1", "seq_length": 4096, "seed": 7, "cache_path": None, "eod": 2, "vocab_size": 1000}
    return build(None, **{**settings, **changes})


def test_mock_data_is_deterministic_and_can_be_learned():
    train, valid, test = mock()
    item = train[10**9]
    assert all(torch.equal(item[key], mock().train[10**9][key]) for key in item)
    others = (train[0], train[1], valid[0], test[0], mock(seed=8).train[0])
    assert len({tuple(one["tokens"].tolist()) for one in others}) == 5
    assert torch.equal(item["tokens"][1:], item["labels"][:-1])
    assert [item[key].dtype for key in ("tokens", "labels", "loss_mask", "position_ids")] == [
        torch.int64, torch.int64, torch.float32, torch.int64,
    ]  # fmt: skip
    assert 2 not in item["tokens"] and item["tokens"].max() == 256
    ring = torch.tensor([id for id in range(257) if id != 2])
    steps = (torch.searchsorted(ring, item["labels"]) - torch.searchsorted(ring, item["tokens"])) % 256
    shares = {step: count / 4096 for step, count in zip(*np.unique(steps, return_counts=True), strict=True)}
    assert -sum(share * math.log(share) for share in shares.values()) == pytest.approx(1.213, abs=0.03)


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 257, 128256])
def test_mock_data_stays_in_the_vocabulary(vocab_size):
    tokens = mock(vocab_size=vocab_size, eod=vocab_size - 1).train[3]["tokens"]
    assert tokens.min() >= 0 and tokens.max() < vocab_size
