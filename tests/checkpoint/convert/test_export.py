import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_rocm.checkpoint.convert.command import main
from megatron_rocm.checkpoint.convert.from_megatron import FromMegatron
from megatron_rocm.checkpoint.convert.generate import generate
from megatron_rocm.checkpoint.convert.to_huggingface import write_huggingface
from megatron_rocm.errors import UsageError

NAMES = ("grouped", "tied", "llama2", "layers_apart")


def export(source: Path, out: Path, iteration: int | None = None, **options) -> Path:
    return write_huggingface(FromMegatron(source, iteration), out, **options)


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    for name in NAMES:
        export(checkpoints / name, root / name)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_what_megatron_core_computes(checkpoints, exported, name):
    ids, logits = torch.load(checkpoints / name / "logits.pt")
    model = AutoModelForCausalLM.from_pretrained(exported / name).eval()
    assert model.dtype == (torch.bfloat16 if name == "llama2" else torch.float32)
    with torch.no_grad():
        theirs = model(ids).logits
    ours = logits[..., : model.config.vocab_size]
    # BF16 has 8 bits: rounding shows at about a hundredth of the logits' size.
    tolerance = (0.03 if name == "llama2" else 1e-5) * ours.abs().max()
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < tolerance


def test_configuration_says_what_transformers_needs(exported):
    config = json.loads((exported / "tied/config.json").read_text())
    assert config["rope_scaling"] == {
        "factor": 32.0, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert (config["rope_theta"], config["tie_word_embeddings"], config["head_dim"]) == (500_000, True, 32)
    assert json.loads((exported / "llama2/config.json").read_text())["rope_scaling"] is None
    assert AutoConfig.from_pretrained(exported / "grouped").bos_token_id == 0


def test_tied_weights_are_written_once(exported):
    with safe_open(exported / "tied/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_tokenizer_goes_along_and_text_is_generated(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported / "grouped")
    assert tokenizer("w3 w4").input_ids == [5, 6]
    lines = generate(exported / "grouped", ["w3 w4"], tokens=4)
    assert lines[0].startswith("w3 w4") and lines == generate(exported / "grouped", ["w3 w4"], tokens=4)
    assert lines != generate(exported / "grouped", ["w3 w4"], tokens=4, seed=2)


def test_shards_and_index(checkpoints, exported, tmp_path):
    out = export(checkpoints / "grouped", tmp_path / "sharded", max_shard_bytes=100_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    single, several = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (exported / "grouped", out))
    assert all(torch.equal(single[name], several[name]) for name in single)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in single.values())
    assert not [path for path in tmp_path.iterdir() if path != out]


VERIFY = """
import sys
from pathlib import Path
from megatron_rocm.checkpoint.convert.command import main
source, out, wrong = sys.argv[1:]
print("status", main(["megatron-to-hf", source, out]))
from megatron_rocm.checkpoint.convert.from_megatron import FromMegatron
from megatron_rocm.checkpoint.convert.verifying import verify
print("wrong", verify(FromMegatron(source), Path(wrong)))
"""


def test_verify_finds_agreement_and_a_wrong_configuration(checkpoints, exported, tmp_path):
    """In a process of its own: it makes a process group. Rotary scaling left out is the subtlest of faults."""
    wrong = shutil.copytree(exported / "grouped", tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "rope_scaling": None}))
    command = [sys.executable, "-c", VERIFY, checkpoints / "grouped", tmp_path / "right", wrong]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    _, right, status, differs = done.stdout.splitlines() or ["", "", "", done.stderr]
    assert right.startswith("the two sides agree at all 6 places") and "100.0%" in right and status == "status 0"
    assert differs.startswith("wrong the two sides DIFFER, first at layer 1")


def test_a_destination_in_use_is_kept(checkpoints, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="not empty.*--overwrite"):
        export(checkpoints / "tied", tmp_path)
    with pytest.raises(UsageError, match="not a Hugging Face folder"):
        export(checkpoints / "tied", tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    out = export(checkpoints / "tied", tmp_path / "hf")
    (out / "old.txt").write_text("")
    export(checkpoints / "llama2", out, overwrite=True)
    assert not (out / "old.txt").exists() and json.loads((out / "config.json").read_text())["vocab_size"] == 512


@pytest.fixture
def copy(checkpoints, tmp_path) -> Path:
    return shutil.copytree(checkpoints / "grouped", tmp_path / "run")


def refused(source: Path, **options) -> str:
    out = source.with_name("out")
    with pytest.raises(UsageError) as error:
        export(source, out, **options)
    assert [path.name for path in out.parent.iterdir() if path.name.lstrip(".").startswith("out")] == []
    return str(error.value)


def change(folder: Path, section: str, **fields) -> None:
    path = folder / "iter_0000003/common.pt"
    common = torch.load(path)
    common["run"][section].update(fields)
    torch.save(common, path)


def test_an_iteration_that_is_not_there(copy, tmp_path):
    assert "there is iter_0000003" in refused(copy, iteration=5)
    (copy / "latest_checkpointed_iteration.txt").unlink()
    assert "choose one of iter_0000003" in refused(copy)
    assert "no checkpoint here" in refused(tmp_path)
    assert export(copy / "iter_0000003", tmp_path / "hf").is_dir()


def test_damage(copy):
    for path in copy.glob("iter_0000003/*.distcp"):
        path.write_bytes(path.read_bytes()[:5000])
    assert "damaged where embedding" in refused(copy) and "--iteration" in refused(copy)
    for path in copy.glob("iter_0000003/*.distcp"):
        path.unlink()
    assert "can't be read (No such file" in refused(copy) and "--iteration" in refused(copy)


def test_a_configuration_of_another_model(copy):
    change(copy, "model", ffn_hidden_size=100)
    assert "linear_fc1.weight has shape (192, 64)" in refused(copy)
    change(copy, "model", ffn_hidden_size=96, num_layers=4)
    assert "has 3 layers, the model more" in refused(copy)
    path = copy / "iter_0000003/common.pt"
    path.write_bytes(path.read_bytes()[:100])
    assert "common.pt: not what torch.save writes" in refused(copy)


def test_a_tokenizer_that_moved(copy, tokenizer, tmp_path):
    gone = str(tmp_path / "gone")
    change(copy, "data", tokenizer_model=gone)
    assert gone in refused(copy) and "--tokenizer" in refused(copy)
    assert (export(copy, tmp_path / "hf", tokenizer=str(tokenizer)) / "tokenizer.json").is_file()
    change(copy, "data", tokenizer_model=str(tokenizer), eod=7)
    assert "ends documents with 1" in refused(copy)


def test_the_command(checkpoints, tmp_path, capsys):
    words = ["megatron-to-hf", str(checkpoints / "tied"), str(tmp_path / "hf"), "--iteration", "3", "--no-verify"]
    assert main(words) == 0
    assert str(tmp_path / "hf") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hf-to-megatron", "a", "b", "--iteration", "3"], "--iteration is of a run"),
        (["meta-to-megatron", "a", "b", "--dtype", "int8"], "--dtype"),
        (["sideways", "a", "b"], "no such direction"),
        (["megatron-to-hf", "a"], "destination"),
        (["megatron-to-hf", "a", "b", "--iteration", "x"], "--iteration"),
    ],
)
def test_refusals_of_the_command(words, message):
    with pytest.raises(UsageError, match=message):
        main(words)
