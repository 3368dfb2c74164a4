"""Parameter counts and the lower bound."""

import pytest

from megatron_rocm.config import PRESETS, read
from megatron_rocm.plan.flops import flops_per_token
from megatron_rocm.plan.memory import count_parameters, layers_per_chunk, lower_bound, parameters_per_process
from megatron_rocm.platform.machine import find
from megatron_rocm.resolve import resolve

# The models' cards; the vocabulary's padding apart.
PUBLISHED = {
    ("llama2", "7"): 6_738_415_616,
    ("llama2", "13"): 13_015_864_320,
    ("llama2", "70"): 68_976_648_192,
    ("llama2", "code7"): 6_738_546_688,
    ("llama2", "code13"): 13_016_028_160,
    ("llama2", "code34"): 33_743_970_304,
    ("llama3", "8"): 8_030_261_248,
    ("llama3", "70"): 70_553_706_496,
    ("llama3", "405"): 405_853_388_800,
    ("llama3", "1"): 1_235_814_400,
    ("llama3", "3"): 3_212_749_824,
}


def run(family, *arguments, target="mi300x"):
    return resolve(read(family, arguments, {}), find(target), dry_run=True).config


def roomy(size):
    return ("NNODES=16",) if size == "405" else ()


@pytest.mark.parametrize(("family", "size"), PUBLISHED)
def test_published_counts(family, size):
    assert count_parameters(run(family, f"MODEL_SIZE={size}", *roomy(size)).model) == PUBLISHED[family, size]


def test_every_published_preset_is_counted():
    assert {key for key in PRESETS if key[1] != "tiny"} == set(PUBLISHED)


@pytest.mark.parametrize("vpp", [1, 8])
def test_126_layers_over_8_stages(vpp):
    chunks = layers_per_chunk(126, 8, vpp, count_embedding_and_loss=True)
    assert [sum(stage) for stage in chunks] == [15, 16, 16, 16, 16, 16, 16, 15]
    assert layers_per_chunk(126, 8, vpp, count_embedding_and_loss=False) is None


def test_processes_hold_the_whole_model_between_them():
    whole = run("llama3", "MODEL_SIZE=8", "TP=1", "GPUS_PER_NODE=1")
    assert parameters_per_process(whole) == count_parameters(whole.model, padded=True)
    split = run("llama3", "MODEL_SIZE=8", "TP=8")
    # Norms are whole on each TP rank, the rest is divided.
    norms = (2 * 32 + 1) * 4096
    padded = count_parameters(split.model, padded=True)
    assert parameters_per_process(split) == (padded - norms) // 8 + norms


def test_bytes_of_bf16_adam_over_two_replicas():
    config = run("llama3", "MODEL_SIZE=8", "TP=4", "GPUS_PER_NODE=8")
    bound = lower_bound(config)
    assert (bound.weights, bound.gradients, bound.optimizer) == tuple(bound.parameters * n for n in (2, 4, 6))


def test_flops_are_those_that_published_figures_use():
    config = run("llama3", "MODEL_SIZE=8", "SEQ_LENGTH=8192")
    # Megatron-Bridge's H100 table: 744 TFLOP/s/GPU at 14,451 tokens/s/GPU, 725 at 14,079.
    assert flops_per_token(config) == pytest.approx(744e12 / 14_451, rel=0.005)
    assert flops_per_token(config) == pytest.approx(725e12 / 14_079, rel=0.005)
