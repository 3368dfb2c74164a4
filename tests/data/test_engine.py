"""The engine against megatron-core's own builder, against death at any moment, and against every fault of its input."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import engine_jobs
import numpy as np
import pytest

from megatron_rocm.data import encode, engine
from megatron_rocm.data.engine import Job, preprocess
from megatron_rocm.data.facts import describe
from megatron_rocm.data.indexed import read_sidecar
from megatron_rocm.data.tokenizer import inspect, load
from megatron_rocm.errors import UsageError

TEXTS = engine_jobs.TEXTS


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory, text):
    """A SentencePiece model of Llama 2's kind: BPE, bytes for what it does not know, nothing normalized."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text").write_text(text + "< > / |\n" * 9)  # as in all of Llama's kind, no ASCII is unknown
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=450, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        character_coverage=1.0,
    )  # fmt: skip
    return inspect(str(folder), "Llama2Tokenizer")


@pytest.fixture
def job(tmp_path, bpe):
    """TEXTS to tmp_path/out/data, in many chunks."""
    path = engine_jobs.write(tmp_path / "in.jsonl")
    return Job([str(path)], str(tmp_path / "out" / "data"), bpe, append_eod=True, workers=2, chunk=2000)


def theirs(prefix, info, texts, append_eod, bos=True):
    """What Megatron-LM's preprocess_data.py does with each document, with the libraries themselves."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    if info.type == "Llama2Tokenizer":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(Path(info.model) / "tokenizer.model"))
        encoded = [processor.encode(text, add_bos=bos) for text in texts]
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(info.model)
        encoded = [tokenizer(text, split_special_tokens=True, add_special_tokens=bos).input_ids for text in texts]
    builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(info.vocab_size))
    for ids in encoded:
        ids = ids + [info.eod] * (append_eod and len(ids) > 0)
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return engine_jobs.pair(prefix)


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_same_bytes_as_megatron_core(job, tmp_path, request, kind, bos, append_eod):
    info = request.getfixturevalue(kind)
    summary = preprocess(replace(job, tokenizer=info, append_eod=append_eod, bos=bos))
    assert engine_jobs.pair(job.prefix) == theirs(tmp_path / "theirs", info, TEXTS, append_eod, bos)
    assert "gave the same ids" in summary.encoder
    sidecar = read_sidecar(job.prefix)
    assert (sidecar["documents"], sidecar["tokens"]) == (summary.documents, summary.tokens) == (300, summary.tokens)
    assert summary.bytes == sum(len(text.encode()) for text in TEXTS)
    sums = subprocess.run(["sha256sum", f"{job.prefix}.bin"], capture_output=True, text=True).stdout.split()[0]
    assert sidecar["checksum"] == summary.checksum == f"sha256:{sums}"
    assert describe([(None, job.prefix)], info.type, None).fingerprint == info.fingerprint
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data.bin", "data.idx", "data.json"]


@pytest.mark.parametrize("workers", [1, 5])
def test_threads_and_processes_give_the_same(job, workers):
    preprocess(job)
    other = replace(job, prefix=f"{job.prefix}-{workers}", workers=workers)
    preprocess(other)
    assert engine_jobs.pair(other.prefix) == engine_jobs.pair(job.prefix)


def test_a_second_call_does_nothing(job):
    assert preprocess(job).made
    before = os.stat(f"{job.prefix}.bin").st_mtime_ns
    again = preprocess(job)
    assert not again.made and again.documents == 300 and os.stat(f"{job.prefix}.bin").st_mtime_ns == before
    with pytest.raises(UsageError, match="is there already, made from .*in.jsonl with .*--overwrite"):
        preprocess(replace(job, append_eod=False))
    assert preprocess(replace(job, append_eod=False, overwrite=True)).made


def test_killed_at_random_moments_the_files_are_the_same(tmp_path, bpe):
    """Twenty processes, each killed at some moment of its work and gone on with by the next one."""
    path = engine_jobs.write(tmp_path / "in.jsonl", [f"{number} " + "some words " * 99 for number in range(20_000)])
    job = Job([str(path)], str(tmp_path / "data"), bpe, append_eod=True, workers=2, chunk=100_000, commit=0)
    preprocess(whole := replace(job, prefix=str(tmp_path / "whole")))
    final = [f"{job.prefix}.{kind}" for kind in ("bin", "json", "idx")]
    journal = Path(f"{job.prefix}.journal")
    chance, killed, resumed = random.Random(5), 0, 0
    while killed < 20:
        before = journal.read_bytes() if journal.exists() else b""
        process = engine_jobs.start(job)
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                if journal.read_bytes() != before:
                    break
            time.sleep(0.003)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        resumed += "going on after" in process.communicate()[0]
        if process.returncode == -signal.SIGKILL:
            killed += 1
        if os.path.exists(final[2]):  # `.idx` comes last: it is whole, killed or not
            assert engine_jobs.pair(job.prefix) == engine_jobs.pair(whole.prefix)
            for name in final:
                os.remove(name)
    assert resumed > 5
    preprocess(job)
    assert engine_jobs.pair(job.prefix) == engine_jobs.pair(whole.prefix)
    names = {"in.jsonl", *(f"{name}.{kind}" for name in ("data", "whole") for kind in ("bin", "idx", "json"))}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_damage_to_what_a_killed_run_left_is_noticed(job, capsys):
    preprocess(whole := replace(job, prefix=f"{job.prefix}-whole"))
    with open(job.inputs[0], "ab") as file:
        file.write(b"oops\n")
    os.makedirs(os.path.dirname(job.prefix), exist_ok=True)
    with pytest.raises(UsageError, match="line 301 "):
        preprocess(job)
    with open(f"{job.prefix}.bin.partial", "r+b") as file:
        file.write(b"\7\7")
    skipping = replace(job, on_error="skip")
    assert preprocess(skipping).skipped == 1
    assert "is damaged; starting anew" in capsys.readouterr().out
    assert engine_jobs.pair(job.prefix) == engine_jobs.pair(whole.prefix)


def test_a_full_disk_leaves_nothing_under_the_final_name_and_is_gone_on_with(job, tmp_path):
    preprocess(whole := replace(job, prefix=f"{job.prefix}-whole"))
    size = os.path.getsize(f"{whole.prefix}.bin")
    # A file may not grow further, as on a disk without space; the signal that comes with it is ignored by Python.
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))  # noqa: E731
    process = engine_jobs.start(replace(job, commit=0), preexec_fn=limit)
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    assert f"--output-prefix={job.prefix}: can't be written: File too large" in errors
    assert not any(os.path.exists(f"{job.prefix}.{kind}") for kind in ("bin", "idx", "json"))
    assert os.path.exists(f"{job.prefix}.journal")
    process = engine_jobs.start(replace(job, commit=0))
    assert "going on after" in process.communicate()[0] and process.returncode == 0
    assert engine_jobs.pair(job.prefix) == engine_jobs.pair(whole.prefix)
    assert sorted({path.suffix for path in (tmp_path / "out").iterdir()}) == [".bin", ".idx", ".json"]


GOOD = json.dumps({"text": "good"}).encode()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "cut of', "Unterminated string"),
        (b"oops", "Expecting value"),
        (b'["text"]', "it is a list"),
        (b'"text"', "it is a str"),
        (b'{"txt": "a"}', "there is no key `text`"),
        (b'{"text": null}', "`text` is a null"),
        (b'{"text": ["a", "b"]}', "`text` is a list"),
        (b'{"text": "Gr\xfc\xdfe"}', "is not UTF-8 text: byte 13 of the line"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 5000, "recursion"),
    ],
)
def test_a_line_without_a_document(job, tmp_path, capsys, line, why):
    """In the second file, behind a blank line and a chunk's edge."""
    path = tmp_path / "more.jsonl"
    path.write_bytes(b"\n".join([*[GOOD] * 300, b"", line, GOOD, line, GOOD]))
    job = replace(job, inputs=[*job.inputs, str(path)])
    with pytest.raises(UsageError) as error:
        preprocess(job)
    message = str(error.value)
    assert message.startswith(f'--input={path}: line 302 is not {{"text": "…"}}: ') and why in message
    assert message.endswith("or give --on-error=skip: then this run goes on from here")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"data.bin.partial", "data.lengths.partial", "data.journal"}

    summary = preprocess(replace(job, on_error="skip"))
    output = capsys.readouterr().out
    assert "going on after" in output and f"skipped: {path}: line 302 is not" in output and "line 304 is not" in output
    assert (summary.documents, summary.skipped) == (602, 2)
    assert [fault.split(": ")[1].split()[1] for fault in read_sidecar(job.prefix)["faults"]] == ["302", "304"]


