"""The command line: Megatron's flags, the NeMo guide's, every kind of input, many outputs, shards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import engine_jobs
import pytest

from megatron_rocm.data import documents, encode, preprocess, shards, source
from megatron_rocm.data.indexed import open_index, read_sidecar
from megatron_rocm.data.tokenizer import load
from megatron_rocm.errors import UsageError

ROOT = Path(__file__).parents[2]
TEXTS = engine_jobs.TEXTS


@pytest.fixture
def call(tmp_path, bpe):
    """The tool on files of tmp_path; returns the prefix of the text."""

    def call(*words, input=("in.jsonl",), prefix="out/data"):
        inputs = ["--input", *(str(tmp_path / name) for name in input)] if input else []
        common = ["--output-prefix", f"{tmp_path}/{prefix}", "--tokenizer-model", bpe.model, "--workers", "2"]
        assert preprocess.main([*inputs, *common, *words]) == 0
        return f"{tmp_path}/{prefix}_text_document"

    return call


@pytest.fixture
def whole(call, tmp_path):
    """The bytes that TEXTS must always give."""
    engine_jobs.write(tmp_path / "in.jsonl")
    return engine_jobs.pair(call(prefix="whole"))


@pytest.mark.parametrize("ending", [".json", ".ndjson", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".parquet", ""])
def test_kinds_of_files(call, whole, tmp_path, ending, monkeypatch):
    engine_jobs.write(tmp_path / f"other{ending}")
    assert engine_jobs.pair(call(input=[f"other{ending}"])) == whole


def test_gzip_without_isal(call, whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "isal", None)
    engine_jobs.write(tmp_path / "other.json.gz")
    assert engine_jobs.pair(call(input=["other.json.gz"])) == whole


@pytest.mark.parametrize("input", [["parts"], ["parts/*"], ["parts/0.jsonl", "parts/1.jsonl.gz", "parts/2.parquet"]])
def test_many_files_become_one_output_in_the_order_of_their_names(call, whole, tmp_path, input):
    for number, ending in enumerate((".jsonl", ".jsonl.gz", ".parquet")):
        engine_jobs.write(tmp_path / "parts" / f"{number}{ending}", TEXTS[number * 100 : number * 100 + 100])
    assert engine_jobs.pair(call(input=input)) == whole


def test_standard_input(whole, tmp_path, bpe):
    command = [
        sys.executable,
        ROOT / "tools" / "preprocess_data.py",
        "--input",
        "-",
        "--output-prefix",
        tmp_path / "out",
    ]
    done = subprocess.run(
        [*command, "--tokenizer-model", bpe.model, "--workers", "1"],
        input=engine_jobs.lines(TEXTS),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert engine_jobs.pair(tmp_path / "out_text_document") == whole
    assert b"300 documents" in done.stdout and b"sha256:" in done.stdout


def test_one_output_for_each_file(call, tmp_path):
    for name in ("a.jsonl", "b.json.gz"):
        engine_jobs.write(tmp_path / "parts" / name, TEXTS[:50])
    call("--output-each", input=["parts"], prefix="out/")
    call("--output-each", input=["parts"], prefix="out/c4")
    pairs = [engine_jobs.pair(tmp_path / "out" / f"{name}_text_document") for name in ("a", "b", "c4_a", "c4_b")]
    assert pairs.count(pairs[0]) == 4
    engine_jobs.write(tmp_path / "parts" / "a.parquet", TEXTS[:50])
    with pytest.raises(UsageError, match="would both be written to"):
        call("--output-each", input=["parts"], prefix="out/")


def test_one_output_for_each_file_passes_over_one_without_text(call, tmp_path, capsys):
    for name in ("a", "c"):
        engine_jobs.write(tmp_path / "many" / f"{name}.jsonl", TEXTS[:3])
    (tmp_path / "many" / "b.jsonl").write_bytes(b"")
    with pytest.raises(UsageError, match=r"b\.jsonl: holds no text"):
        call("--output-each", input=["many"])
    call("--output-each", "--on-error=skip", input=["many"])
    assert "b.jsonl: holds no text" in capsys.readouterr().out
    made = sorted(path.name for path in (tmp_path / "out").glob("*.idx"))
    assert made == ["data_a_text_document.idx", "data_c_text_document.idx"]


def test_json_keys(call, tmp_path, bpe):
    rows = [{"text": f"body {number}", "title": f"title {number}"} for number in range(20)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    call("--json-keys", "title", "text")
    for key in ("title", "text"):
        ids = load(bpe).encode_batch([row[key] for row in rows])[0]
        assert open_index(f"{tmp_path}/out/data_{key}_document").tokens == len(ids)
    with pytest.raises(UsageError, match="standard input can be read for one key only"):
        preprocess.main(
            ["--input", "-", "--output-prefix", "x", "--tokenizer-model", bpe.model, "--json-keys", "a", "b"]
        )


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shards_make_what_one_run_makes(call, whole, tmp_path, count):
    """Of plain lines, which are cut anywhere, compressed ones, Parquet, and a file of one long line."""
    names = ["parts/0.jsonl", "parts/1.jsonl.gz", "parts/2.parquet", "parts/3.jsonl", "parts/4.jsonl"]
    for number, name in enumerate(names):
        engine_jobs.write(tmp_path / name, TEXTS[number * 60 : number * 60 + 60])
    assert engine_jobs.pair(call(input=names)) == whole
    for index in reversed(range(count)):
        call(f"--shard={index}/{count}", input=names, prefix="many")
    prefix = call(f"--merge-shards={count}", input=(), prefix="many")
    assert engine_jobs.pair(prefix) == whole
    one, merged = read_sidecar(f"{tmp_path}/out/data_text_document"), read_sidecar(prefix)
    assert [one[name] for name in ("documents", "tokens", "bytes", "checksum")] == [
        merged[name] for name in ("documents", "tokens", "bytes", "checksum")
    ]
    # Again, shard or merge: nothing to do.
    call(f"--shard=0/{count}", input=names, prefix="many")
    assert engine_jobs.pair(call(f"--merge-shards={count}", input=(), prefix="many")) == whole


def test_a_line_belongs_to_the_shard_in_which_it_begins(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(b"%d" % (number % 10) * (number * 7 % 23) + b"\n" for number in range(50)))
    whole = source.find([str(path)])
    for count in range(1, 60):
        found = b""
        for index in range(count):
            for number, part in enumerate(source.shard(whole, index, count)):
                found += b"".join(chunk.payload for chunk in source.read(number, part, 0, "text", 64))
        assert found == path.read_bytes()


def test_a_shards_faults_are_told_by_the_lines_of_the_whole_file(call, tmp_path):
    lines = engine_jobs.lines(TEXTS).splitlines()
    lines[270] = b"oops"
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(UsageError, match="in.jsonl: line 271 is not"):
        call("--shard=2/3")


def test_a_merge_refuses_shards_that_are_missing_or_foreign(call, tmp_path):
    engine_jobs.write(tmp_path / "in.jsonl")
    call("--shard=0/2")
    merge = {"input": (), "prefix": "out/data"}
    with pytest.raises(UsageError, match=r"shard-00001-of-00002 is missing. Run the same command with --shard=1/2"):
        call("--merge-shards=2", **merge)
    call("--shard=1/2", "--append-eod")
    with pytest.raises(UsageError, match="is of another job than .*its append_eod is True, not False"):
        call("--merge-shards=2", **merge)
    call("--shard=1/2", "--overwrite")
    engine_jobs.write(tmp_path / "other.jsonl", TEXTS[:200])
    call("--shard=0/2", "--overwrite", input=["other.jsonl"])
    with pytest.raises(UsageError, match="is of another job than .*its corpus is"):
        call("--merge-shards=2", **merge)
    call("--shard=0/2", "--overwrite")
    part = shards.prefix(f"{tmp_path}/out/data_text_document", (1, 2))
    with open(f"{part}.bin", "r+b") as file:
        file.write(b"\7\7")
    with pytest.raises(UsageError, match="checksum"):
        call("--merge-shards=2", **merge)
    assert not os.path.exists(f"{tmp_path}/out/data_text_document.idx")


def test_partitions_run_side_by_side_and_leave_one_output(whole, tmp_path, bpe):
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", tmp_path / "in.jsonl"]
    command += ["--output-prefix", tmp_path / "out" / "x", "--tokenizer-model", bpe.model]
    done = subprocess.run([*command, "--workers=2", "--partitions=2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert engine_jobs.pair(tmp_path / "out" / "x_text_document") == whole
    assert len(list((tmp_path / "out").iterdir())) == 3
    # A run that was killed between the merge and the end of its parts.
    prefix = tmp_path / "out" / "x_text_document"
    shutil.copy(f"{prefix}.bin", shards.prefix(str(prefix), (0, 2)) + ".bin")
    before = os.stat(f"{prefix}.bin").st_mtime_ns
    for more in (["--partitions=2"], []):
        done = subprocess.run([*command, "--workers=2", *more], capture_output=True, text=True)
        assert done.returncode == 0 and "already made" in done.stdout, done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 3 and os.stat(f"{prefix}.bin").st_mtime_ns == before


def test_shards_without_a_document_are_not_merged(call, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\n")
    for index in range(2):
        call(f"--shard={index}/2")
    with pytest.raises(UsageError, match="no shard of .* has a document"):
        call("--merge-shards=2", input=())
    assert not os.path.exists(tmp_path / "out" / "data_text_document.idx")


def test_merged_shards_are_the_output_of_the_undivided_job(call, whole, tmp_path, capsys):
    for index in range(2):
        call(f"--shard={index}/2")
    merged, undivided = (
        read_sidecar(call("--merge-shards=2", input=())),
        read_sidecar(f"{tmp_path}/whole_text_document"),
    )
    own = {"source": 0, "seconds": 0, "encoder": 0}
    assert {**merged, **own} == {**undivided, **own} and merged["seconds"] > 0 and "fastokens" in merged["encoder"]
    assert merged["source"] == {**undivided["source"], "parts": merged["source"]["parts"]}
    capsys.readouterr()
    call()
    assert "already made from this text" in capsys.readouterr().out


def test_each_output_proves_the_tokenizer_on_its_own_documents(call, tmp_path, monkeypatch):
    seen = []
    real = encode.choose
    monkeypatch.setattr(encode, "choose", lambda *said: (seen.append(said[1]), real(*said))[1])
    (tmp_path / "a.jsonl").write_bytes(b"oops\n" * 3 + b" \n" * (source.CHUNK // 2) + engine_jobs.lines(["one"]))
    (tmp_path / "b.jsonl").write_bytes(engine_jobs.lines(["two"]))
    call("--output-each", "--on-error=skip", input=("a.jsonl", "b.jsonl"))
    assert seen == [["one"], ["two"]]


def test_partitions_of_nothing_leave_nothing(tmp_path, bpe):
    (tmp_path / "in.jsonl").write_bytes(b"")
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", tmp_path / "in.jsonl"]
    command += ["--output-prefix", tmp_path / "out" / "x", "--tokenizer-model", bpe.model]
    done = subprocess.run([*command, "--workers=2", "--partitions=2"], capture_output=True, text=True)
    assert done.returncode == 2 and "in.jsonl: holds no text. " in done.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("words", [["--workers=2", "--partitions=2"], ["--workers=6"]])
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_ended_from_outside_no_process_stays_and_none_shows_a_traceback(tmp_path, bpe, words, end):
    (tmp_path / "in.jsonl").write_bytes(engine_jobs.lines(TEXTS) * 500)
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", tmp_path / "in.jsonl"]
    command += ["--output-prefix", tmp_path / "out" / "x", "--tokenizer-model", bpe.model, *words]
    run = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while run.poll() is None and not list(tmp_path.glob("out/*.bin.partial")):
        time.sleep(0.01)
    if end == signal.SIGINT:
        os.killpg(run.pid, end)  # a terminal's Ctrl-C goes to all of them
    else:
        run.send_signal(end)
    assert "Traceback" not in run.communicate()[1] and run.returncode == (130 if end == signal.SIGINT else -end)
    until = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < until:
            os.killpg(run.pid, 0)
            time.sleep(0.05)
    assert not list(tmp_path.glob("out/*.idx"))


def test_flags_without_effect_say_so(call, whole, capsys):
    prefix = call("--log-interval", "100", "--keep-sequential-samples", "--use-gigatoken")
    assert capsys.readouterr().out.count("has no effect: ") == 3 and engine_jobs.pair(prefix) == whole


def test_a_tokenizer_that_cannot_encode_the_text(call, tmp_path):
    from tokenizers import Tokenizer, models

    (tmp_path / "words").mkdir()
    Tokenizer(models.WordLevel({"</s>": 0, "word": 1}, unk_token="?")).save(str(tmp_path / "words" / "tokenizer.json"))
    (tmp_path / "words" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    engine_jobs.write(tmp_path / "in.jsonl", TEXTS[:3])
    with pytest.raises(UsageError, match=r"^--tokenizer-model=.*words: it can't encode this text: .*unknown token"):
        call("--tokenizer-model", str(tmp_path / "words"))
    assert not list(tmp_path.glob("out/*.idx"))


def test_a_line_is_judged_alike_whatever_its_neighbours_are():
    deep = b'{"n": ' + b"[" * 1020 + b"]" * 1020 + b', "text": "a"}\n'  # deeper than the standard library reads
    assert documents.texts(deep, "text") == (["a"], [])
    found, faults = documents.texts(deep + b"?\n", "text")
    assert found == ["a"] and [fault.line for fault in faults] == [1]


def test_without_bos(call, bpe, tmp_path):
    engine_jobs.write(tmp_path / "in.jsonl")
    index = open_index(call("--tokenizer-hf-no-include-special-tokens"))
    assert index.tokens == len(load(bpe, bos=False).encode_batch(TEXTS)[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *[([flag], f"^{flag} is not supported: ") for flag in preprocess.REFUSED],
        (["--append-eot"], "^--append-eot: unknown flag.*--append-eod"),
        (["--shard=2/2"], "^--shard=2/2: must be I/N"),
        (["--shard=x"], "^--shard=x: must be I/N"),
        (["--workers=3", "--partitions=2"], "^--workers=3 --partitions=2: both must be above 0"),
        (["--workers=0"], "^--workers=0"),
        (["--output-each", "--shard=0/2"], "^--output-each: files are parts already"),
        (["--on-error=ignore"], "invalid choice"),
        (["--tokenizer-type=NullTokenizer"], "^--tokenizer-type=NullTokenizer is not supported"),
        (["--input", "/no/such"], "^--input=/no/such: no such file or folder"),
        (["--input", "/no/such/*.gz"], "no file matches it"),
    ],
)
def test_mistakes(call, tmp_path, words, message):
    engine_jobs.write(tmp_path / "in.jsonl", TEXTS[:3])
    with pytest.raises(UsageError, match=message):
        call(*words)
    assert not (tmp_path / "out").exists()


def test_the_tool_ends_with_status_2_and_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--output-prefix", "x", "--tokenizer-model", "y"]
    done = subprocess.run([*command, "--input", tmp_path / "folder"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True).stdout
    assert "--merge-shards" in shown and "SLURM_ARRAY_TASK_ID" in shown


def test_nemo_guide(whole, tmp_path, bpe):
    script = ROOT / "examples" / "pretrain_llm" / "preprocess_data.sh"
    flags = [
        "--ht-tokenizer",
        bpe.model,
        "--data-prefix",
        "in",
        "--input-dir",
        tmp_path,
        "--output-dir",
        tmp_path / "o",
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", script, *flags, "--workers=1"], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    index = open_index(str(tmp_path / "o" / "preprocessed" / "in_text_document"))
    assert index.tokens == len(load(bpe).encode_batch(TEXTS, bpe.eod)[0])
    with pytest.raises(UsageError, match="--data-prefix=none: .* must hold one such file and has none of"):
        preprocess.main_nemo([*map(str, flags[:3]), "none", *map(str, flags[4:])])


def test_the_tool_starts_anew_with_huge_pages_and_does_so_once(tmp_path):
    code = """
import os, runpy, sys
os.execve = lambda program, words, said: print(program == sys.executable, words[-1], said["GLIBC_TUNABLES"])
sys.argv[0] = sys.argv.pop(1)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", code, str(ROOT / "tools" / "preprocess_data.py"), "--help"]
    others = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    for environment, begin in (
        (others, "True --help glibc.malloc.hugetlb=1"),
        ({**others, "GLIBC_TUNABLES": ""}, "usage"),
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith(begin), done.stderr
