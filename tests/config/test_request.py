"""The parser: names, types, order of precedence, messages."""

import pytest

from megatron_rocm.config import read
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.settings import LIBRARY_PREFIXES


def said(arguments, environment=None):
    request = read("llama3", arguments, environment or {}, LIBRARY_PREFIXES)
    return {name: (value.value, value.origin) for name, value in request.said.items()}


def message(arguments, environment=None):
    with pytest.raises(UsageError) as caught:
        said(arguments, environment)
    return str(caught.value)


def test_argument_wins_over_environment_and_environment_over_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("TP: 2\nMBS: 4\nBS: 8\nSEQ_PARALLEL: false\n")
    result = said([str(file), "MBS=8"], {"BS": "16", "MBS": "2"})
    assert result == {
        "TP": (2, str(file)),
        "MBS": (8, "argument"),
        "BS": (16, "environment"),
        "SEQ_PARALLEL": (False, str(file)),
    }


def test_later_argument_wins():
    assert said(["TP=2", "TP=4"]) == {"TP": (4, "argument")}


def test_home_is_expanded_where_a_shell_has_not(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert said(["SAVE_CKPT_PATH=~/x", "EXP_NAME=a"])["SAVE_CKPT_PATH"] == ("/home/me/x", "argument")
    assert read("llama3", ["DATA_PATH=0.5 ~/a 0.5 b~/c"], {}).text("DATA_PATH") == "0.5 /home/me/a 0.5 b~/c"


def test_empty_value_is_unset():
    assert said(["TP="], {"MBS": ""}) == {}


@pytest.mark.parametrize("text", ["a b", "it's", '"quoted"', "a;b", "$(touch /tmp/x)", "`id`", "a=b", "*", "ü"])
def test_values_are_data(text):
    assert said([f"LOG_DIR={text}"])["LOG_DIR"] == (text, "argument")


def test_library_settings_are_handed_on():
    request = read("llama3", ["NCCL_SOCKET_IFNAME=eth0", "TP=2"], {}, LIBRARY_PREFIXES)
    assert request.exports == {"NCCL_SOCKET_IFNAME": "eth0"}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("TPP=2", ["TPP=2", "unknown key", "TP"]),
        ("tp=2", ["tp=2", "did you mean", "TP"]),
        ("RECOMPUTE_LAYERS=2", ["RECOMPUTE_NUM_LAYERS"]),
        ("TP=two", ["TP=two", "whole number of at least 1"]),
        ("TP=0", ["TP=0", "at least 1"]),
        ("TP=1.5", ["TP=1.5", "whole number"]),
        ("LR=nan", ["LR=nan", "above 0"]),
        ("CLIP_GRAD=inf", ["CLIP_GRAD=inf", "a number"]),
        ("PRECISION=fp64", ["bf16, fp32, fp16"]),
        ("FSDP=maybe", ["0 or 1"]),
        ("MCORE=0", ["MCORE=0", "no others upstream"]),
        ("TE_FP4=1", ["TE_FP4=1", "a kernel of AMD's fork"]),
        ("TE_FP8_RECIPE=nvfp4", ["TE_FP8_RECIPE=nvfp4", "delayed, tensorwise, blockwise, mxfp8"]),
        ("RAMPUP_BATCH_SIZE=8,8", ["RAMPUP_BATCH_SIZE=8,8", "three whole numbers: start increment samples"]),
        ("RECOMPUTE_MODULES=attention", ["RECOMPUTE_MODULES=attention", "core_attn, mlp, or both"]),
        ("LR_DECAY_STYLE=step", ["LR_DECAY_STYLE=step", "cosine, linear, constant, WSD"]),
        ("core.ddp.use_megatron_fsdp=1", ["set MEGATRON_FSDP"]),
        ("CKPT_FORMAT=torch", ["CKPT_FORMAT=torch", "torch_dist"]),
        ("EXP_NAME=a/b", ["EXP_NAME=a/b", "letters, digits"]),
        ("MASTER_ADDR=$(id)", ["MASTER_ADDR=$(id)", "a host name or an address"]),
        ("HSDP_NUM_REPLICAS=two", ["HSDP_NUM_REPLICAS=two", "whole number"]),
        ("NNODES=999999999999", ["NNODES=999999999999", "at most 65536"]),
        ("LOG_DIR=a\x00b", ["control characters"]),
        ("HF_TOKEN=hf_secret", ["HF_TOKEN", "export"]),
        ("train", ["train", "KEY=VALUE"]),
        ("missing.yaml", ["missing.yaml", "No such file"]),
    ],
)
def test_bad_input_is_one_message(argument, words):
    text = message([argument])
    assert "\n" not in text
    for word in words:
        assert word in text


def test_a_secret_argument_is_not_repeated():
    assert "hf_secret" not in message(["HF_TOKEN=hf_secret"])


@pytest.mark.parametrize("content", ["- 1\n", "TP: [1]\n", "a: b: c\n", "\x00"])
def test_yaml_that_is_no_mapping_of_keys(tmp_path, content):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    assert str(file) in message([str(file)])


def test_command_can_be_typed_and_keeps_secrets_out():
    request = read(
        "llama3", ["MODEL_SIZE=405", "LOG_DIR=a b", "DRY_RUN=1", "NCCL_DEBUG=INFO"], {"HF_TOKEN": "hf_x"}, ("NCCL_",)
    )
    line = request.command(NNODES=2)
    assert line == "MODEL_SIZE=405 LOG_DIR='a b' NCCL_DEBUG=INFO NNODES=2 bash examples/llama/train_llama3.sh"


def test_a_key_that_comes_twice_in_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("TP: 2\nPP: 2\nTP: 4\n")
    with pytest.raises(UsageError, match=f"^{file}: line 3: TP is named twice"):
        read("llama3", [str(file)], {})
