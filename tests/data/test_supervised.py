from __future__ import annotations

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_rocm.data import supervised
from megatron_rocm.data.pack_command import main
from megatron_rocm.data.pairs import check_offsets
from megatron_rocm.data.supervised import Packs
from megatron_rocm.data.tokenizer import load
from megatron_rocm.errors import UsageError

KINDS = ("bin", "idx", "json", "mask.npy")


@pytest.fixture
def call(tmp_path, bpe):
    """`data pack` of tmp_path/in.jsonl (or what `input` says) into tmp_path/out; the prefix."""

    def call(*more, input="in.jsonl", seq_length=32):
        arguments = ["--input", str(tmp_path / input), "--output-prefix", str(tmp_path / "out")]
        arguments += ["--tokenizer-model", bpe.model, "--seq-length", str(seq_length), "--workers", "2"]
        assert main([*arguments, *more]) == 0
        return str(tmp_path / "out")

    return call


@pytest.fixture
def write(tmp_path):
    def write(*examples, name="in.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in examples))

    return write


@pytest.fixture
def expected(bpe):
    """The ids of an example, and the number of its prompt's."""
    prompts, answers = load(bpe), load(bpe, bos=False)

    def expected(prompt, answer):
        head = list(prompts.encode_batch([prompt])[0])
        return [*head, *answers.encode_batch([answer])[0], bpe.eod], len(head)

    return expected


def examples_of(item):
    """The examples of an item as (ids, learnt ids), by its boundaries; the padding is left out."""
    edges = item["boundaries"]
    parts = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        learnt = item["labels"][low:high][item["loss_mask"][low:high] == 1]
        parts.append((list(item["tokens"][low:high]), list(learnt)))
    return parts


def read_all(prefix):
    return {kind: Path(f"{prefix}.{kind}").read_bytes() for kind in KINDS}


def some(count, seed=1):
    rng = random.Random(seed)
    words = "alpha beta gamma ünï 日本 12 , .".split()
    return [
        {"prompt": " ".join(rng.choices(words, k=rng.randrange(4))), "answer": " ".join(rng.choices(words, k=2))}
        for _ in range(count)
    ]


def test_items(call, write, expected, bpe):
    examples = some(40)
    write(*examples)
    packs = Packs(call(seq_length=64))
    left = [expected(**one) for one in examples]
    seen = 0
    for number in range(len(packs)):
        item = packs[number]
        assert {name: (array.dtype, array.shape) for name, array in item.items() if name != "boundaries"} == {
            "tokens": (np.int64, (64,)), "labels": (np.int64, (64,)), "loss_mask": (np.float32, (64,)),
            "position_ids": (np.int64, (64,)),
        }  # fmt: skip
        edges = item["boundaries"]
        assert edges.dtype == np.int32 and edges[0] == 0 and edges[-1] == 64 and (np.diff(edges) > 0).all()
        parts = examples_of(item)
        for (ids, learnt), low in zip(parts, edges, strict=False):
            length = len(ids)
            assert list(item["position_ids"][low : low + length]) == list(range(length))
            # Within an example the label is the next token, at its end there is none to be learnt.
            assert list(item["labels"][low : low + length]) == [*ids[1:], bpe.eod]
            assert item["loss_mask"][low + length - 1] == 0
            if (match := (ids, len(ids) - len(learnt))) in left:
                left.remove(match)
                seen += 1
            else:
                assert set(ids) == {bpe.eod} and not learnt  # the padding, last
                assert low + length == 64
    assert not left and seen == 40


def test_every_token_of_the_answer_and_its_end_is_learnt(call, write, expected, bpe):
    write({"prompt": "one two", "answer": "three"})
    item = Packs(call())[0]
    ids, prompt = expected("one two", "three")
    assert list(item["labels"][item["loss_mask"] == 1]) == ids[prompt:] and ids[-1] == bpe.eod
    assert list(np.flatnonzero(item["loss_mask"])) == list(range(prompt - 1, len(ids) - 1))
    assert list(item["boundaries"]) == [0, len(ids), 32]


def test_all_tokens_learnt(call, write, expected):
    write({"prompt": "one two", "answer": "three"})
    item = Packs(call("--loss", "all"))[0]
    ids, _ = expected("one two", "three")
    assert list(item["labels"][item["loss_mask"] == 1]) == ids[1:]


def test_keys_and_template(call, write, expected):
    write({"document": "a {prompt} b", "summary": "c"})
    item = Packs(
        call(
            "--prompt-key",
            "document",
            "--answer-key",
            "summary",
            "--template",
            "### Sum:\n{prompt}\n###",
            seq_length=64,
        )
    )[0]
    ids, prompt = expected("### Sum:\na {prompt} b\n###", "c")
    assert examples_of(item)[0] == (ids, ids[prompt:])


def test_a_full_sequence_has_no_padding(call, write, expected):
    ids, prompt = expected("one two three", "four")
    write({"prompt": "one two three", "answer": "four"})
    item = Packs(call(seq_length=len(ids)))[0]
    assert list(item["boundaries"]) == [0, len(ids)] and list(item["tokens"]) == ids
    assert item["loss_mask"].sum() == len(ids) - prompt


def test_a_longer_sequence_at_reading(call, write):
    write(*some(10))
    prefix = call(seq_length=64)
    item = Packs(prefix, 100)[0]
    assert item["tokens"].shape == (100,) and item["boundaries"][-1] == 100
    with pytest.raises(UsageError, match="SEQ_LENGTH=16: DATA_PATH=.* has packs of .* Give SEQ_LENGTH=64"):
        Packs(prefix, 16)


def test_other_tools_see_a_pair_of_examples_and_packs(call, write, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    write(*some(30))
    prefix = call(seq_length=64)
    check_offsets(prefix)
    theirs, packs = IndexedDataset(prefix), Packs(prefix)
    assert len(theirs) == 30 and len(theirs.document_indices) == len(packs) + 1
    first = np.concatenate([theirs[at] for at in range(theirs.document_indices[1])])
    assert list(packs[0]["tokens"][: len(first)]) == list(first)


def test_blocks_of_any_size_give_the_same_files(call, write, tmp_path, monkeypatch):
    write(*some(200))
    files = read_all(call(seq_length=64))
    for size in (1, 7, 33, 1000):
        monkeypatch.setattr(supervised, "AT_ONCE", size)
        prefix = call("--overwrite", seq_length=64)
        assert read_all(prefix) == files


def test_compressed_and_several_files(call, write, tmp_path):
    examples = some(20)
    write(*examples)
    call()
    whole = (tmp_path / "out.bin").read_bytes()
    lines = (tmp_path / "in.jsonl").read_bytes().splitlines(True)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "1.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:9])))
    (tmp_path / "parts" / "2.jsonl").write_bytes(b"".join(lines[9:]))
    call("--overwrite", input="parts")
    assert (tmp_path / "out.bin").read_bytes() == whole


BAD = [
    ('{"prompt": "a"}', "there is no key `answer`"),
    ('{"prompt": 5, "answer": "b"}', "`prompt` is a int, not a text"),
    ('{"prompt": "a", "answer": ""}', "`answer` is empty"),
    ('["a"]', "it is a list, not an object"),
    ("{", "Expecting property name"),
    ('{"prompt": "\\ud800", "answer": "b"}', "surrogates not allowed"),
    (b"\xff", "invalid start byte|can't decode"),
]


@pytest.mark.parametrize(("line", "words"), BAD)
def test_bad_lines(call, write, tmp_path, capsys, line, words):
    good = [json.dumps(one) for one in some(3)]
    raw = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "in.jsonl").write_bytes("\n".join(good[:2]).encode() + b"\n\n" + raw + b"\n" + good[2].encode() + b"\n")
    with pytest.raises(UsageError, match=f"in.jsonl: line 4: .*({words}).*--on-error=skip"):
        call()
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    prefix = call("--on-error", "skip")
    assert "1 left out" in capsys.readouterr().out and check_offsets(prefix).head.sequences == 3


def test_too_long(call, write, expected, tmp_path, capsys):
    examples = [
        {"prompt": "a", "answer": "b"},
        {"prompt": "a", "answer": "long " * 30},
        {"prompt": "long " * 50, "answer": "b"},
    ]
    write(*examples)
    with pytest.raises(UsageError, match="--seq-length=20: .*in.jsonl: line 2 has .* tokens.*--too-long=drop"):
        call(seq_length=20)
    packs = Packs(call("--too-long", "drop", seq_length=20))
    assert len(packs) == 1 and "2 left out" in capsys.readouterr().out
    packs = Packs(call("--too-long", "cut", "--overwrite", seq_length=20))
    ids, prompt = expected(**examples[1])
    cut = [item for item in (packs[0], packs[1]) if examples_of(item)[0][0] == ids[:20]]
    assert len(packs) == 2 and list(cut[0]["labels"][cut[0]["loss_mask"] == 1]) == ids[prompt:20]


GOVREPORT = [
    {"input_ids": np.arange(10, 18), "loss_mask": [0, 0, 0, 0, 0, 1, 1, 1], "seq_start_id": [0]},
    {"input_ids": np.arange(20, 28), "loss_mask": [0, 1, 1, 1, 0, 0, 1, 1], "seq_start_id": [0, 4]},
]


def test_govreport(call, tmp_path):
    np.save(tmp_path / "train.npy", GOVREPORT, allow_pickle=True)
    packs = Packs(call(input="train.npy", seq_length=8))
    assert len(packs) == 2
    one, two = packs[0], packs[1]
    assert list(one["tokens"]) == list(range(10, 18)) and list(one["boundaries"]) == [0, 8]
    # As Hugging Face shifts labels of -100: the token is learnt that the mask stands at.
    assert list(one["labels"][one["loss_mask"] == 1]) == [15, 16, 17]
    assert list(two["boundaries"]) == [0, 4, 8] and list(two["position_ids"]) == [0, 1, 2, 3] * 2
    assert list(two["labels"][two["loss_mask"] == 1]) == [21, 22, 23, 26, 27]


def test_nemos_own_packing_marks_the_token_before(call, tmp_path):
    np.save(tmp_path / "a.npy", [{**GOVREPORT[0], "loss_mask": [0, 0, 0, 0, 1, 1, 1, 1]}], allow_pickle=True)
    item = Packs(call("--npy-mask", "input", input="a.npy", seq_length=8))[0]
    assert list(item["labels"][item["loss_mask"] == 1]) == [15, 16, 17]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**GOVREPORT[0], "input_ids": [1, 2, 3, 4, 5, 6, 7, 320]}, "row 1 holds the id 320, .* another tokenizer"),
        ({**GOVREPORT[0], "input_ids": [1, 2, 3, -4, 5, 6, 7, 8]}, "row 1 holds the id -4, "),
        ({**GOVREPORT[0], "input_ids": np.arange(9), "loss_mask": [1] * 9}, "row 1 has 9 tokens; give --seq-length=9"),
        ({"input_ids": [1]}, "row 1: it has no `loss_mask`"),
    ],
)
def test_bad_npy(call, tmp_path, row, words):
    np.save(tmp_path / "a.npy", [GOVREPORT[0], row], allow_pickle=True)
    with pytest.raises(UsageError, match=words):
        call(input="a.npy", seq_length=8)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seq-length", "0"], "--seq-length=0: must be 1 or more"),
        (["--template", "no place"], "--template=no place: must have {prompt} in one place"),
        (["--loss", "none"], "data pack: argument --loss: invalid choice"),
        (["--input", "a.npy", "b.jsonl"], ".npy files are packed already and can't be mixed"),
        (["--input", "/no/such"], "--input=/no/such: no such file"),
        (["--output-prefix", "/proc/no/out"], "--output-prefix=/proc/no/out: can't be written"),
    ],
)
def test_mistakes(call, write, arguments, words):
    write(*some(1))
    with pytest.raises(UsageError, match=words):
        call(*arguments)


