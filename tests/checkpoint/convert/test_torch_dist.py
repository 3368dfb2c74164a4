import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_rocm.checkpoint.convert.table import weights
from megatron_rocm.checkpoint.convert.torch_dist import TorchDist
from megatron_rocm.errors import UsageError

TE = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
NORMS = torch.arange(3 * 64).reshape(3, 64).to(torch.bfloat16)

# The same three norms as each kind of layer, and each way to keep layers, names them.
STATES = {
    "Transformer Engine's, stacked": {TE: NORMS},
    "local, stacked": {"decoder.layers.input_layernorm.weight": NORMS},
    "Transformer Engine's, apart": {TE.replace("layers.", f"layers.{i}."): NORMS[i] for i in range(3)},
    "local, apart": {f"decoder.layers.{i}.input_layernorm.weight": NORMS[i] for i in range(3)},
}


@pytest.fixture
def written(tmp_path):
    def write(state) -> TorchDist:
        save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
        return TorchDist(tmp_path)

    return write


def find(model, ending):
    return [weight for weight in weights(model) if weight.megatron.endswith(ending)]


@pytest.mark.filterwarnings("ignore:torch.distributed")
@pytest.mark.parametrize("how", STATES)
def test_a_layer_is_found_however_it_is_kept(written, shape, how):
    checkpoint = written(STATES[how])
    for layer, weight in enumerate(find(shape(), "linear_qkv.layer_norm_weight")):
        read = checkpoint.read(weight)
        assert torch.equal(read, NORMS[layer]) and read.dtype == checkpoint.dtype(weight) == torch.bfloat16


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_gate_and_up_apart_are_put_together(written, shape):
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    checkpoint = written({name + "_w": torch.zeros(2, 4), name + "_v": torch.ones(2, 4)})
    assert checkpoint.read(find(shape(), name)[0])[:, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_what_is_missing_is_named(written, shape):
    checkpoint = written(STATES["local, stacked"])
    with pytest.raises(UsageError, match=r"holds no decoder\.final_layernorm\.weight"):
        checkpoint.read(find(shape(), "final_layernorm.weight")[0])
    checkpoint._tensors["decoder.layers.input_layernorm.weight"].chunks.clear()
    with pytest.raises(UsageError, match=r"incomplete \(0 of 64 elements\)"):
        checkpoint.read(find(shape(), "linear_qkv.layer_norm_weight")[0])
