"""`megatron-rocm convert` between Hugging Face and Megatron: bit for bit, and one clear message for what is wrong."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, make, same, weights_of
from safetensors.torch import load_file, save_file

from megatron_rocm.checkpoint import manifest
from megatron_rocm.checkpoint.convert.from_huggingface import FromHuggingFace
from megatron_rocm.checkpoint.convert.from_megatron import FromMegatron
from megatron_rocm.checkpoint.convert.table import weights
from megatron_rocm.checkpoint.convert.to_megatron import write_checkpoint
from megatron_rocm.cli import main
from megatron_rocm.platform.disk import to_ourselves


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        shutil.copytree(tokenizer, make(family, root / family), dirs_exist_ok=True)
    return root


def convert(direction: str, source: Path | str, out: Path, *options: str) -> int:
    return main(["convert", direction, str(source), str(out), "--no-verify", *options])


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_bit_for_bit(models, tmp_path, family):
    source, there, back = models / family, tmp_path / "megatron", tmp_path / "hf"
    assert convert("hf-to-megatron", source, there) == convert("megatron-to-hf", there, back) == 0
    assert same(weights_of(source), weights_of(back))
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names <= {path.name for path in back.iterdir()}
    for name in names:
        assert (back / name).read_bytes() == (source / name).read_bytes() or name == "config.json"
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"megatron", "hf"}


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_a_converted_checkpoint_is_whole_and_what_torch_reads(models, tmp_path):
    """Read by torch's own reader, from the tensors' bytes to their places; and every byte as the manifest has it."""
    import torch.distributed.checkpoint as dcp

    write_checkpoint(FromHuggingFace(models / "llama3.1"), tmp_path / "out")
    folder = tmp_path / "out/iter_0000000"
    assert manifest.faults(folder, full=True) == []
    listed = manifest.read(folder)
    assert {*listed, manifest.MANIFEST} == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    }
    size = (4, 320, 64)
    state = {"decoder.layers.mlp.linear_fc1.weight": torch.zeros(size, dtype=torch.bfloat16)}
    dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    theirs = weights_of(models / "llama3.1")
    for layer, found in enumerate(state["decoder.layers.mlp.linear_fc1.weight"]):
        halves = [theirs[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(found, torch.cat(halves))


def test_a_remote_checkpoint_comes_without_what_holds_no_weights(models, tmp_path, capsys):
    """Of an fsspec address: file:// is one."""
    store = write_checkpoint(FromHuggingFace(models / "llama3.1"), tmp_path / "store")
    folder = store / "iter_0000000"
    (folder / "__1_0.distcp").write_bytes(b"moments")
    manifest.write(folder, {**manifest.read(folder), **manifest.described(folder, "__1_0.distcp")})
    assert convert("megatron-to-hf", f"file://{store}", tmp_path / "hf") == 0
    assert "(1 files," in capsys.readouterr().out  # of the two
    assert (
        same(weights_of(models / "llama3.1"), weights_of(tmp_path / "hf"))
        and (tmp_path / "hf/tokenizer.json").is_file()
    )
    assert {path.name for path in tmp_path.iterdir()} == {"store", "hf"}
    assert "no whole checkpoint" in failed(capsys, "megatron-to-hf", f"file://{tmp_path}/nothing", tmp_path / "out")


def test_large_tensors_lie_in_several_parts_and_files(models, tmp_path, monkeypatch):
    from megatron_rocm.checkpoint.convert import torch_dist_writer

    monkeypatch.setattr(torch_dist_writer, "MOST_PART", 3000)
    monkeypatch.setattr(torch_dist_writer, "MOST_FILE", 50_000)
    out = write_checkpoint(FromHuggingFace(models / "codellama"), tmp_path / "out")
    assert len(list((out / "iter_0000000").glob("*.distcp"))) > 3
    assert convert("megatron-to-hf", out, tmp_path / "hf") == 0
    assert same(weights_of(models / "codellama"), weights_of(tmp_path / "hf"))