def test_empty_input_and_parquet(call, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="holds no examples .0 were left out"):
        call()
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="are read from JSON Lines, not from parquet"):
        call(input="in.parquet")


def test_what_is_there_stays(call, write, tmp_path):
    write(*some(3))
    call()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="is there already.*--overwrite"):
        call()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert sorted(before) == ["in.jsonl", *(f"out.{kind}" for kind in KINDS)]


def test_damaged_files_are_told(call, write, tmp_path):
    write(*some(10))
    prefix = call()
    mask = tmp_path / "out.mask.npy"
    whole = mask.read_bytes()
    for content, words in ((whole[:-1], "can't be read"), (b"", "can't be read")):
        mask.write_bytes(content)
        with pytest.raises(UsageError, match=f"out.mask.npy {words}"):
            Packs(prefix)
    np.save(mask, np.zeros(5, np.uint8))
    with pytest.raises(UsageError, match="does not belong to its .bin"):
        Packs(prefix)
    mask.unlink()
    with pytest.raises(UsageError, match="out.mask.npy can't be read"):
        Packs(prefix)
    (tmp_path / "out.json").unlink()
    with pytest.raises(UsageError, match="is not packed for fine-tuning.*`megatron-rocm data pack`"):
        Packs(prefix)


CHILD = """
import os, signal, sys
from megatron_rocm.data import pack_command, supervised
step, name = int(sys.argv[1]), sys.argv[2]
real = os.replace
def replace(*names):
    global step
    if step == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    step -= 1
    real(*names)
os.replace = replace
pack_command.main(sys.argv[3:])
"""


