import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_rocm.checkpoint.convert.huggingface import llama_config
from megatron_rocm.checkpoint.convert.table import weights
from megatron_rocm.config.presets import PRESETS
from megatron_rocm.config.schema import Model
from megatron_rocm.plan.memory import count_parameters


def section(family: str, size: str) -> Model:
    preset = PRESETS[family, size]
    names = [name for name in Model.model_fields if hasattr(preset, name)]
    return Model.model_validate({
        **{name: getattr(preset, name) for name in names}, "family": family, "size": size,
        "kv_channels": preset.head_size, "padded_vocab_size": -(-preset.vocab_size // 1024) * 1024,
        "rope_scaling": preset.rope_scaling_factor is not None,
        "rope_scaling_factor": preset.rope_scaling_factor or 1.0,
    })  # fmt: skip


@pytest.mark.parametrize(("family", "size"), PRESETS)
def test_names_shapes_and_count_are_those_of_transformers(family, size):
    model = section(family, size)
    ours = {name: shape for weight in weights(model) for name, shape in weight.hugging_face_shapes(model).items()}
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**llama_config(model, dtype="float32", bos=None, eos=1)))
    expected = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    assert ours == expected
    # tests/plan/test_memory.py has the published counts as literals.
    assert theirs.num_parameters() == count_parameters(model)


def random_weights(model: Model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shapes = {name: shape for weight in weights(model) for name, shape in weight.hugging_face_shapes(model).items()}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True}, {"num_query_groups": 4}, {"num_query_groups": 1}])
def test_round_trip_is_exact(shape, changes, dtype):
    model = shape(**changes)
    theirs = random_weights(model, dtype)
    back = {}
    for weight in weights(model):
        ours = torch.cat(tuple(weight.to_megatron(theirs, model)))
        assert ours.shape == weight.row.shape(model) and ours.dtype == dtype
        back.update(weight.to_hugging_face(ours, model))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) and back[name].dtype == dtype for name in theirs)


def test_query_groups_are_interleaved(shape):
    """Two groups of two heads, 16 rows each: query 0, query 1, key 0, value 0, query 2, query 3, key 1, value 1."""
    model = shape()
    qkv = next(weight for weight in weights(model) if weight.megatron.endswith("0.self_attention.linear_qkv.weight"))
    rows = torch.arange(8 * 16).unsqueeze(1).expand(-1, model.hidden_size)
    q, k, v = (part[::16, 0].tolist() for part in qkv.to_hugging_face(rows, model).values())
    assert (q, k, v) == ([0, 16, 64, 80], [32, 96], [48, 112])


def test_gate_lies_above_up_and_padding_is_cut(shape):
    model = shape()
    by_name = {weight.megatron: weight for weight in weights(model)}
    fc1 = torch.arange(2 * 96).unsqueeze(1).expand(-1, 64)
    gate, up = by_name["decoder.layers.1.mlp.linear_fc1.weight"].to_hugging_face(fc1, model).values()
    assert (gate[0, 0], up[0, 0]) == (0, 96)
    table = torch.ones(512, 64)
    (cut,) = by_name["output_layer.weight"].to_hugging_face(table, model).values()
    assert cut.shape == (500, 64)
    padded = torch.cat(tuple(by_name["output_layer.weight"].to_megatron({"lm_head.weight": cut}, model)))
    assert padded[:500].eq(1).all() and padded[500:].eq(0).all()


def test_local_layers_differ_from_transformer_engines_in_the_norms_names_alone(shape):
    different = {weight.local for weight in weights(shape(num_layers=1)) if weight.local != weight.megatron}
    assert different == {"decoder.layers.0.input_layernorm.weight", "decoder.layers.0.pre_mlp_layernorm.weight"}


def test_a_tied_model_has_no_output_layer(shape):
    names = {weight.megatron for weight in weights(shape(tied_embeddings=True))}
    assert "output_layer.weight" not in names and "embedding.word_embeddings.weight" in names


def test_a_wrong_shape_is_refused(shape):
    model = shape()
    embedding = next(weights(model))
    with pytest.raises(ValueError, match=r"word_embeddings.*\(500, 64\).*\(512, 64\)"):
        embedding.to_hugging_face(torch.zeros(500, 64), model)
    with pytest.raises(ValueError, match="embed_tokens"):
        embedding.to_megatron({"model.embed_tokens.weight": torch.zeros(512, 64)}, model)
