"""Pairs taken apart by documents: nothing lost, nothing twice, megatron-core's bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pair_files
import pytest

from megatron_rocm.cli import main
from megatron_rocm.data import divide, pairs
from megatron_rocm.data.facts import split_ranges
from megatron_rocm.errors import UsageError

DOCUMENTS = pair_files.some(1, 61)


@pytest.fixture
def prefix(tmp_path):
    return pair_files.write(tmp_path / "data", DOCUMENTS)


def raw(prefix):
    return [Path(f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx")]


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def split(prefix, *words):
    return main(["data", "split", prefix, *words])


@pytest.mark.parametrize("block", [pairs.BLOCK, 5])
def test_shares_are_a_runs_splits_and_megatron_cores_bytes(prefix, tmp_path, monkeypatch, capsys, block):
    monkeypatch.setattr(pairs, "BLOCK", block)
    assert split(f"{prefix}.bin", "--shares", "80,15,5") == 0
    told = capsys.readouterr().out.splitlines()
    for name, documents, line in zip(("train", "valid", "test"), split_ranges("80,15,5", 61), told, strict=True):
        wanted = pair_files.write(tmp_path / "wanted", DOCUMENTS[documents.start : documents.stop])
        assert raw(f"{prefix}_{name}") == raw(wanted)
        digest = hashlib.sha256(raw(wanted)[0]).hexdigest()
        assert line.startswith(f"{prefix}_{name}: {len(documents)} documents, ") and line.endswith(f"sha256:{digest}")


def test_random_parts_keep_every_document_and_the_order(prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "BLOCK", 5)

    def parts(seed, out):
        assert split(prefix, "--documents", "20,rest", "--shuffle", seed, "--output-prefix", f"{tmp_path}/{out}/x") == 0
        return [pair_files.read(tmp_path / out / f"x_{name}") for name in ("train", "valid")]

    one, same, other = parts("3", "a"), parts("3", "b"), parts("4", "c")
    assert one == same != other
    assert [len(part) for part in one] == [20, 41]
    assert one[0] != DOCUMENTS[:20]
    assert sum(part.count([]) for part in one) == DOCUMENTS.count([])
    left = [[document for document in part if document] for part in one]
    for document in filter(None, DOCUMENTS):  # each is the next one of one of the parts
        next(part for part in left if part and part[0] == document).pop(0)
    assert left == [[], []]


def test_parts_put_together_are_the_whole(prefix, tmp_path):
    assert split(prefix, "--documents", "1,rest,2,3", "--names", "a,b,c,d", "--output-prefix", f"{tmp_path}/p") == 0
    parts = [f"{tmp_path}/p_{name}" for name in "abcd"]
    assert main(["data", "concat", *parts, "--output-prefix", f"{tmp_path}/whole"]) == 0
    assert raw(tmp_path / "whole") == raw(prefix)


def test_sidecars_of_parts(prefix, tmp_path):
    tokenizer = {"type": "HuggingFaceTokenizer", "model": "./t", "vocab_size": 500, "eod": 1, "fingerprint": "f"}
    checksum = f"sha256:{hashlib.sha256(raw(prefix)[0]).hexdigest()}"
    pair_files.describe(prefix, tokenizer, bos=True)
    assert split(prefix, "--shares", "1,1", "--output-prefix", f"{tmp_path}/other/x") == 0
    one, other = (json.loads((tmp_path / "other" / f"x_{name}.json").read_text()) for name in ("train", "valid"))
    assert one["documents"] + other["documents"] == 61 and one["tokenizer"]["model"] == f"{tmp_path}/t"
    assert other["source"] == {
        "input": prefix, "append_eod": True, "bos": True,
        "part": {"number": 1, "of": 2, "shuffle": None, "checksum": checksum},
    }  # fmt: skip
    sidecar = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps({**sidecar, "checksum": "sha256:0"}))
    with pytest.raises(UsageError, match="has not the checksum"):
        divide.split(divide.open_checked(prefix), [60, 1], [f"{tmp_path}/x", f"{tmp_path}/y"])
    assert files(tmp_path) == ["data.bin", "data.idx", "data.json", "other"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--shares", "99,0"], "--shares 99,0: must be numbers above 0"),
        (["--shares", "99,x"], "--shares 99,x: must be numbers above 0"),
        (["--shares", "1000,1"], "give each part a document at least"),
        (["--documents", "60"], "--documents 60: add up to 60, and there are 61; write `rest`"),
        (["--documents", "60,2"], "add up to 62, and there are 61; give smaller numbers"),
        (["--documents", "61,rest"], "give each part a document at least"),
        (["--documents", "rest,rest"], "`rest` once at most"),
        (["--documents=-1,rest"], "must be numbers of documents"),
        (["--shares", "1,1", "--names", "a"], "--names a: must be 2 different names"),
        (["--shares", "1,1", "--names", "a,a"], "--names a,a: must be 2 different names"),
        (["--shares", "1,1", "--names", "a,/b"], "--names a,/b: must be 2 different names"),
        (["--shares", "1,1", "--shuffle", "-1"], "--shuffle -1: a seed is a whole number"),
        (["--shares", "1,1", "--documents", "1,rest"], "not allowed with argument"),
        ([], "one of the arguments --shares --documents is required"),
    ],
)
def test_bad_words(prefix, tmp_path, capsys, words, told):
    assert split(prefix, *words) == 2
    assert told in capsys.readouterr().err
    assert files(tmp_path) == ["data.bin", "data.idx"]


def test_packed_sequences_are_not_divided(prefix, tmp_path, capsys):
    pair_files.describe(prefix, {"type": "t", "model": "m", "vocab_size": 500, "eod": 1, "fingerprint": "f"})
    sidecar = Path(f"{prefix}.json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "supervised": {"seq_length": 8}}))
    assert split(prefix, "--shares", "1,1") == 2
    assert f"PREFIX={prefix}: is packed for fine-tuning" in capsys.readouterr().err
    assert files(tmp_path) == ["data.bin", "data.idx", "data.json"]


def test_what_is_there_is_kept(prefix, tmp_path, capsys):
    (tmp_path / "data_valid.idx").touch()
    assert split(prefix, "--shares", "1,1") == 2
    assert f"OUT={prefix}_valid: {prefix}_valid.idx is there already" in capsys.readouterr().err
    assert files(tmp_path) == ["data.bin", "data.idx", "data_valid.idx"]
    assert split(prefix, "--shares", "1,1", "--overwrite") == 0
    assert pair_files.read(f"{prefix}_train") + pair_files.read(f"{prefix}_valid") == DOCUMENTS
