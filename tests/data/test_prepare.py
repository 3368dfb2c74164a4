from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_rocm.data import corpus, prepare
from megatron_rocm.data.facts import describe
from megatron_rocm.data.indexed import open_index, read_sidecar
from megatron_rocm.data.tokenizer import load
from megatron_rocm.errors import UsageError


@pytest.fixture
def call(tmp_path, bpe, monkeypatch):
    """`prepare KEY=VALUE …` into tmp_path/data with the session's tokenizer; returns the prefix."""
    monkeypatch.setattr(os, "environ", {**os.environ})

    def call(**said):
        settings = {"DATA_DIR": tmp_path / "data", "TOKENIZER_MODEL": bpe.model, **said}
        return prepare.prepare(prepare.parse([f"{name}={value}" for name, value in settings.items()], {}))

    return call


def documents(prefix):
    index = open_index(prefix)
    return np.split(np.fromfile(f"{prefix}.bin", index.dtype), np.cumsum(index.lengths)[:-1])


def encoded(bpe, *texts):
    encoder = load(bpe)
    return [[*encoder.encode_batch([text])[0], bpe.eod] for text in texts]


def test_json_lines(call, bpe, tmp_path):
    texts = ["first\nline", "ü" * 50, "last <|end_of_text|>"]
    lines = [json.dumps({"text": text, "id": 1}) for text in texts]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:2], "", json.dumps({"text": ""}), lines[2]]))
    prefix = call(INPUT=tmp_path / "in.jsonl")
    assert [list(one) for one in documents(prefix)] == encoded(bpe, *texts)
    sidecar = read_sidecar(prefix)
    assert sidecar["documents"] == 3 and sidecar["tokens"] == sum(map(len, documents(prefix)))
    assert sidecar["bytes"] == sum(len(text.encode()) for text in texts)
    assert describe([(None, prefix)], "HuggingFaceTokenizer", None).fingerprint == bpe.fingerprint


def test_without_eod(call, bpe, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    prefix = call(INPUT=tmp_path / "in.jsonl", APPEND_EOD=0)
    assert [list(one) for one in documents(prefix)] == [one[:-1] for one in encoded(bpe, "a", "b")]


def test_folder(call, bpe, tmp_path, capsys):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.txt").write_text("first")
    (folder / "sub" / "b.md").write_text("\ufeffsecond")
    (folder / "c.jsonl").write_text('{"text": "third"}\n')
    (folder / "latin1.txt").write_bytes("Grüße".encode("latin-1"))
    (folder / "half.txt").write_bytes("ü".encode()[:1])
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / ".git" / "hidden").write_text("hidden")
    (folder / "empty.txt").touch()
    found = [list(one) for one in documents(call(INPUT=folder))]
    assert sorted(found) == sorted(encoded(bpe, "first", "second", "third"))
    assert "skipped 3 files" in capsys.readouterr().out


def test_a_lone_text_file_becomes_many_documents(tmp_path, monkeypatch):
    text = "".join(f"line {number}\n" + "\n" * (number % 7 == 0) for number in range(2000)) + "x" * 300_000 + "ü" * 1000
    (tmp_path / "in.txt").write_text(text)
    pieces = list(corpus.texts(corpus.find(str(tmp_path / "in.txt"), None).sources))
    assert "".join(pieces) == text
    assert all(piece.endswith("\n\n") for piece in pieces[:2]) and max(map(len, pieces)) < 300_000


def test_max_mb(call, tmp_path):
    (tmp_path / "in.txt").write_text("words and words\n" * 10_000)
    assert 0.1e6 <= read_sidecar(call(INPUT=tmp_path / "in.txt", MAX_MB=0.1))["bytes"] < 0.12e6


def test_train_round_trip(call, text, tmp_path, capsys):
    from transformers import AutoTokenizer

    (tmp_path / "in.txt").write_text(text)
    prefix = call(INPUT=tmp_path / "in.txt", TOKENIZER_MODEL="train:320")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    assert theirs.decode(documents(prefix)[0]) == f"<|begin_of_text|>{text}<|end_of_text|>"
    found = describe([(None, prefix)], "HuggingFaceTokenizer", None)
    assert found.tokenizer_model == str(tmp_path / "data" / "tokenizer") and found.vocab_size == len(theirs) == 320
    assert f"next: DATA_PATH={prefix} bash examples/llama/train_llama3.sh" in capsys.readouterr().out


def test_default_corpus_is_pythons_own(call):
    prefix = call(MAX_MB=0.2)
    assert 0.2e6 <= read_sidecar(prefix)["bytes"] < 1e6
    names = [source.name for source in corpus.find(None, None).sources]
    assert "argparse.py" in names and not any(
        {"test", "tests", "site-packages"} & set(Path(name).parts) for name in names
    )
    assert names != sorted(names)


def test_second_call(call, tmp_path, capsys):
    source = tmp_path / "in.txt"
    source.write_text("some text")
    prefix = call(INPUT=source, TOKENIZER_MODEL="train:320")
    before = Path(f"{prefix}.bin").stat().st_mtime_ns
    call(INPUT=source, TOKENIZER_MODEL="train:320")
    assert "already made" in capsys.readouterr().out and Path(f"{prefix}.bin").stat().st_mtime_ns == before

    source.write_text("some other text")
    with pytest.raises(UsageError, match="is there already, made from .*in.txt with ./tokenizer.*OVERWRITE=1"):
        call(INPUT=source, TOKENIZER_MODEL="train:320")
    with pytest.raises(UsageError, match="OVERWRITE=1"):
        call(INPUT=source)
    call(INPUT=source, OVERWRITE=1)
    assert read_sidecar(prefix)["bytes"] == 15
    # A damaged result is no result.
    Path(f"{prefix}.bin").write_bytes(b"")
    call(INPUT=source)
    assert open_index(prefix).tokens


