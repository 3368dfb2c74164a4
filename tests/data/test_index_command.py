"""`megatron-rocm data index`: made beforehand without torch, and found by the run with the same variables."""

import os
import subprocess
import sys

import numpy as np
import pytest

from megatron_rocm import cli
from megatron_rocm.data import epoch_index


@pytest.fixture
def prefix(write_data, tmp_path):
    lengths = np.random.RandomState(0).randint(1, 61, 300)
    return write_data(tmp_path / "data", [[5] * length for length in lengths])


@pytest.fixture
def index(capsys, monkeypatch):
    """Run the command: (exit status, what it printed, what it complained of)."""
    for name in ("DATA_PATH", "SPLIT", "SEQ_LENGTH", "SEED", "MODEL_SIZE", "EVAL_ITERS", "DATA_CACHE_PATH"):
        monkeypatch.delenv(name, raising=False)

    def run(*words):
        status = cli.main(["data", "index", *words])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("length", [["SEQ_LENGTH=32"], ["MODEL_SIZE=tiny", "--family", "llama2"]])
def test_the_run_that_follows_finds_it(index, prefix, tmp_path, monkeypatch, evaluates, length):
    from megatron_rocm.data import datasets

    words = [f"DATA_PATH={prefix}", "SPLIT=80,20,0", "SEED=3", *length, *["EVAL_ITERS=2"] * evaluates, "TP=2"]
    status, out, _ = index(*words)
    assert status == 0 and out.count(" made in ") == 1 + evaluates
    assert "train split of" in out and "240 documents" in out
    monkeypatch.setattr(epoch_index, "make", lambda epoch: pytest.fail("it is made again"))
    names = ("train", "valid") if evaluates else ("train",)
    seq_length = 32 if length == ["SEQ_LENGTH=32"] else 256
    splits = datasets.build([(None, prefix)], "80,20,0", seq_length, 3, None, 1, 320, names)
    assert splits.train[0]["tokens"].shape == (seq_length,) and len(list((tmp_path / "cache").iterdir())) == len(names)


def test_what_a_run_made_is_left_as_it_is(index, prefix, tmp_path):
    from megatron_rocm.data import datasets

    datasets.build([(None, prefix)], "99,1,0", 32, 1234, tmp_path / "c", 1, 320, ("train",))
    (file,) = (tmp_path / "c").iterdir()
    before = file.stat().st_mtime_ns
    _, out, _ = index(f"DATA_PATH={prefix}", "SEQ_LENGTH=32", f"DATA_CACHE_PATH={tmp_path}/c")
    assert "there, checked in" in out and file.stat().st_mtime_ns == before
    file.write_text("notes")
    assert " made in " in index(f"DATA_PATH={prefix}", "SEQ_LENGTH=32", f"DATA_CACHE_PATH={tmp_path}/c")[1]


def test_every_prefix_of_a_blend(index, prefix, write_data, tmp_path):
    other = write_data(tmp_path / "other", [[5] * 30] * 100)
    _, out, _ = index(f"DATA_PATH=3 {prefix} 1 {other}", "SEQ_LENGTH=32", f"DATA_CACHE_PATH={tmp_path}/c")
    assert out.count(" made in ") == 2 and len(list((tmp_path / "c").iterdir())) == 2


def test_splits_with_paths_of_their_own(index, prefix, write_data, tmp_path, monkeypatch):
    from megatron_rocm.data import datasets

    other = write_data(tmp_path / "other", [[5] * 30] * 100)
    words = [f"TRAIN_DATA_PATH={prefix}", f"VALID_DATA_PATH={other}", "EVAL_ITERS=1", "SEQ_LENGTH=32"]
    _, out, _ = index(*words, f"DATA_CACHE_PATH={tmp_path}/c")
    assert f"train split of {prefix}: 300 documents" in out and f"valid split of {other}: 100 documents" in out
    monkeypatch.setattr(epoch_index, "make", lambda epoch: pytest.fail("it is made again"))
    paths = {"train": [(None, prefix)], "valid": [(None, other)]}
    assert datasets.build(paths, "99,1,0", 32, 1234, tmp_path / "c", 1, 320, ("train", "valid")).valid.size == 93


def test_variables_come_from_the_environment_and_from_yaml(index, prefix, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", prefix)
    (tmp_path / "run.yaml").write_text("SEQ_LENGTH: 16\nSEED: 5\n")
    assert index(str(tmp_path / "run.yaml"))[0] == 0
    assert index(f"DATA_PATH={prefix}", "SEQ_LENGTH=16", "SEED=5")[1].count("there, checked in") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SEQ_LENGTH=16"], "data index needs DATA_PATH"),
        (["DATA_PATH={prefix}"], "data index needs SEQ_LENGTH, or a MODEL_SIZE"),
        (["DATA_PATH={prefix}", "MODEL_SIZE=9"], "data index needs SEQ_LENGTH, or a MODEL_SIZE"),
        (["DATA_PATH={prefix}", "SEQ_LENGTH=100000"], "SEQ_LENGTH=100000 needs 100,001"),
        (["DATA_PATH={prefix}x", "SEQ_LENGTH=16"], "there is no {prefix}x.bin"),
        (["DATA_PATH={prefix}", "SEQ_LENGTH=16", "SEEED=1"], "did you mean SEED?"),
        (["--family", "gpt"], "--family gpt: choose llama2 or llama3"),
    ],
)
def test_mistakes(index, prefix, words, message):
    status, _, complaint = index(*(word.format(prefix=prefix) for word in words))
    assert status == 2 and message.format(prefix=prefix) in complaint


def test_help(index):
    status, out, _ = index("--help")
    assert status == 0 and "DATA_CACHE_PATH" in out


WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(("torch", "megatron", "transformers")))  # an import of one of them fails
from megatron_rocm import cli
sys.exit(cli.main(["data", "index", *sys.argv[1:]]))
"""


def test_no_torch_is_needed(prefix, tmp_path):
    words = [sys.executable, "-c", WITHOUT_TORCH, f"DATA_PATH={prefix}", "SEQ_LENGTH=16"]
    run = subprocess.run(words, env={**os.environ}, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and " made in " in run.stdout, run.stderr
