"""Fields of megatron-core's own classes, by name."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_rocm
from megatron_rocm.config import core_fields
from megatron_rocm.errors import UsageError


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("core.transformer.qk_layernorm", "1", True),
        ("core.transformer.attention_softmax_in_fp32", "false", False),
        ("core.transformer.layernorm_zero_centered_gamma", "0", False),
        ("core.transformer.softmax_scale", "0.5", 0.5),
        ("core.transformer.tp_comm_overlap", "1", True),
        ("core.optimizer.decoupled_lr", "0.5", 0.5),
        ("core.ddp.bucket_size", "1000", 1000),
        ("core.ddp.bucket_size", "None", None),
    ],
)
def test_values_take_the_fields_type(name, text, value):
    assert core_fields.value(name, text) == value


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("core.transformer.qk_layernrom", "1", ["no such field", "qk_layernorm"]),
        ("core.transformer.num_layers", "3", ["sets this field itself", "MODEL_SIZE"]),
        ("core.transformer.tp_comm_overlap", "maybe", ["must be of type bool"]),
        ("core.ddp.bucket_size", "x", ["must be of type Optional[int]"]),
        ("core.transformer.activation_func", "x", ["itself"]),
        ("core.transformer.init_method", "x", ["can't be given as text"]),
        ("core.optimiser.lr", "1", ["core.optimizer.<field>"]),
        ("core.transformer", "1", ["core.transformer.<field>"]),
    ],
)
def test_bad_input_is_one_message(name, text, words):
    with pytest.raises(UsageError) as caught:
        core_fields.value(name, text)
    for word in words:
        assert word in str(caught.value)


def test_fields_are_the_classes_own():
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    for kind, of in (
        ("transformer", TransformerConfig),
        ("optimizer", OptimizerConfig),
        ("ddp", DistributedDataParallelConfig),
    ):
        assert set(core_fields.fields(kind)) == {field.name for field in dataclasses.fields(of)}


def test_what_a_run_sets_itself_is_known():
    tree = ast.parse((Path(megatron_rocm.__file__).parent / "model/build.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    for kind, names in core_fields.CLASSES.items():
        (call,) = [call for call in calls if call.func.id == names[-1]]
        assert {keyword.arg for keyword in call.keywords if keyword.arg} <= set(core_fields.OURS[kind])


def test_torch_is_not_imported():
    code = "import sys, megatron_rocm.config.core_fields as it; it.fields('ddp'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