def test_data_of_another_program_is_not_replaced(call, write_data, tmp_path):
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data" / "data_text_document", [[1, 2]])
    (tmp_path / "in.txt").write_text("text")
    with pytest.raises(UsageError, match="made by another program"):
        call(INPUT=tmp_path / "in.txt")


def test_a_tokenizer_of_the_users_is_not_replaced(call, tmp_path):
    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    (tmp_path / "in.txt").write_text("text")
    with pytest.raises(UsageError, match="was not trained here"):
        call(INPUT=tmp_path / "in.txt", TOKENIZER_MODEL="train:320")


def test_killed_in_mid_write(tmp_path, bpe, text):
    (tmp_path / "in.txt").write_text(text * 10_000)
    command = [
        sys.executable,
        "-m",
        "megatron_rocm.cli",
        "prepare",
        f"INPUT={tmp_path}/in.txt",
        f"DATA_DIR={tmp_path}/data",
    ]
    command += [f"TOKENIZER_MODEL={bpe.model}", "WORKERS=1"]
    process = subprocess.Popen(command)
    partial = tmp_path / "data" / "data_text_document.bin.partial"
    end = time.monotonic() + 30
    while time.monotonic() < end and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    # A second one finds the folder held.
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2 and "another `prepare` is writing there" in second.stderr
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert not names & {f"data_text_document.{kind}" for kind in ("bin", "idx", "json")}
    (tmp_path / "in.txt").write_text(text)
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert not partial.exists() and open_index(str(tmp_path / "data" / "data_text_document")).tokens


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"TOKENIZER_MODEL": ""}, "^TOKENIZER_MODEL is needed"),
        ({"TOKENIZER_MODEL": "train:x"}, "^TOKENIZER_MODEL=train:x: the size after train:"),
        ({"TOKENIZER_MODEL": "train:100"}, "from 300 to 200000"),
        ({"TOKENIZER_MODEL": "train:99999999999"}, "from 300 to 200000"),
        ({"TOKENIZER_MODEL": "train:500", "TOKENIZER_TYPE": "Llama2Tokenizer"}, "makes a HuggingFaceTokenizer"),
        ({"TOKENIZER_TYPE": "NullTokenizer"}, "^TOKENIZER_TYPE=NullTokenizer is not supported"),
        ({"DATASET": "wiki", "INPUT": "x"}, "^INPUT=x: belongs to DATASET=local"),
        ({"DATASET": "c4"}, "^SHARDS is needed"),
        ({"DATASET": "pile"}, "^DATASET=pile: there is local"),
        ({"DOWNLOAD_ONLY": "1"}, "^DOWNLOAD_ONLY=1: DATASET=local has nothing to download"),
        ({"TOKENIZER_MODE": "x"}, "^TOKENIZER_MODE=x: unknown key.*TOKENIZER_MODEL"),
        ({"HF_TOKEN": "x"}, "^HF_TOKEN: a secret"),
        ({"APPEND_EOD": "yes"}, "^APPEND_EOD=yes: must be 0 or 1"),
        ({"WORKERS": "0"}, "^WORKERS=0: must be a whole number above 0"),
        ({"WORKERS": "1.5"}, "^WORKERS=1.5"),
        ({"MAX_MB": "nan"}, "^MAX_MB=nan: must be a number above 0"),
        ({"INPUT": "/no/such"}, "^INPUT=/no/such: no such file or folder"),
    ],
)
def test_bad_request(call, said, words):
    with pytest.raises(UsageError, match=words):
        call(**said)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("in.txt", b"", "holds no text"),
        ("in.txt", b"Gr\xfc\xdfe", "is not UTF-8 text"),
        ("in.txt", b"text\0", "is binary: a zero byte at 4"),
        ("in.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not"),
        ("in.jsonl", b'{"txt": "a"}', "line 1 is not .* there is no key `text`"),
        ("in.jsonl", b'\n{"text": 5}', "line 2 is not .* `text` is a int"),
        ("in.jsonl", b"[1]", "line 1 is not"),
        ("in.jsonl", b'{"text": "\\ud800"}', "line 1 is not"),
        ("in.json", b'{\n "text": "a"\n}', "line 1 is not"),
        ("folder/in.jsonl", b"oops", "in.jsonl: line 1 is not"),
        ("folder/in.bin", b"\0", "folder: holds no text"),
    ],
)
def test_bad_text(call, tmp_path, name, content, words):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UsageError, match=words) as error:
        call(INPUT=path if path.parent == tmp_path else path.parent)
    assert str(error.value).startswith("INPUT=")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".prepare.lock"]


def test_unwritable_folder(call, tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(UsageError, match="^DATA_DIR=.*can't be written"):
        call()


def test_script_and_help(tmp_path):
    script = Path(prepare.__file__).parents[2] / "examples" / "llama" / "prepare_dataset.sh"
    assert "prepare" in script.read_text() and os.access(script, os.X_OK)
    command = [sys.executable, "-m", "megatron_rocm.cli", "prepare"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True).stdout
    assert all(name in shown for name in prepare.VARIABLES)
    code = "import sys, megatron_rocm.data.prepare; print({'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    bad = subprocess.run([*command, "INPUTS=x"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "") and bad.stderr.count("\n") == 1 and "INPUT" in bad.stderr


def test_argument_wins_over_the_environment():
    request = prepare.parse(["TOKENIZER_MODEL=train:500"], {"TOKENIZER_MODEL": "train:400", "MAX_MB": "3", "HOME": "x"})
    assert (request.train_size, request.max_mb) == (500, 3.0)
