from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_rocm.data.spm import as_tokenizer_json
from megatron_rocm.data.tokenizer import TokenizerInfo, inspect, load, train_bpe
from megatron_rocm.errors import UsageError

SAMPLE = "def add(a):\r\n\n    return 'ü 日本 12345' # don't <|end_of_text|>  \n"


def test_trained_tokenizer_is_what_transformers_loads(bpe):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(bpe.model)
    ids, lengths = load(bpe).encode_batch([SAMPLE, "x"])
    assert (bpe.vocab_size, bpe.eod, bpe.bos) == (len(theirs), theirs.eos_token_id, theirs.bos_token_id)
    assert theirs.pad_token_id not in (bpe.eod, bpe.bos)
    assert list(ids) == theirs(SAMPLE, split_special_tokens=True).input_ids + theirs("x").input_ids
    assert lengths.sum() == len(ids) and theirs.decode(ids[1 : lengths[0]]) == SAMPLE


def test_special_tokens_spelt_out_in_text_stay_text(bpe):
    ids, _ = load(bpe).encode_batch([SAMPLE])
    assert bpe.eod not in ids


def test_training_is_deterministic(bpe, text, tmp_path):
    assert train_bpe([text], 320, tmp_path / "again").fingerprint == bpe.fingerprint


def test_fingerprint_is_of_the_vocabulary(bpe, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(bpe.model, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    # Older libraries write merges as strings.
    tokenizer["model"]["merges"] = [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    path.write_text(json.dumps(tokenizer, indent=3))
    assert inspect(str(folder)).fingerprint == bpe.fingerprint
    tokenizer["model"]["merges"].reverse()
    path.write_text(json.dumps(tokenizer))
    assert inspect(str(folder)).fingerprint != bpe.fingerprint


def test_added_tokens_count(bpe, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(bpe.model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 999, "content": "<|more|>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|more|>"}}))
    info = inspect(str(folder))
    assert (info.vocab_size, info.eod) == (1000, 999)
    assert info.bos == 0  # from special_tokens_map.json, which tokenizer_config.json no longer names


def varint(value):
    out = b""
    value &= (1 << 64) - 1
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number, payload):
    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def sentencepiece_model(eos=2, bos=1):
    pieces = b"".join(
        field(1, field(1, piece) + varint(2 << 3 | 5) + b"\0\0\0\0") for piece in (b"<unk>", b"<s>", b"</s>")
    )
    return pieces + field(2, field(41, bos) + field(42, eos))


def test_sentencepiece_model_is_read_without_the_library(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    for model, type in ((tmp_path, "Llama2Tokenizer"), (tmp_path / "tokenizer.model", "HuggingFaceTokenizer")):
        info = inspect(str(model), type)
        assert (info.vocab_size, info.eod, info.bos) == (3, 2, 1)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(bos=-1))
    assert inspect(str(tmp_path), "Llama2Tokenizer").bos is None


def test_sentencepiece_encodes_as_the_library(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text(Path(__file__).read_text())
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    processor = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    info = inspect(str(tmp_path), "Llama2Tokenizer")
    assert (info.vocab_size, info.eod, info.bos) == (400, processor.eos_id(), processor.bos_id())
    ids, lengths = load(info).encode_batch(["def a", "ü"])
    assert list(ids) == processor.encode("def a", add_bos=True) + processor.encode("ü", add_bos=True)
    assert len(lengths) == 2


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model_type": "unigram"}, "is not of the type BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes characters"),
        ({"remove_extra_whitespaces": True}, "removes spaces"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces behind words"),
        ({"user_defined_symbols": ["[X]"]}, "has pieces of the user's"),
        ({"split_by_whitespace": False}, "has pieces across words"),
    ],
)
def test_a_sentencepiece_model_that_a_tokenizer_json_cant_hold(tmp_path, options, why):
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(Path(__file__).read_text())
    plain = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=300, minloglevel=2,
        **{**plain, **options},
    )  # fmt: skip
    with pytest.raises(ValueError, match=why):
        as_tokenizer_json((tmp_path / "m.model").read_bytes())