def test_killed_while_the_files_get_their_names(call, write, tmp_path, bpe):
    """Whatever is there with an .idx is whole."""
    write(*some(20))
    call()
    files = {kind: (tmp_path / f"out.{kind}").read_bytes() for kind in KINDS}
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "out"), "--overwrite"]
    arguments += ["--tokenizer-model", bpe.model, "--seq-length", "40"]
    ended = []
    for step in range(6):
        done = subprocess.run([sys.executable, "-c", CHILD, str(step), "", *arguments], capture_output=True)
        ended.append(done.returncode)
        if (tmp_path / "out.idx").exists():
            Packs(str(tmp_path / "out"))
    assert ended[0] == -signal.SIGKILL and ended[-1] == 0
    call("--overwrite")
    assert {kind: (tmp_path / f"out.{kind}").read_bytes() for kind in KINDS} == files
    assert not [path for path in os.listdir(tmp_path) if "partial" in path]


def test_reading_needs_no_torch(call, write):
    write(*some(3))
    code = "import sys; from megatron_rocm.data.supervised import Packs; Packs(sys.argv[1])[0]\n"
    code += "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, call()], capture_output=True, text=True).stdout == "False\n"


def test_npy_header_is_numpys(tmp_path):
    file = io.BytesIO()
    supervised.write_npy_header(file, 3)
    assert list(np.load(io.BytesIO(file.getvalue() + b"\1\0\1"))) == [1, 0, 1]
