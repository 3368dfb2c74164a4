"""`megatron-rocm data inspect`: what it shows, and that it finds every kind of damage."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pair_files
import pytest

from megatron_rocm.cli import main
from megatron_rocm.data import pairs, progress
from megatron_rocm.data.inspect_command import Lengths
from megatron_rocm.data.tokenizer import load, train_bpe

# 5 documents: two sequences, one, none, one, one; 3 + 2, 1, 0, 1000 and 2 tokens.
DOCUMENTS = [[[5, 6, 7], [8, 9]], [[3]], [], [[4] * 1000], [[1, 2]]]
LENGTHS_AT, POINTERS_AT, ENDS_AT = 34, 34 + 4 * 5, 34 + 12 * 5


@pytest.fixture
def prefix(tmp_path):
    return pair_files.write(tmp_path / "data", DOCUMENTS)


def inspect(capsys, prefix, *words):
    status = main(["data", "inspect", str(prefix), *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_what_is_shown(prefix, capsys):
    status, told, _ = inspect(capsys, f"{prefix}.idx")
    assert status == 0
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert lines[:5] == [
        prefix,
        "documents 5, 1 empty",
        "tokens 1,008; 201.6 a document, 0 to 1,000",
        "size 2.02 kB .bin of uint16, 142 bytes .idx",
        "tokenizer unknown",
    ]
    rows = {line.split(" █")[0]: line.split()[-2:] for line in lines if "%" in line}
    assert rows["0 - 0"] == rows["1 - 1"] == rows["512 - 1,023"] == ["1", "(20.0%)"]
    assert rows["16 - 31 0 (0.0%)"] == ["0", "(0.0%)"]
    assert "offsets all 5 right" in lines and "ids the highest is 9" in lines
    assert any("name it with --tokenizer-model" in line for line in lines)
    assert f"picture: {prefix}_lengths.png" in lines
    assert Path(f"{prefix}_lengths.png").read_bytes()[:4] == b"\x89PNG"


def test_histogram_bins_are_powers_of_two():
    lengths = Lengths()
    lengths.add(np.array([1, 2, 3, 4, 7, 8, 15, 16]))
    lengths.add(np.array([2**31, 2**31 - 1]))
    counts = [count for _, _, count in lengths.rows()]
    assert counts == [1, 2, 2, 2, 1, *[0] * 25, 1, 1]
    assert [row[:2] for row in lengths.rows()][:3] == [(1, 1), (2, 3), (4, 7)]
    assert (lengths.shortest, lengths.longest) == (1, 2**31)


def test_samples_are_decoded_with_the_datas_own_tokenizer(bpe, write_data, text, tmp_path, capsys):
    texts = ["Ünïcode, 日本\n\x1b[31m", "def write" * 500, "third"]
    ids, lengths = load(bpe).encode_batch(texts)
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    prefix = write_data(tmp_path / "data", documents, tokenizer=bpe)
    status, told, _ = inspect(capsys, prefix, "--samples", "3")
    assert status == 0
    assert f"{bpe.model}, 320 ids, EOD 1 (HuggingFaceTokenizer)" in told
    assert r"'<|begin_of_text|>Ünïcode, 日本\n\x1b[31m'" in told  # nothing that a terminal would obey
    assert "document 1, " in told and "…" in told.split("document 1, ")[1].splitlines()[0]
    assert "third" in told.split("document 2, ")[1]
    assert "of 320 there are" in told
    assert "document" not in inspect(capsys, prefix, "--samples", "0")[1].split("checksum")[1]
    # A copy of it serves where the tokenizer has gone; another one does not.
    other = train_bpe([text], 310, tmp_path / "other")
    status, _, error = inspect(capsys, prefix, "--tokenizer-model", other.model)
    assert status == 2 and f"--tokenizer-model={other.model}: {prefix} was made with another tokenizer" in error
    sidecar = json.loads(Path(f"{prefix}.json").read_text())
    sidecar["tokenizer"]["model"] = "./gone"
    Path(f"{prefix}.json").write_text(json.dumps(sidecar))
    status, told, _ = inspect(capsys, prefix)
    assert status == 0 and "gone" in told and "no samples: TOKENIZER_MODEL=" in told
    assert "third" in inspect(capsys, prefix, "--tokenizer-model", bpe.model)[1]


def put(kind, at, form, *values):
    def damage(prefix):
        with open(f"{prefix}.{kind}", "r+b") as file:
            file.seek(at)
            file.write(struct.pack(form, *values))

    return damage


def cut(size):
    return lambda prefix: Path(f"{prefix}.bin").write_bytes(Path(f"{prefix}.bin").read_bytes()[:size])


@pytest.mark.parametrize("block", [pairs.BLOCK, 2])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (put("idx", LENGTHS_AT + 4 * 2, "<i", 2), "document 3 on (sequence 3): offset 12, where 14 follows"),
        (put("idx", LENGTHS_AT + 4 * 3, "<i", -1), "document 3 on (sequence 3): -1 tokens"),
        (put("idx", POINTERS_AT + 8, "<q", 7), "document 0 on (sequence 1): offset 7, where 6 follows"),
        (put("idx", POINTERS_AT, "<q", 2), "document 0 on (sequence 0): offset 2, where 0 follows"),
        (put("idx", LENGTHS_AT + 4 * 4, "<i", 3), "is truncated: 2016 bytes, the .idx announces 2018; document 4"),
        (put("idx", LENGTHS_AT + 4 * 4, "<i", 1), "data.bin is not the one that belongs to its .idx"),
        (cut(500), "data.bin is truncated: 500 bytes, the .idx announces 2016; document 3 is the first"),
        (put("idx", ENDS_AT + 8, "<q", 4), "document 1 ends at sequence 3 of 5"),
        (put("idx", ENDS_AT, "<q", 1), "document 0 ends at sequence 1 of 5"),
        (put("idx", ENDS_AT + 8 * 5, "<q", 4), "its documents end at sequence 4 of 5"),
        (put("idx", ENDS_AT + 8 * 2, "<q", 6), "document 1 ends at sequence 6 of 5"),
        (put("idx", 0, "<2s", b"PK"), "does not begin with MMIDIDX"),
        (lambda prefix: Path(f"{prefix}.bin").unlink(), "data.bin is missing"),
    ],
)  # fmt: skip
def test_damage_is_found_and_the_document_named(prefix, capsys, monkeypatch, damage, told, block):
    monkeypatch.setattr(pairs, "BLOCK", block)
    damage(prefix)
    status, _, error = inspect(capsys, prefix)
    assert status == 2 and error.startswith(f"megatron-rocm: PREFIX={prefix}: ") and error.count("\n") == 1
    assert told in error


def test_ids_beyond_the_vocabulary(bpe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pairs, "BLOCK", 2)
    prefix = pair_files.write(tmp_path / "data", [[[1, 2, 3]], [], [[4] * 40, [5, 320, 6]], [[321]]])
    status, _, error = inspect(capsys, prefix, "--tokenizer-model", bpe.model)
    assert status == 2 and "document 2 holds the id 320 (token 44), and its tokenizer has 320 ids only" in error
    assert inspect(capsys, prefix)[0] == 0  # where nobody knows the tokenizer
    prefix = pair_files.write(tmp_path / "wide", [[[1]], [[-2]]], 128_256)
    status, _, error = inspect(capsys, prefix)
    assert status == 2 and "document 1 holds the id -2 (token 1), and ids begin at 0" in error


def test_a_flipped_bit_is_found_by_the_checksum(bpe, prefix, capsys):
    pair_files.describe(prefix, asdict(bpe))
    _, told, _ = inspect(capsys, prefix)
    checksum = told.split("checksum   ")[1].split()[0]
    sidecar = {**json.loads(Path(f"{prefix}.json").read_text()), "checksum": checksum}
    Path(f"{prefix}.json").write_text(json.dumps(sidecar))
    assert f"{checksum}, as recorded" in inspect(capsys, prefix)[1]
    put("bin", 500, "<H", 5)(prefix)
    status, _, error = inspect(capsys, prefix)
    assert status == 2 and "has not the checksum that" in error
    Path(f"{prefix}.json").write_text(json.dumps({**sidecar, "documents": 4}))
    assert "speaks of 4 documents and the .idx of 5" in inspect(capsys, prefix)[2]


def test_a_picture_that_can_not_be_written(prefix, tmp_path, capsys):
    (tmp_path / "data_lengths.png").mkdir()
    status, told, _ = inspect(capsys, prefix)
    assert status == 0 and "no picture: " in told and "--picture FILE puts it elsewhere" in told
    assert inspect(capsys, prefix, "--picture", f"{tmp_path}/own.svg")[0] == 0
    assert "<svg" in (tmp_path / "own.svg").read_text()
    status, _, error = inspect(capsys, prefix, "--picture", f"{tmp_path}/none/x.png")
    assert status == 2 and f"--picture {tmp_path}/none/x.png: can't be written" in error


def test_a_long_pass_says_how_far_it_is(prefix, capsys, monkeypatch):
    monkeypatch.setattr(pairs, "BLOCK", 20)  # 160 of 2,016 bytes at once
    assert "% of" not in inspect(capsys, prefix)[1].split("picture:")[1]
    monkeypatch.setattr(progress, "SECONDS", 0)
    told = [line for line in inspect(capsys, prefix)[1].splitlines() if line.startswith(f"  {prefix}.bin: ")]
    assert len(told) == 13 and " 7.9 % of 0 MB, " in told[0] and told[0].endswith(" left")
    assert " 100.0 % of 0 MB, " in told[-1] and told[-1].endswith(", 0:00 left")


def test_no_documents_at_all(tmp_path, capsys):
    status, told, _ = inspect(capsys, pair_files.write(tmp_path / "data", []))
    assert status == 0 and "documents  0\n" in told and "offsets    all 0 right" in told
    assert "ids        none\n" in told


def test_help_needs_no_library():
    code = (
        "import sys; from megatron_rocm.cli import main; main(['data', *sys.argv[1:]]);"
        "print(sorted({'numpy', 'torch', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True).stdout
    assert shown.endswith("\n[]\n") and all(name in shown for name in ("inspect", "merge", "concat", "split", "index"))


def test_an_unknown_command(capsys):
    assert main(["data", "inspct"]) == 2
    assert "data inspct: no such command; there are " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "merge", "concat", "split", "index"])
def test_each_has_a_help_of_its_own(command, capsys):
    try:
        assert main(["data", command, "--help"]) == 0
    except SystemExit as leave:
        assert leave.code == 0
    assert f"megatron-rocm data {command}" in capsys.readouterr().out
