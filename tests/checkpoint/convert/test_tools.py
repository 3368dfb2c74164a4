"""Other systems' command lines for converting, as people type them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hf_models import make, same, weights_of
from meta_files import write
from support import ROOT, environment

from megatron_rocm.checkpoint.convert import verifying
from megatron_rocm.checkpoint.convert.from_megatron import FromMegatron
from megatron_rocm.checkpoint.convert.llemma import main as llemma
from megatron_rocm.checkpoint.convert.nemo import CONFIGS, hf_to_nemo2, nemo2_to_hf
from megatron_rocm.config.presets import PRESETS
from megatron_rocm.errors import UsageError

NEOX = """
  # a GPT-NeoX configuration is JSON with comments, or YAML
  "num-layers": 4,
  "hidden_size": 64,
  "num_attention_heads": 8,
  "attention_type": "groupedquery",
  "num_kv_heads": 4,
  "rotary_emb_base": 10000,
  "vocab_file": "tokenizer.model",
"""


@pytest.fixture(autouse=True)
def unverified(monkeypatch):
    """A process group of its own is not for this process; test_export.py verifies."""
    monkeypatch.setattr(verifying, "beyond_memory", lambda model: "a test")


@pytest.fixture
def release(tmp_path) -> Path:
    """As Meta's repository of Code Llama, with the folder of one size in it."""
    hf = make("codellama", tmp_path / "hf", num_key_value_heads=4, num_attention_heads=8)
    config = json.loads((hf / "config.json").read_text())
    write(weights_of(hf), config, tmp_path / "codellama" / "7B", 2, False)
    (tmp_path / "llemma.yml").write_text("{" + NEOX + "}")
    return tmp_path


def words(root: Path, *more: str) -> list[str]:
    return [
        f"--input_dir={root / 'codellama'}",
        f"--config_file={root / 'llemma.yml'}",
        f"--output_dir={root / 'out'}",
        *more,
    ]


def test_llemma(release, capsys):
    assert llemma(words(release, "--num_output_shards", "2")) == 0
    said = capsys.readouterr().out
    assert "rotary_emb_base is 10000" in said and "not verified: a test" in said
    converted = FromMegatron(release / "out")
    assert converted.model.rotary_base == 10_000 and converted.model.num_query_groups == 4


@pytest.mark.parametrize(
    ("edit", "more", "message"),
    [
        (("4,", "5,"), (), "none of .*7B with the 5 layers"),
        (('"num_kv_heads": 4', '"num_kv_heads": 8'), (), "num_kv_heads 8 there, 4 here"),
        (('"hidden_size"', "[["), (), "is no YAML"),
        (("", ""), ("--num_output_shards=3",), "--num_output_shards 3"),
        (("", ""), ("--config_file=/nowhere.yml",), "/nowhere.yml: can't be read"),
        (("", ""), ("--input_dir=/proc",), "neither here nor in a folder"),
    ],
)
def test_llemma_refusals(release, edit, more, message):
    path = release / "llemma.yml"
    path.write_text(path.read_text().replace(*edit, 1) if edit[0] else path.read_text())
    with pytest.raises(UsageError, match=message):
        llemma(words(release, *more))
    assert not (release / "out").exists()


def test_nemo(tmp_path):
    source = make("llama3.1", tmp_path / "hf")
    there, back = tmp_path / "nemo2", tmp_path / "back"
    flags = ["--source", str(source), "--output-path", str(there), "--model-name", "LlamaModel"]
    assert hf_to_nemo2(flags) == 0
    with pytest.raises(UsageError, match="--overwrite"):
        hf_to_nemo2(flags)
    assert hf_to_nemo2([*flags, "--overwrite"]) == 0
    assert nemo2_to_hf(["--source", str(there), "--output-path", str(back)]) == 0
    assert same(weights_of(source), weights_of(back))
    with pytest.raises(UsageError, match="holds another model: num_layers 4 instead of 32"):
        hf_to_nemo2([*flags, "--model-config-name", "Llama31Config8B"])
    with pytest.raises(UsageError, match="did you mean Llama31Config8B"):
        hf_to_nemo2([*flags, "--model-config-name", "Llama31Config-8B"])
    (tmp_path / "real/weights").mkdir(parents=True)
    with pytest.raises(UsageError, match="NeMo's own checkpoint"):
        nemo2_to_hf(["--source", str(tmp_path / "real"), "--output-path", str(back)])


def test_nemos_names_are_of_presets():
    assert all((family, size) in PRESETS for family, size, _ in CONFIGS.values())


@pytest.mark.parametrize(
    "name", ["convert_hf_to_megatron", "convert_megatron_to_hf", "convert_from_hf_to_nemo2", "convert_from_nemo2_to_hf",
             "convert_raw_llama_weights_to_hf"],
)  # fmt: skip
def test_a_script_answers_and_refuses(name):
    script = ROOT / "tools" / f"{name}.py"
    helped = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, env=environment())
    assert helped.returncode == 0 and "usage:" in helped.stdout
    refused = subprocess.run([sys.executable, script, "--nonsense"], capture_output=True, text=True, env=environment())
    assert refused.returncode == 2 and refused.stderr.startswith("megatron-rocm: ") and refused.stderr.count("\n") == 1
