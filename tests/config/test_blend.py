"""What DATA_PATH and the paths per split take: words, files, and what is wrong with them."""

from __future__ import annotations

import json

import pytest

from megatron_rocm.config import read
from megatron_rocm.config.blend import chosen, parse
from megatron_rocm.errors import UsageError


@pytest.mark.parametrize(
    ("text", "blend"),
    [
        ("a/b", ((None, "a/b"),)),
        ("a/b.bin", ((None, "a/b"),)),
        ("a.idx", ((None, "a"),)),
        (" 3 a\n1e0\tb.bin ", ((3.0, "a"), (1.0, "b"))),
        ("0.5 7", ((0.5, "7"),)),
        ("a b.bin c", ((None, "a"), (None, "b"), (None, "c"))),
        ("2 x 4 y 1 z 0.147 u 0.221 v", ((2.0, "x"), (4.0, "y"), (1.0, "z"), (0.147, "u"), (0.221, "v"))),
    ],
)
def test_words(text, blend):
    assert parse(text) == blend


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("0.5 a 0.5", "3 words"),
        ("a 2 b 1", "'a' stands where a weight must"),
        ("0.5 a x b", "'x' stands where a weight must"),
        ("-1 a 2 b", "the weight -1 of a"),
        ("nan a 1 b", "the weight nan of a"),
        ("inf a 1 b", "the weight inf of a"),
        ("0 a 0 b", "add up to 0"),
        ("1e-9 a 1 b", "the weight of a is under .* data concat"),
        ("1 a 2 a.bin", "a is named twice"),
    ],
)
def test_bad_words(text, words):
    with pytest.raises(UsageError, match=words) as error:
        parse(text, "VALID_DATA_PATH")
    assert str(error.value).startswith("VALID_DATA_PATH")


LLEMMA = """
"train-data-paths": ["arxiv", "open-web-math", "code", "pile", "code-rp"]
"train-data-weights": [2, 4, 1, 0.147368, 0.221053]
"valid_data_paths": ["arxiv_valid", "open-web-math_valid"]
"num_workers": 2
"""


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("a: 2\nb.bin: 4e-1\n", ((2.0, "a"), (0.4, "b"))),
        ("a:\nb:\n", ((None, "a"), (None, "b"))),
        ("[2, a, 4, b]", ((2.0, "a"), (4.0, "b"))),
        ("2 a 4 b", ((2.0, "a"), (4.0, "b"))),
        ("- a\n", ((None, "a"),)),
        ("train: {a b: 2, c: 1}\nvalid: c\n", {"train": ((2.0, "a b"), (1.0, "c")), "valid": ((None, "c"),)}),
        # What Megatron-LM's --per-split-data-args-path reads.
        (
            json.dumps({"train": ["30", "a", "70", "b"], "valid": ["c"], "test": None}),
            {"train": ((30.0, "a"), (70.0, "b")), "valid": ((None, "c"),)},
        ),
        (
            LLEMMA,
            {
                "train": (
                    (2.0, "arxiv"), (4.0, "open-web-math"), (1.0, "code"), (0.147368, "pile"), (0.221053, "code-rp"),
                ),
                "valid": ((1.0, "arxiv_valid"), (1.0, "open-web-math_valid")),
            },
        ),
    ],
)  # fmt: skip
def test_a_file(tmp_path, content, found):
    (tmp_path / "blend.yaml").write_text(content)
    assert parse(f"{tmp_path}/blend.yaml") == found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is no blend; write `prefix: weight` lines"),
        ("a: b: c", "not YAML"),
        ("a: true\n", "the weight True of a must be a number"),
        ("a: [1]\n", r"the weight \[1\] of a must be a number"),
        ("a: 1\nb:\n", "some prefixes have a weight and some have none"),
        ("a: 1\na: 2\n", "line 2: a is named twice"),
        ("train:\n  a: 1\ntrain:\n  b: 1\n", "line 3: train is named twice"),
        ("a: 1\n./a: 2\n", "./a is named twice"),
        ("a: -1\n", "the weight -1 of a"),
        ("1: 2\n", "is no blend"),
        ("[[a], b]", "is no blend"),
        ("train: {a: 1}\nvalidation: {b: 1}\n", "validation stands beside train"),
        ("valid: a\n", "says nothing to train on"),
        ("train: 2 a b\n", "train: 3 words"),
        ("train_data_paths: [a, b]\ntrain_data_weights: [1]\n", "lists of one length"),
    ],
)
def test_a_bad_file(tmp_path, content, words):
    file = tmp_path / "blend.yml"
    file.write_text(content)
    with pytest.raises(UsageError, match=words) as error:
        parse(str(file))
    assert str(error.value).startswith(f"DATA_PATH={file}: ") and "\n" not in str(error.value)


def test_a_file_that_is_not_there_and_one_of_splits_for_a_split(tmp_path):
    with pytest.raises(UsageError, match=r"^DATA_PATH=no\.yaml: No such file"):
        parse("no.yaml")
    (tmp_path / "all.yaml").write_text("train: a\nvalid: b\n")
    with pytest.raises(UsageError, match="holds paths of all splits; give it as DATA_PATH"):
        parse(f"{tmp_path}/all.yaml", "VALID_DATA_PATH")


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "blend.yaml").write_text("~/a: 1\n")
    assert parse(f"{tmp_path}/blend.yaml") == ((1.0, "/home/me/a"),)
    assert read("llama3", ["TRAIN_DATA_PATH=1 ~/a 2 b"], {}).said["TRAIN_DATA_PATH"].value == (
        (1.0, "/home/me/a"), (2.0, "b"),
    )  # fmt: skip


A, B = ((None, "a"),), ((None, "b"),)


def test_what_a_run_draws_from():
    assert not chosen({})
    assert chosen({"DATA_PATH": A}) == A
    assert chosen({"DATA_PATH": {"train": A}}) == {"train": A}
    assert chosen({"TRAIN_DATA_PATH": A, "TEST_DATA_PATH": B}) == {"train": A, "test": B}
    with pytest.raises(UsageError, match="^DATA_PATH with TRAIN_DATA_PATH: .* take one away"):
        chosen({"DATA_PATH": A, "TRAIN_DATA_PATH": B})
    with pytest.raises(UsageError, match="^VALID_DATA_PATH without TRAIN_DATA_PATH"):
        chosen({"VALID_DATA_PATH": A})
