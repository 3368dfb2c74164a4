from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_rocm.data import facts
from megatron_rocm.data.facts import check_size, describe, parse_split, split_ranges
from megatron_rocm.data.tokenizer import train_bpe
from megatron_rocm.errors import UsageError

HF = "HuggingFaceTokenizer"


@pytest.mark.parametrize("split", ["99,1,0", "99990,8,2", "0.9,0.1", "1", "1,1,1", "969, 30, 1", "969/30/1", "100,0,3"])
def test_splits_are_megatron_cores(split):
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for documents in (1, 2, 49, 50, 51, 731, 99_999):
        for ours, theirs in zip(split_ranges(split, documents), matrix, strict=True):
            begin, end = theirs or (0, 0)
            assert list(ours) == list(range(round(begin * documents), round(end * documents)))


@pytest.mark.parametrize("split", ["", "a", "1,2,3,4", "-1,2", "0,1,0", "nan,1", "1;2", "1e308,1e308"])
def test_bad_split(split):
    with pytest.raises(UsageError, match=f"SPLIT={split}"):
        parse_split(split)


def test_data_names_its_tokenizer(bpe, write_data, tmp_path):
    prefix = write_data(tmp_path / "a", [[5, 6, 1]], tokenizer=bpe)
    found = describe([(None, prefix)], HF, None)
    assert (found.vocab_size, found.eod, found.fingerprint, found.tokens) == (320, 1, bpe.fingerprint, 3)
    assert found.tokenizer_model == bpe.model
    assert describe([(None, prefix)], HF, bpe.model) == found