def test_an_unfinished_run_of_another_job_is_not_replaced_in_silence(job, tmp_path, capsys):
    with open(tmp_path / "in.jsonl", "ab") as file:
        file.write(b"no document\n")
    with pytest.raises(UsageError, match="line 301 is not"):
        preprocess(job)
    preprocess(replace(job, append_eod=False, on_error="skip"))
    assert "an unfinished run of another text or other settings (" in capsys.readouterr().out


def test_what_the_standard_library_reads_is_no_fault(job, tmp_path):
    """orjson is stricter: neither NaN nor a byte order mark; and Windows ends lines with two characters."""
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "score": NaN}\r\n \r\n{"text": "b"}\r\n')
    assert preprocess(replace(job, inputs=[str(path)])).documents == 2


def test_many_faults_are_counted_and_few_shown(job, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"oops\n" * 5000 + GOOD)
    assert preprocess(replace(job, inputs=[str(path)], on_error="skip")).skipped == 5000
    assert capsys.readouterr().out.count("skipped: ") == engine.SHOWN_FAULTS + 1


@pytest.mark.parametrize(
    ("ending", "damage", "why"),
    [
        (".jsonl.gz", lambda raw: raw[: len(raw) // 2], "is truncated: its gzip data ends before its end mark"),
        (".jsonl.gz", lambda raw: raw[:-1], "is truncated: its gzip data"),
        (".jsonl.gz", lambda raw: raw[:3000] + b"\xff" * 40 + raw[3040:], "is damaged: its gzip data"),
        (".jsonl.gz", lambda raw: b"no gzip at all", "is damaged: its gzip data"),
        (".jsonl.zst", lambda raw: raw[: len(raw) // 2], "is truncated: its zstd data"),
        (".jsonl.zst", lambda raw: b"no zstd at all", "is damaged: its zstd data"),
        (".parquet", lambda raw: raw[:-9], "is no whole Parquet file"),
    ],
)
def test_a_damaged_file(job, tmp_path, capsys, ending, damage, why):
    chance = random.Random(3)
    texts = [f"{number} " + "".join(chance.choices("abcdefgh ", k=60)) for number in range(400)]
    path = engine_jobs.write(tmp_path / f"in{ending}", texts)
    path.write_bytes(damage(path.read_bytes()))
    job = replace(job, inputs=[job.inputs[0], str(path)])
    with pytest.raises(UsageError, match=why) as error:
        preprocess(job)
    message = str(error.value)
    assert message.startswith(f"--input={path}: ") and ("after line" in message) == (ending != ".parquet")
    assert not os.path.exists(f"{job.prefix}.bin") and os.path.exists(f"{job.prefix}.journal")

    summary = preprocess(replace(job, on_error="skip"))
    assert summary.skipped == 1 and "its rest is left out" in capsys.readouterr().out
    # Every whole line before the damage is there.
    kept = summary.documents - 300
    expected = job.prefix + "-expected"
    raw = engine_jobs.write(tmp_path / "kept.jsonl", texts[:kept])
    preprocess(replace(job, prefix=expected, inputs=[job.inputs[0], str(raw)]))
    assert engine_jobs.pair(job.prefix) == engine_jobs.pair(expected)
    if "after line" in message:
        assert f"after line {kept:,}." in message
    if "truncated" in message:
        assert kept >= 100


def test_a_file_without_the_column(job, tmp_path):
    path = engine_jobs.write(tmp_path / "in.parquet")
    with pytest.raises(UsageError, match="in.parquet: has no column `body`; it has text, id"):
        preprocess(replace(job, inputs=[str(path)], key="body"))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_nothing_in_the_input(job, tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="^--input=.*empty.jsonl: holds no text"):
        preprocess(replace(job, inputs=[str(path)]))
    assert not list((tmp_path / "out").iterdir())


def test_a_second_process_is_kept_out(job):
    from megatron_rocm.platform.disk import to_ourselves

    with to_ourselves(job.prefix, "--output-prefix"), pytest.raises(UsageError, match="another run is writing there"):
        preprocess(job)
    preprocess(job)


def test_where_the_fast_tokenizer_is_not_the_same_the_ordinary_one_is_used(job, bpe, tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    shutil.copytree(bpe.model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"]["single"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    info = inspect(str(folder))
    preprocess(replace(job, tokenizer=info))
    assert "the ordinary tokenizer is used: it adds ids after a text" in capsys.readouterr().out
    ids, lengths = load(info).encode_batch(TEXTS, info.eod)
    assert np.array_equal(np.fromfile(f"{job.prefix}.bin", np.uint16), ids) and lengths[7] == 2


def test_other_ids_are_noticed_in_the_data_itself(job, monkeypatch, capsys):
    """A library that is wrong for one word of the first document alone."""
    right = encode._FastEncoder.encode_batch

    def wrong(self, texts, eod=None):
        return right(self, [text.replace("Document 0", "Document 1") for text in texts], eod)

    preprocess(whole := replace(job, prefix=f"{job.prefix}-whole"))
    monkeypatch.setattr(encode._FastEncoder, "encode_batch", wrong)
    preprocess(job)
    assert "the ordinary tokenizer is used: fastokens" in capsys.readouterr().out
    assert engine_jobs.pair(job.prefix) == engine_jobs.pair(whole.prefix)


def test_nothing_heavy_is_imported(job):
    code = """
import sys
from megatron_rocm.data import engine, preprocess, shards
print({"torch", "transformers", "megatron", "tokenizers", "fastokens", "pyarrow", "sentencepiece"} & set(sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