def odd_eos(folder):
    no_eos(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": [7]}')


def vocabulary(id):
    return json.dumps({"model": {"vocab": {"a": 0, "<|end_of_text|>": id}}})


def no_eos(folder):
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder or file"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": '), "can't be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), "no JSON object"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": {}}'), "not a Hugging Face tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}'), "not a Hugging Face"),
        (lambda folder: (folder / "tokenizer.json").write_text(vocabulary(1.5)), "not a Hugging Face"),
        (lambda folder: (folder / "tokenizer.json").write_text(vocabulary("7")), "not a Hugging Face"),
        (lambda folder: (folder / "tokenizer.json").write_text(vocabulary(-1)), "not a Hugging Face"),
        (no_eos, "names no eos_token"),
        (odd_eos, "names no eos_token"),
        (lambda folder: (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}'), "'</s>' is not in"),
    ],
)
def test_a_bad_folder_is_told(bpe, tmp_path, damage, words):
    folder = tmp_path / "tokenizer"
    shutil.copytree(bpe.model, folder)
    damage(folder)
    with pytest.raises(UsageError) as error:
        inspect(str(folder))
    assert str(error.value).startswith(f"TOKENIZER_MODEL={folder}: ") and words in str(error.value)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"no protobuf", "no SentencePiece model"),
        (sentencepiece_model()[:-3], "no SentencePiece model"),
        (sentencepiece_model(eos=-1), "no end-of-sentence piece"),
    ],
)
def test_a_bad_sentencepiece_model_is_told(tmp_path, raw, words):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(raw)
    with pytest.raises(UsageError, match=words):
        inspect(str(path), "Llama2Tokenizer")


@pytest.mark.parametrize(
    ("type", "words"), [("NullTokenizer", "mock data"), ("HugingFace", "did you mean HuggingFaceTokenizer")]
)
def test_tokenizer_types(type, words):
    with pytest.raises(UsageError, match=words):
        inspect("anything", type)


@pytest.mark.parametrize("size", [1, 200_001])
def test_size_of_a_new_tokenizer(tmp_path, size):
    with pytest.raises(UsageError, match="must be 300 to 200000"):
        train_bpe(["text"], size, tmp_path / "x")


def test_inspect_imports_no_library(bpe):
    code = f"""
import sys
from megatron_rocm.data.facts import describe
describe((), "HuggingFaceTokenizer", {bpe.model!r})
print(sorted({{"torch", "transformers", "tokenizers", "huggingface_hub", "megatron.core"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# The hub's client reads its environment when it is imported, so each question is a process of its own.
ASK = """
import sys
from megatron_rocm.data.tokenizer import inspect
from megatron_rocm.errors import UsageError
try:
    print(inspect(sys.argv[1]))
except UsageError as error:
    print(error)
"""
SECRET = "hf_secret"


def ask(model, home, hub, **environment):
    keep = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": hub, "HF_TOKEN": SECRET, **environment}
    answer = subprocess.run(
        [sys.executable, "-c", ASK, model], env={**keep, **settings}, capture_output=True, text=True, timeout=60
    )
    assert SECRET not in answer.stdout + answer.stderr
    return answer.stdout.strip()


def test_hub_name_is_downloaded_once(bpe, hub, tmp_path):
    known = TokenizerInfo(bpe.type, "open/tokenizer", bpe.vocab_size, bpe.eod, bpe.bos, bpe.fingerprint)
    assert ask("open/tokenizer", tmp_path, hub.url) == str(known)
    assert f"Bearer {SECRET}" in hub.tokens
    assert ask("open/tokenizer", tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1") == str(known)


@pytest.mark.parametrize(
    ("model", "words"),
    [("gated/model", "is gated. Accept its licence"), ("nobody/model", "no such repository on the hub")],
)
def test_hub_refusals(hub, tmp_path, model, words):
    message = ask(model, tmp_path, hub.url)
    assert message.startswith(f"TOKENIZER_MODEL={model}: ") and words in message


def test_hub_unreachable_and_offline(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        message = ask("some/model", tmp_path, url)
    assert message.startswith("TOKENIZER_MODEL=some/model: ") and url in message and "can't be reached" in message
    assert "this run is offline" in ask("some/model", tmp_path, url, HF_HUB_OFFLINE="1")


def test_empty_batch(bpe):
    ids, lengths = load(bpe).encode_batch([])
    assert ids.dtype == np.uint32 and not len(ids) and not len(lengths)