def test_tokenizer_beside_the_data_moves_with_it(bpe, write_data, tmp_path):
    (tmp_path / "old").mkdir()
    write_data(tmp_path / "old" / "a", [[5, 6, 1]], tokenizer=replace(bpe, model="./tokenizer"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert describe([(None, f"{tmp_path}/new/a")], HF, None).tokenizer_model == f"{tmp_path}/new/tokenizer"


def test_hub_name_of_the_data_needs_no_hub(bpe, write_data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    prefix = write_data(tmp_path / "a", [[5]], tokenizer=replace(bpe, model="gated/model"))
    assert describe([(None, prefix)], HF, "gated/model", offline=True).vocab_size == 320
    with pytest.raises(UsageError, match="TOKENIZER_MODEL=other/model: not in the Hugging Face cache"):
        describe([(None, prefix)], HF, "other/model", offline=True)


def test_another_tokenizer_than_the_datas(bpe, write_data, text, tmp_path):
    other = train_bpe([text], 310, tmp_path / "other")
    prefix = write_data(tmp_path / "a", [[5]], tokenizer=bpe)
    with pytest.raises(UsageError, match=f"^TOKENIZER_MODEL={other.model}: DATA_PATH={prefix} was made with another"):
        describe([(None, prefix)], HF, other.model)
    second = write_data(tmp_path / "b", [[5]], tokenizer=other)
    with pytest.raises(UsageError, match="a blend must share one tokenizer"):
        describe([(1.0, prefix), (1.0, second)], HF, None)


def test_data_of_megatrons_own_tools(bpe, write_data, tmp_path):
    prefix = write_data(tmp_path / "a", [[5, 319], [7]])
    with pytest.raises(UsageError, match=f"TOKENIZER_MODEL is needed with DATA_PATH={prefix}"):
        describe([(None, prefix)], HF, None)
    assert describe([(None, prefix)], HF, bpe.model).tokens == 3
    other = write_data(tmp_path / "b", [[5, 320]])
    with pytest.raises(UsageError, match="holds the id 320, and this tokenizer has 320 ids"):
        describe([(0.5, prefix), (0.5, other)], HF, bpe.model)


def test_ids_are_sampled_at_both_ends(bpe, write_data, tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "SAMPLE_BYTES", 1024)
    for position in (0, 5000, 99_999):
        ids = np.zeros(100_000, np.int64)
        ids[max(0, position - 2500) : position + 2500] = 400
        prefix = write_data(tmp_path / str(position), [ids])
        with pytest.raises(UsageError, match="holds the id 400"):
            describe([(None, prefix)], HF, bpe.model)


def test_sidecar_of_other_data(bpe, write_data, tmp_path):
    write_data(tmp_path / "a", [[5, 6]], tokenizer=bpe)
    prefix = write_data(tmp_path / "b", [[5]])
    shutil.copy(tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(UsageError, match="b.json speaks of 2 tokens and the .idx of 1"):
        describe([(None, prefix)], HF, None)


def test_packed_sequences_are_not_pretrained_on(bpe, write_data, tmp_path):
    prefix = write_data(tmp_path / "a", [[5, 6]], tokenizer=bpe)
    sidecar = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps({**sidecar, "supervised": {"seq_length": 8}}))
    with pytest.raises(UsageError, match=f"^DATA_PATH={prefix}: is packed for fine-tuning"):
        describe([(None, prefix)], HF, None)


@pytest.mark.parametrize("tokenizer", [{"vocab_size": 320.5}, {"eod": "1"}, {"model": None}, {"fingerprint": []}])
def test_a_sidecar_of_other_types_is_somebody_elses(bpe, write_data, tmp_path, tokenizer):
    prefix = write_data(tmp_path / "a", [[5]], tokenizer=bpe)
    sidecar = json.loads(Path(f"{prefix}.json").read_text())
    sidecar["tokenizer"] |= tokenizer
    Path(f"{prefix}.json").write_text(json.dumps(sidecar))
    with pytest.raises(UsageError, match=f"TOKENIZER_MODEL is needed with DATA_PATH={prefix}"):
        describe([(None, prefix)], HF, None)


def test_mock_data_needs_a_tokenizer_only(bpe):
    assert describe((), HF, bpe.model).tokens == 0
    with pytest.raises(UsageError, match="TOKENIZER_MODEL is needed"):
        describe((), HF, None)


def test_too_little_text(write_data, tmp_path):
    prefix = write_data(tmp_path / "a", [[1] * 10] * 10)
    check_size([(None, prefix)], "1", 99)
    check_size([(None, prefix)], "9,1", 9, ("train", "valid"))
    with pytest.raises(UsageError, match=rf"DATA_PATH={prefix}: its train split \(SPLIT=1\) has 100 .*SEQ_LENGTH=100"):
        check_size([(None, prefix)], "1", 100)
    with pytest.raises(UsageError, match="its valid split .* has 10 of the 100 tokens, in 1 of 10 documents"):
        check_size([(None, prefix)], "9,1", 10, ("train", "valid"))


def test_paths_of_each_split(bpe, write_data, text, tmp_path):
    train = write_data(tmp_path / "a", [[1] * 10] * 10, tokenizer=bpe)
    valid = write_data(tmp_path / "b", [[1] * 4], tokenizer=bpe)
    paths = {"train": [(None, train)], "valid": [(None, valid)]}
    assert describe(paths, HF, None).tokens == 104
    check_size(paths, "99,1,0", 3, ("train", "valid"))
    with pytest.raises(UsageError, match=f"^VALID_DATA_PATH={valid}: has 4 tokens, and SEQ_LENGTH=4 needs 5"):
        check_size(paths, "99,1,0", 4, ("train", "valid"))
    with pytest.raises(UsageError, match="^VALID_DATA_PATH=.*nowhere: there is no"):
        describe(paths | {"valid": [(None, str(tmp_path / "nowhere"))]}, HF, None)
    other = write_data(tmp_path / "c", [[5]], tokenizer=train_bpe([text], 310, tmp_path / "other"))
    with pytest.raises(UsageError, match="^TRAIN_DATA_PATH and VALID_DATA_PATH: a blend must share one tokenizer"):
        describe(paths | {"valid": [(None, other)]}, HF, None)
