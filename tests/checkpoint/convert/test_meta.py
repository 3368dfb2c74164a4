"""Meta raw weights equal the same model's Hugging Face folder, however many files they are in."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from hf_models import make, same, weights_of
from meta_files import write

from megatron_rocm.checkpoint.convert import from_meta
from megatron_rocm.checkpoint.convert.from_huggingface import FromHuggingFace
from megatron_rocm.checkpoint.convert.from_megatron import FromMegatron
from megatron_rocm.checkpoint.convert.from_meta import FromMeta
from megatron_rocm.checkpoint.convert.table import weights
from megatron_rocm.checkpoint.convert.to_huggingface import write_huggingface
from megatron_rocm.checkpoint.convert.to_megatron import write_checkpoint
from megatron_rocm.errors import UsageError

# Family, its changes, ranks, and whether the embedding is cut by rows.
RELEASES = {
    "Llama 2, one file, no n_kv_heads": ("llama2", {}, 1, False),
    "Llama 2, two files, no n_kv_heads": ("llama2", {}, 2, False),
    "Llama 2, eight files, n_kv_heads": (
        "llama2", {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 320}, 8, False
    ),
    "Code Llama, four files, n_kv_heads": ("codellama", {"num_key_value_heads": 4, "num_attention_heads": 8}, 4, False),
    "Llama 3.1, two files": ("llama3.1", {"max_position_embeddings": 131_072}, 2, True),
}  # fmt: skip

SENTENCEPIECE = b"\n\x07\n\x05<unk>\n\x05\n\x03<s>\n\x06\n\x04</s>"  # of three pieces


def release(root: Path, name: str) -> tuple[Path, Path]:
    family, changes, ranks, rows = RELEASES[name]
    hf = make(family, root / "hf", **changes)
    return hf, write(weights_of(hf), json.loads((hf / "config.json").read_text()), root / "meta", ranks, rows)


@pytest.mark.parametrize("name", RELEASES)
def test_meta_to_megatron_equals_hugging_face_to_megatron(tmp_path, name):
    hf, meta = release(tmp_path, name)
    one = FromMegatron(write_checkpoint(FromHuggingFace(hf), tmp_path / "one"))
    other = FromMegatron(write_checkpoint(FromMeta(meta), tmp_path / "other"))
    assert one.model.model_copy(update={"init_std": 0.02}) == other.model
    for weight in weights(one.model):
        assert same(one.tensors(weight), other.tensors(weight)), weight


def test_meta_to_hugging_face(tmp_path):
    hf, meta = release(tmp_path, "Llama 3.1, two files")
    out = write_huggingface(FromMeta(meta), tmp_path / "out")
    assert same(weights_of(hf), weights_of(out))
    assert json.loads((out / "config.json").read_text())["rope_scaling"]["factor"] == 8.0


def test_what_metas_files_leave_open_is_as_published():
    """Llama 3.2's table is there twice, and its params.json does not tell the RoPE factor."""
    shape = {
        "num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32,
        "num_query_groups": 8, "kv_channels": 64, "vocab_size": 128_256, "max_position_embeddings": 8192,
        "rotary_base": 500_000, "rope_scaling_factor": 8.0, "tied_embeddings": False, "norm_eps": 1e-5,
    }  # fmt: skip
    model = from_meta.published(shape)
    assert (model.title, model.rope_scaling_factor, model.tied_embeddings) == ("Llama 3.2 1B", 32.0, True)
    assert model.max_position_embeddings == 131_072
    other = from_meta.published({**shape, "num_layers": 17})
    assert (other.rope_scaling_factor, other.tied_embeddings) == (8.0, False)


@pytest.fixture
def meta(tmp_path) -> Path:
    return release(tmp_path, "Code Llama, four files, n_kv_heads")[1]


def refused(meta: Path) -> str:
    out = meta.with_name("out")
    with pytest.raises(UsageError) as error:
        write_checkpoint(FromMeta(meta), out)
    assert not [path for path in out.parent.iterdir() if "out" in path.name]
    return str(error.value)


def test_a_file_that_is_missing(meta):
    (meta / "consolidated.03.pth").unlink()
    assert "3 are here" in refused(meta) and "a consolidated.*.pth is missing" in refused(meta)
    (meta / "consolidated.01.pth").unlink()
    assert "there is consolidated.00.pth, consolidated.02.pth" in refused(meta)
    (meta / "params.json").unlink()
    assert "no params.json" in refused(meta)


def test_a_file_that_is_cut_or_of_another_model(meta, tmp_path):
    path = meta / "consolidated.02.pth"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "consolidated.02.pth" in refused(meta) and "damaged or truncated" in refused(meta)
    path.write_bytes(whole)
    params = json.loads((meta / "params.json").read_text())
    (meta / "params.json").write_text(json.dumps({**params, "n_layers": 5}))
    assert "holds no layers.4." in refused(meta)
    (meta / "params.json").write_text(json.dumps({**params, "n_kv_heads": 2}))
    assert "wk.weight has shape" in refused(meta)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("output.weight", torch.tensor(1.0), "does not describe a Llama"),
        ("layers.0.attention.wo.weight", torch.ones(5), "of (5,) each"),
        ("layers.0.attention.wo.weight", torch.ones(5, 0), "of (5, 0) each"),
        ("layers.1.attention.wo.weight", torch.ones(5), "has shape (5,) in each of 4 files"),
        ("layers.0.attention.wq.bias", torch.ones(5), "holds layers.0.attention.wq.bias, which"),
    ],
)
def test_tensors_of_another_model(meta, name, tensor, message):
    for path in meta.glob("*.pth"):
        torch.save({**torch.load(path), name: tensor.bfloat16()}, path)
    assert message in refused(meta)


def test_nothing_in_a_file_is_executed(meta, tmp_path):
    mark = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    tensors = torch.load(meta / "consolidated.00.pth")
    torch.save({**tensors, "more": Evil()}, meta / "consolidated.00.pth")
    assert "names" in refused(meta) and not mark.exists()
    (meta / "consolidated.00.pth").write_bytes(pickle.dumps(tensors))
    assert "not an archive of weights" in refused(meta)


def test_llama_2_tokenizer_beside_the_sizes_goes_along(meta, tmp_path):
    (meta.parent / "tokenizer.model").write_bytes(SENTENCEPIECE)
    out = write_huggingface(FromMeta(meta), tmp_path / "with")
    assert (out / "tokenizer.model").is_file() and (out / "tokenizer_config.json").is_file()
    (meta.parent / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's format
    assert not (write_huggingface(FromMeta(meta), tmp_path / "without") / "tokenizer.model").exists()
