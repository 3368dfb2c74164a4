from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from megatron_rocm.data import indexed
from megatron_rocm.data.indexed import IndexedWriter, open_index, publish, read_sidecar
from megatron_rocm.errors import UsageError

DOCUMENTS = [[5, 6, 7], [8], [9] * 1000, [1, 2]]


def write(prefix, documents=DOCUMENTS, vocab_size=500, sidecar=None):
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(np.array(document, np.uint32), np.array([len(document)]))
        writer.finalize(sidecar)
    return str(prefix)


@pytest.mark.parametrize("vocab_size", [500, 65499, 65500, 128256])
def test_same_bytes_as_megatron_core(tmp_path, vocab_size):
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), DType.optimal_dtype(vocab_size))
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours", vocab_size=vocab_size)
    for kind in (".bin", ".idx"):
        assert (tmp_path / f"ours{kind}").read_bytes() == (tmp_path / f"theirs{kind}").read_bytes()


def test_an_empty_document_has_no_sequence(tmp_path):
    index = open_index(write(tmp_path / "a", [[1, 2], [], [3]]))
    assert (index.documents, index.tokens, list(index.lengths)) == (3, 3, [2, 1])


def test_an_index_of_many_blocks_is_the_same(tmp_path, monkeypatch):
    documents = [*DOCUMENTS, [], *DOCUMENTS, [], []]
    write(tmp_path / "a", documents)
    monkeypatch.setattr(indexed, "AT_ONCE", 2)
    write(tmp_path / "b", documents)
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()


def test_a_writer_goes_on_with_what_another_committed(tmp_path):
    write(tmp_path / "whole", DOCUMENTS)
    first = IndexedWriter(tmp_path / "parts", 500)
    for document in DOCUMENTS[:2]:
        first.add(np.array(document, np.uint32), np.array([len(document)]))
    tokens, documents = first.tokens, first.documents
    first.commit()
    first.add(np.array([7, 7], np.uint32), np.array([2]))
    first.close()
    second = IndexedWriter(tmp_path / "parts", 500, tokens, documents)
    for document in DOCUMENTS[2:]:
        second.add(np.array(document, np.uint32), np.array([len(document)]))
    second.finalize()
    for kind in ("bin", "idx"):
        assert (tmp_path / f"parts.{kind}").read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()


@pytest.mark.parametrize("renamed", [(), ("bin",), ("bin", "json")])
def test_renaming_that_was_interrupted_is_gone_on_with(tmp_path, renamed):
    """Whatever stood there before is never mixed with it."""
    prefix = write(tmp_path / "data", [[1, 1, 1]], sidecar={"old": 1})
    writer = IndexedWriter(prefix, 500)
    writer.add(np.array([2, 3], np.uint32), np.array([2]))
    writer.seal({"new": 1})
    for kind in renamed:
        (tmp_path / "data.idx").unlink(missing_ok=True)
        (tmp_path / f"data.{kind}.partial").rename(tmp_path / f"data.{kind}")
    publish(prefix)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx", "data.json"]
    assert open_index(prefix).tokens == 2 and (tmp_path / "data.json").read_text() == '{\n "new": 1\n}\n'


def cut(kind, size):
    def damage(prefix):
        with open(f"{prefix}.{kind}", "r+b") as file:
            file.truncate(size)

    return damage


def patch(kind, at, raw):
    def damage(prefix):
        with open(f"{prefix}.{kind}", "r+b") as file:
            file.seek(at)
            file.write(raw)

    return damage


def append(kind, raw):
    def damage(prefix):
        with open(f"{prefix}.{kind}", "ab") as file:
            file.write(raw)

    return damage


def remove(*kinds):
    return lambda prefix: [os.remove(f"{prefix}.{kind}") for kind in kinds]


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (remove("bin", "idx"), ".bin", "there is no"),
        (remove("bin"), ".bin", "is missing"),
        (remove("idx"), ".idx", "is missing"),
        (cut("idx", 0), ".idx", "is not a megatron-core index"),
        (cut("idx", 20), ".idx", "truncated: 20 bytes"),
        (cut("idx", 60), ".idx", "truncated: 60 bytes"),
        (cut("bin", 2000), ".bin", "truncated: 2000 bytes"),
        (append("bin", b"00"), ".bin", "not the one that belongs"),
        (append("idx", b"0" * 9), ".idx", "damaged"),
        (patch("idx", 0, b"PK"), ".idx", "is not a megatron-core index"),
        (patch("idx", 9, struct.pack("<Q", 2)), ".idx", "version 2"),
        (patch("idx", 17, b"\x07"), ".idx", "data type 7"),
        (patch("idx", 34, struct.pack("<i", -3)), ".idx", "contradict"),
        (patch("idx", 34, struct.pack("<i", 4)), ".idx", "contradict"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, file, words):
    prefix = write(tmp_path / "data")
    damage(prefix)
    with pytest.raises(UsageError) as error:
        open_index(prefix)
    message = str(error.value)
    assert message.startswith(f"DATA_PATH={prefix}: ") and f"data{file}" in message and words in message


def test_no_documents(tmp_path):
    with pytest.raises(UsageError, match="holds no documents"):
        open_index(write(tmp_path / "none", []))


def test_killed_in_mid_write_leaves_nothing_under_the_final_name(tmp_path):
    code = f"""
        import numpy as np
        from megatron_rocm.data.indexed import IndexedWriter
        writer = IndexedWriter({str(tmp_path / "data")!r}, 500)
        while True:
            writer.add(np.zeros(100_000, np.uint32), np.array([100_000]))
            print("more", flush=True)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin.partial", "data.lengths.partial"]
    assert open_index(write(tmp_path / "data")).tokens == 1006


def test_an_exception_takes_the_partial_files_along(tmp_path):
    with pytest.raises(ZeroDivisionError), IndexedWriter(tmp_path / "data", 500) as writer:
        writer.add(np.arange(5), np.array([5]))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_somebody_elses_json_is_no_sidecar(tmp_path):
    (tmp_path / "data.json").write_text('{"text": "a document"}\n{"text": "another"}\n')
    assert read_sidecar(str(tmp_path / "data")) is None


def test_a_sidecar_cut_short_is_no_missing_one(tmp_path):
    with IndexedWriter(tmp_path / "data", 500) as writer:
        writer.add(np.arange(5), np.array([5]))
        writer.finalize({"format": 1, "tokenizer": {}, "source": {}})
    file = tmp_path / "data.json"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"data.json is damaged .*copy it again"):
        read_sidecar(str(tmp_path / "data"))