def test_pytorch_model_bin(models, tmp_path):
    folder = shutil.copytree(models / "llama2", tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors*"))
    whole = weights_of(models / "llama2")
    names = sorted(whole)
    places = {}
    for number, part in enumerate((names[:20], names[20:])):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save({name: whole[name] for name in part}, folder / file)
        places.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    one = FromMegatron(write_checkpoint(FromHuggingFace(folder), tmp_path / "one"))
    other = FromHuggingFace(models / "llama2")
    assert all(same(one.tensors(weight), other.tensors(weight)) for weight in weights(one.model))


def test_dtype(models, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert("hf-to-megatron", models / "llama3.2", out, "--dtype", "bf16") == 0
    assert convert("megatron-to-hf", out, tmp_path / "hf", "--dtype", "fp32") == 0
    before, after = weights_of(models / "llama3.2"), weights_of(tmp_path / "hf")
    assert all(torch.equal(after[name], before[name].bfloat16().float()) for name in before)
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "float32"
    copy = editable(models, "llama3", tmp_path)
    change(copy, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    assert "FP16 can't hold" in failed(capsys, "hf-to-megatron", copy, tmp_path / "fp16", "--dtype", "fp16")


def test_an_existing_destination(models, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert "--overwrite" in failed(capsys, "hf-to-megatron", models / "llama3", out)
    assert "not a converted checkpoint" in failed(capsys, "hf-to-megatron", models / "llama3", out, "--overwrite")
    assert (out / "mine.txt").read_text() == "precious"
    (out / "mine.txt").unlink()
    assert convert("hf-to-megatron", models / "llama3", out) == 0
    assert convert("hf-to-megatron", models / "llama2", out, "--overwrite") == 0
    (out / "iter_0000010").mkdir()
    assert "a run's, with iter_0000010" in failed(capsys, "hf-to-megatron", models / "llama3", out, "--overwrite")
    assert FromMegatron(out).model.family == "llama2"


def editable(models: Path, family: str, tmp_path: Path) -> Path:
    return shutil.copytree(models / family, tmp_path / "copy")


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def describe(folder: Path, edit) -> None:
    """Change a file's header."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def configure(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def failed(capsys, direction: str, source: Path | str, out: Path, *options: str) -> str:
    """The one line of a conversion that must fail, with nothing left under the destination's name."""
    before = {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}
    capsys.readouterr()
    assert convert(direction, source, out, *options) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and not said.out
    assert {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}.keys() == before.keys()
    return said.err


FAULTS = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights here"),
    "cut": (lambda folder: os.truncate(folder / "model.safetensors", 90_000), "damaged or truncated"),
    "cut within the header": (lambda folder: os.truncate(folder / "model.safetensors", 100), "damaged or truncated"),
    "empty": (lambda folder: os.truncate(folder / "model.safetensors", 0), "is empty"),
    "no safetensors": (lambda folder: (folder / "model.safetensors").write_bytes(b"{" * 4000), "damaged or truncated"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "a tensor missing": (
        lambda folder: change(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight")),
        "holds no model.layers.2.mlp.up_proj.weight",
    ),
    "wrong shape": (lambda folder: configure(folder, intermediate_size=192), "has shape (160, 64)"),
    "integers": (
        lambda folder: change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).int()})),
        "is of type I32",
    ),
    "two types in one": (
        lambda folder: change(
            folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64),
                "model.layers.1.input_layernorm.weight": torch.ones(64)})
        ),
        "--dtype",
    ),
    "another model": (lambda folder: configure(folder, model_type="mistral"), 'only "llama"'),
    "biases": (lambda folder: configure(folder, attention_bias=True), "attention_bias is true"),
    "another rope": (
        lambda folder: configure(folder, rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}),
        "only Llama 3.1's",
    ),
    "no size": (lambda folder: configure(folder, head_dim=-16), "kv_channels is -16"),
    "no groups": (lambda folder: configure(folder, num_key_value_heads=3), "4 attention heads for 3 key-value heads"),
    "no number": (lambda folder: configure(folder, rms_norm_eps=None), "norm_eps: Input should be a valid number"),
    "no rope": (lambda folder: configure(folder, rope_parameters="x"), "does not describe a Llama"),
    "half a rope": (lambda folder: configure(folder, partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "a broken base": (lambda folder: configure(folder, rope_parameters={"rope_theta": 10.5}), "10.5, and should be"),
    "fewer layers": (
        lambda folder: configure(folder, num_hidden_layers=3),
        "holds model.layers.3.input_layernorm.weight and 8 more, which the configuration has no place for",
    ),
    "a bias": (
        lambda folder: change(folder, lambda tensors: tensors.update({"model.norm.bias": torch.ones(64)})),
        "holds model.norm.bias, which",
    ),
    "a tie that is none": (lambda folder: configure(folder, tie_word_embeddings=True), "config.json ties them"),
    "a shape of no numbers": (
        lambda folder: describe(folder, lambda header: header["model.norm.weight"].update(shape=[64.0])),
        "model.norm.weight has shape [64.0]",
    ),
    "a negative shape": (
        lambda folder: describe(folder, lambda header: header["model.norm.weight"].update(shape=[-64, -1])),
        "model.norm.weight has shape [-64, -1]",
    ),
}  # fmt: skip


def test_tensors_that_nobody_reads(models, tmp_path):
    """A table of the rotary embedding, as older files have one a layer, and the embedding a second time."""
    copy = editable(models, "llama3.2", tmp_path)
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(4)}
    change(copy, lambda tensors: tensors.update(extra))
    change(copy, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert convert("hf-to-megatron", copy, tmp_path / "out") == 0
    assert convert("megatron-to-hf", tmp_path / "out", tmp_path / "hf") == 0
    assert same(weights_of(models / "llama3.2"), weights_of(tmp_path / "hf"))


def test_a_destination_never_costs_a_source(models, tmp_path, capsys):
    source = shutil.copytree(models / "llama3", tmp_path / "hf")
    assert convert("hf-to-megatron", source, source / "megatron") == 0
    inner = source / "megatron/iter_0000000"
    assert "holds the source" in failed(capsys, "megatron-to-hf", source / "megatron", source, "--overwrite")
    other = write_checkpoint(FromHuggingFace(models / "llama2"), tmp_path / "other")
    assert "with the folders megatron" in failed(capsys, "megatron-to-hf", other, source, "--overwrite")
    assert "lies in a checkpoint" in failed(capsys, "megatron-to-hf", other, inner / "huggingface", "--overwrite")
    assert convert("megatron-to-hf", other, other / "hf") == 0
    assert "with hf" in failed(capsys, "hf-to-megatron", models / "llama3", other, "--overwrite")
    assert manifest.faults(inner, full=True) == []


def test_two_conversions_to_one_destination(models, tmp_path, capsys):
    out = tmp_path / "out"
    with to_ourselves(str(out), "destination"):
        assert "another run is writing there" in failed(capsys, "hf-to-megatron", models / "llama3", out)
    assert convert("hf-to-megatron", models / "llama3", out) == 0


def test_a_destination_that_is_no_plain_folder(models, tmp_path, capsys, monkeypatch):
    here = tmp_path / "with a space"
    here.mkdir()
    monkeypatch.chdir(here)
    assert "the current folder" in failed(capsys, "hf-to-megatron", models / "llama3", Path("."))
    (tmp_path / "link").symlink_to(here / "elsewhere")
    assert convert("hf-to-megatron", models / "llama3", tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink() and manifest.faults(here / "elsewhere/iter_0000000", full=True) == []
    assert main(["convert", "hf-to-megatron", str(models / "llama3"), "s3://bucket/path"]) == 2
    assert "only a checkpoint to read may be in a remote store" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_source(models, tmp_path, capsys, fault):
    copy = editable(models, "llama3", tmp_path)
    do, message = FAULTS[fault]
    do(copy)
    assert message in failed(capsys, "hf-to-megatron", copy, tmp_path / "out")


def test_a_missing_shard(models, tmp_path, capsys):
    copy = editable(models, "llama2", tmp_path)
    shards = sorted(copy.glob("*.safetensors"))
    shards[1].unlink()
    assert f"{shards[1].name} missing, of the {len(shards)} files" in failed(
        capsys, "hf-to-megatron", copy, tmp_path / "out"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("spare", [-50_000, 30_000], ids=["known before", "found out in writing"])
def test_a_full_disk(models, tmp_path, capsys, spare):
    size = (models / "llama3/model.safetensors").stat().st_size + spare
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    try:
        said = failed(capsys, "hf-to-megatron", models / "llama3", disk / "out")
        assert "make room" in said and ("are free" in said) == (spare < 0)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_read_only_place(models, capsys):
    assert "can't be written" in failed_there(capsys, models / "llama3", Path("/proc/out"))


def failed_there(capsys, source: Path, out: Path) -> str:
    capsys.readouterr()
    assert convert("hf-to-megatron", source, out) == 2
    return capsys.readouterr().err
