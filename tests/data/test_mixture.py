"""Blends from what is typed to what is drawn: shares, paths of each split, the table at the start."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from support import tiny_run

from megatron_rocm.config import RunConfig, read
from megatron_rocm.config.schema import digest
from megatron_rocm.data import mixture
from megatron_rocm.data.datasets import build
from megatron_rocm.data.mixture import contributions, shares, table
from megatron_rocm.errors import UsageError
from megatron_rocm.launch import dry_run
from megatron_rocm.platform.machine import GIB, Machine
from megatron_rocm.resolve import resolve
from megatron_rocm.train.loop import open_data

SEQ, EOD = 16, 1
CPU = Machine("CPU", "cpu", "cpu", (), 24 * GIB, 2, "torch")
LLEMMA = [(2.0, "a"), (4.0, "b"), (1.0, "c"), (0.147368, "d"), (0.221053, "e")]


@pytest.fixture
def sources(write_data, bpe, tmp_path):
    """Three prefixes: 400 documents of 20 ids, all 10; 100 of 80, all 11; 50 of 40, all 12. Each ends with an EOD."""
    kinds = {"x": (400, 20), "y": (100, 80), "z": (50, 40)}
    return [
        write_data(tmp_path / name, [[10 + number] * (size - 1) + [EOD]] * count, tokenizer=bpe)
        for number, (name, (count, size)) in enumerate(kinds.items())
    ]


def test_weights_of_any_scale():
    ones = [1] * 5
    assert [f"{share:.1%}" for share in shares(LLEMMA, ones, ones, "token")] == [
        "27.1%",
        "54.3%",
        "13.6%",
        "2.0%",
        "3.0%",
    ]
    scaled = [(weight * 1e-7, prefix) for weight, prefix in LLEMMA]
    assert shares(scaled, ones, ones, "token") == pytest.approx(shares(LLEMMA, ones, ones, "token"))


def test_weights_of_documents_and_none():
    blend, documents, tokens = [(1.0, "a"), (3.0, "b")], [10, 20], [1000, 400]
    assert shares(blend, documents, tokens, "token") == [0.25, 0.75]
    assert shares(blend, documents, tokens, "document") == [0.625, 0.375]  # 1 × 100 to 3 × 20 tokens
    bare = [(None, "a"), (None, "b")]
    for by in ("token", "document"):
        assert shares(bare, documents, tokens, by) == pytest.approx([10 / 14, 4 / 14])
    with pytest.raises(UsageError, match="^BLEND_BY=document: the weight of b is under 1e-05"):
        shares([(1.0, "a"), (1.0, "b")], [1, 10**6], [10**6, 10**6], "document")
    with pytest.raises(UsageError, match="^a blend without weights goes by size: the weight of a is under 1e-05"):
        shares(bare, [1, 1], [1, 10**6], "token")


def opened(paths, names=("train", "valid", "test"), **more):
    settings = {"split": "90,10,0", "seq_length": SEQ, "seed": 7, "cache_path": None, "eod": EOD, "vocab_size": 320}
    return build(paths, **{**settings, **more}, names=names)


def drawn(dataset, count):
    """Samples of each source, by the id that it alone holds; and its documents, by their ends."""
    samples: Counter[int] = Counter()
    ends: Counter[int] = Counter()
    for number in range(count):
        tokens = dataset[number]["tokens"].numpy()
        source = int(tokens.max())
        samples[source - 10] += 1
        ends[source - 10] += int((tokens == EOD).sum())
    return samples, ends


def test_samples_are_drawn_as_weights_say(sources):
    blend = [(2.0, sources[0]), (4.0, sources[1]), (0.147, sources[2])]
    samples, _ = drawn(opened(blend).train, 5000)
    total = 2 + 4 + 0.147
    assert [samples[number] for number in range(3)] == pytest.approx([5000 * w / total for w, _ in blend], abs=2)


def test_documents_are_drawn_as_weights_say(sources):
    blend = [(3.0, sources[0]), (1.0, sources[1]), (1.0, sources[2])]
    samples, ends = drawn(opened(blend, blend_by="document").train, 5000)
    assert ends[0] / ends[1] == pytest.approx(3, rel=0.02) and ends[2] / ends[1] == pytest.approx(1, rel=0.05)
    assert samples[0] / samples[1] == pytest.approx(3 * 20 / 80, rel=0.02)


def test_without_weights_all_tokens_come_equally_often(sources):
    samples, _ = drawn(opened([(None, prefix) for prefix in sources]).train, 4500)
    assert [samples[number] for number in range(3)] == pytest.approx([2000, 2000, 500], abs=2)


def test_each_split_has_paths_of_its_own(sources, tmp_path):
    paths = {"train": [(1.0, sources[0]), (1.0, sources[2])], "valid": [(None, sources[1])]}
    splits = opened(paths, split="1,0,0")  # which cuts nothing here
    assert splits.test is None and splits.valid.size == (100 * 80 - 1) // SEQ
    assert drawn(splits.train, 100)[0] == {0: 50, 2: 50} and drawn(splits.valid, 100)[0] == {1: 100}
    assert {part.size for part in splits.train.parts} == {(400 * 20 - 1) // SEQ, (50 * 40 - 1) // SEQ}
    # The run's own way to it.
    run = tiny_run(
        tmp_path, train_blend=paths["train"], valid_blend=paths["valid"], eval_iters=1, vocab_size=320, seq_length=SEQ
    )
    train, valid = open_data(run)
    assert drawn(train, 100)[0] == {0: 50, 2: 50} and drawn(valid, 100)[0] == {1: 100}


def test_the_table_is_what_is_drawn(sources):
    blend = [(2.0, sources[0]), (4.0, sources[1]), (0.147, sources[2])]
    for by in ("token", "document"):
        train = opened(blend, blend_by=by).train
        found = contributions(blend, "90,10,0", "train", by, SEQ, 6000)
        samples, _ = drawn(train, 6000)
        for number, one in enumerate(found):
            assert one.tokens == pytest.approx(samples[number] * SEQ, abs=2 * SEQ)
            assert one.epochs == pytest.approx(samples[number] / train.parts[number].size, abs=0.05)
        assert sum(one.share for one in found) == pytest.approx(1)
        assert sum(one.tokens for one in found) == pytest.approx(6000 * SEQ)


def test_table_and_warning(sources):
    blend = [(2.0, sources[0]), (1.0, sources[1])]
    lines = table(blend, "90,10,0", "token", SEQ, {"train": 3000, "valid": 30}, 4)
    cells = [line.split() for line in lines]
    assert lines[0] == "train data: 3,000 samples of 16 tokens, weights by token"
    assert cells[1] == ["source", "weight", "share", "tokens", "epochs"]
    assert cells[2] == [sources[0], "2", "66.667%", "32", "k", "4.45"]  # 2,000 samples of 360 × 20 tokens
    assert cells[3] == [sources[1], "1", "33.333%", "16", "k", "2.23"]
    assert lines[4].startswith("valid data: 30 samples") and len(lines) == 9 and lines[8].startswith("warning: ")
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert warning.startswith(f"warning: the run reads {sources[0]} 4.45 times, above BLEND_MAX_EPOCHS=4: ")
    assert not [
        line for line in table(blend, "90,10,0", "token", SEQ, {"train": 3000}, 4.5) if line.startswith("warning")
    ]
    assert "weights" not in table([(None, sources[0])], "1", "token", SEQ, {"train": 10}, 4)[0]


def test_a_long_table_is_cut(sources, monkeypatch):
    monkeypatch.setattr(mixture, "MOST_ROWS", 2)
    lines = table([(1.0, sources[0]), (6.0, sources[1]), (3.0, sources[2])], "1", "token", SEQ, {"train": 100}, 99)
    assert [line.split()[0] for line in lines[2:]] == [sources[1], "2"]
    assert lines[3].split()[:3] == ["2", "more", "40.000%"]


def resolved(*arguments):
    return resolve(read("llama3", arguments, {}), CPU, {}, dry_run=True)


def test_a_run_says_what_its_data_give(sources, tmp_path):
    (tmp_path / "blend.yaml").write_text(f"train:\n  {sources[0]}: 3\n  {sources[1]}: 1\nvalid: {sources[2]}\n")
    words = [f"DATA_PATH={tmp_path}/blend.yaml", "SEQ_LENGTH=16", "BS=8", "TOTAL_ITERS=100", "EVAL_ITERS=2"]
    result = resolved(*words, "BLEND_BY=document", "SPLIT=1,1", "BLEND_MAX_EPOCHS=0.5")
    data = result.config.data
    assert data.paths == {"train": ((3.0, sources[0]), (1.0, sources[1])), "valid": ((None, sources[2]),)}
    assert data.blend is None and data.cache_path == f"{tmp_path}/cache"
    for told in (dry_run.text(result), dry_run.short(result)):
        assert "train data: 800 samples of 16 tokens, weights by document" in told
        assert "valid data: 16 samples of 16 tokens" in told
        # 3 × 20 to 1 × 80 tokens
        assert ["3", "42.857%", "5.486", "k", "0.69"] in [line.split()[1:] for line in told.splitlines()]
        assert f"warning: the run reads {sources[1]} 0.916 times, above BLEND_MAX_EPOCHS=0.5" in told
    assert any(note.startswith("SPLIT=1,1 has no effect") for note in result.notes)
    other_node = resolved(*words, "NNODES=2", "NODE_RANK=1", "MASTER_ADDR=head")
    assert "train data:" not in dry_run.short(other_node)


def test_samples_of_a_batch_that_grows(sources):
    result = resolved(f"DATA_PATH={sources[0]}", "SEQ_LENGTH=16", "BS=8", "TOTAL_ITERS=10", "RAMPUP_BATCH_SIZE=4 4 20")
    assert "train data: 60 samples" in dry_run.text(result)  # 5 steps of 4, 5 of 8


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["TRAIN_DATA_PATH={x}", "EVAL_ITERS=1"], "EVAL_ITERS=1 with TRAIN_DATA_PATH: .* give VALID_DATA_PATH"),
        (["VALID_DATA_PATH={x}"], "^VALID_DATA_PATH without TRAIN_DATA_PATH"),
        (["DATA_PATH={x}", "TRAIN_DATA_PATH={x}"], "^DATA_PATH with TRAIN_DATA_PATH"),
        (["TRAIN_DATA_PATH={x}", "MOCK_DATA=1"], "^MOCK_DATA=1 with TRAIN_DATA_PATH"),
        (["TRAIN_DATA_PATH={x}", "VALID_DATA_PATH={x}y"], "^VALID_DATA_PATH=.*xy: there is no"),
        (["TRAIN_DATA_PATH={x}", "SEQ_LENGTH=8000"], "^TRAIN_DATA_PATH=.*x: has 8,000 tokens, and SEQ_LENGTH=8000"),
        (["DATA_PATH=1 {x} 1"], "^DATA_PATH=.*3 words"),
        (["DATA_PATH={x}", "BLEND_BY=sample"], "^BLEND_BY=sample: must be one of token, document"),
        (["DATA_PATH={x}", "BLEND_MAX_EPOCHS=0"], "^BLEND_MAX_EPOCHS=0: must be a number above 0"),
    ],
)
def test_what_does_not_go_together(sources, words, told):
    with pytest.raises(UsageError, match=told):
        resolved("SEQ_LENGTH=16", *(word.format(x=sources[0]) for word in words))


def test_what_has_no_effect_is_said(sources):
    notes = resolved(f"DATA_PATH={sources[0]}", "SEQ_LENGTH=16", "BLEND_BY=document").notes
    assert "BLEND_BY=document has no effect without a blend of several sources" in notes
    notes = resolved(f"DATA_PATH=1 {sources[0]} 2 {sources[1]}", "BLEND_BY=document", "SEQ_LENGTH=16").notes
    assert "BLEND_BY" not in "".join(notes)


def test_run_files_of_older_versions_are_read(tmp_path):
    fields = tiny_run().model_dump(mode="json")
    for name in ("train_blend", "valid_blend", "test_blend", "blend_by", "blend_max_epochs"):
        del fields["data"][name]
    fields["data"]["blend"] = [[0.5, "a"], [0.5, "b"]]
    (tmp_path / "run.json").write_text(json.dumps({"hash": digest(fields), **fields}))
    data = RunConfig.load(tmp_path / "run.json").data
    assert data.paths == ((0.5, "a"), (0.5, "b")) and (data.blend_by, data.blend_max_epochs) == ("token", 4)
    assert tiny_run().data.paths == ()
