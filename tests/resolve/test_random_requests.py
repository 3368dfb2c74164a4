"""Whatever is typed ends in a RunConfig that megatron-core's own classes accept, or in one message."""

import datetime

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rocm.config import RunConfig, read
from megatron_rocm.config.blend import PATH_VARIABLES
from megatron_rocm.config.others import OTHERS
from megatron_rocm.config.schema import variables
from megatron_rocm.errors import UsageError
from megatron_rocm.launch import dry_run
from megatron_rocm.model.build import ddp_config, optimizer_config, transformer_config
from megatron_rocm.plan.memory import layers_per_chunk, lower_bound
from megatron_rocm.platform.machine import GIB, TARGETS, Gpu, Machine, find
from megatron_rocm.platform.settings import LIBRARY_PREFIXES
from megatron_rocm.resolve import resolve

NOON = datetime.datetime(2026, 1, 2, 12)
FILES = (*PATH_VARIABLES, "TOKENIZER_MODEL")
NAMES = [v.name for v in variables() if v.name not in FILES] + [o.name for o in OTHERS]
SIZES = ["tiny", "1", "3", "7", "8", "13", "34", "70", "405", "code7", "code34", "8B", "70b"]

# Values that make sense, so that many requests get past the parser, and values that don't.
SENSIBLE = {
    "MODEL_SIZE": st.sampled_from(SIZES),
    "TARGET": st.sampled_from([*TARGETS, "cpu", ""]),
    "PRECISION": st.sampled_from(["bf16", "fp32", "fp16"]),
    "OPTIMIZER": st.sampled_from(["adam", "sgd"]),
    "SPLIT": st.sampled_from(["99,1,0", "1,0,0", "98,1.5,0.5", "0,1"]),
    "LR": st.floats(1e-6, 1).map(str),
    "MIN_LR": st.floats(0, 1e-3).map(str),
    "SEQ_LENGTH": st.sampled_from(["256", "512", "2048", "8192", "131072", "255", "1"]),
}
SENSIBLE |= {
    "RECOMPUTE_GRANULARITY": st.sampled_from(["full", "selective"]),
    "RECOMPUTE_METHOD": st.sampled_from(["block", "uniform"]),
    "RECOMPUTE_MODULES": st.sampled_from(["core_attn", "core_attn,mlp", "mlp"]),
    "RAMPUP_BATCH_SIZE": st.sampled_from(["8 8 100", "16,16,1000", "1 1 0"]),
    "GEMM_TUNING": st.sampled_from(["0", "1", "tuned.json"]),
    "LR_DECAY_STYLE": st.sampled_from(["cosine", "linear", "constant", "WSD"]),
    "LR_WSD_DECAY_STYLE": st.sampled_from(["exponential", "linear", "cosine", "minus_sqrt"]),
    "ALLOW_CHANGE": st.sampled_from(["SEED", "SEED,DATA_PATH", "LR"]),
    "NAN_POLICY": st.sampled_from(["warn", "skip", "stop", "rollback"]),
    "SPIKE_POLICY": st.sampled_from(["warn", "skip", "stop", "rollback"]),
    "OPTIMIZER_OFFLOAD_FRACTION": st.sampled_from(["0.5", "1"]),
    "TE_FP8_RECIPE": st.sampled_from(["delayed", "tensorwise", "blockwise", "mxfp8"]),
    "TE_FP8_FORMAT": st.sampled_from(["hybrid", "e4m3"]),
    "FP8_AMAX_ALGO": st.sampled_from(["max", "most_recent"]),
}
SENSIBLE |= {other.name: st.sampled_from(other.passes or ("1", "2")) for other in OTHERS if other.name != "TARGET"}
SENSIBLE |= {
    name: st.sampled_from(["8", "16", "32", "64", "128", "24"]) for name in ("BS", "TOTAL_ITERS", "LR_DECAY_ITERS")
}
SENSIBLE |= {
    name: st.sampled_from(["1", "1", "2", "4", "8", "3"]) for name in ("TP", "PP", "CP", "VPP", "MBS", "NNODES")
}
SMALL = st.sampled_from(["0", "1", "1", "2", "3", "8"])
MUTATED = st.one_of(
    st.text(max_size=12),
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.sampled_from(["", " ", "1e3", "1.0", "0x10", "true", "off", "None", "٣", "1_000", "-0", "+1", "$(id)", "';--"]),
)


@st.composite
def requests(draw):
    family = draw(st.sampled_from(["llama2", "llama3"]))
    names = draw(st.lists(st.sampled_from(NAMES), max_size=7, unique=True))
    pairs = [f"{name}={draw(SENSIBLE.get(name, SMALL))}" for name in names]
    for layout in ("MODEL_SIZE", "TARGET"):
        if draw(st.booleans()):
            pairs.append(f"{layout}={draw(SENSIBLE[layout])}")
    for _ in range(draw(st.sampled_from([0] * 8 + [1, 2]))):
        name = draw(st.one_of(st.sampled_from(NAMES), st.text(max_size=8)))
        pairs.append(f"{name}={draw(MUTATED)}")
    return family, pairs


MACHINES = [
    Machine("CPU", "cpu", "cpu", (), 24 * GIB, 2, "torch"),
    Machine("one GPU", "nvidia", "sm_90", (Gpu(80 * GIB),), 128 * GIB, 16, "torch"),
    Machine("six GPUs", "amd", "gfx90a", (Gpu(64 * GIB),) * 6, 512 * GIB, 64, "te"),
]
outcomes = {"configuration": 0, "message": 0}


@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(requests(), st.sampled_from(MACHINES))
def check(asked, machine):
    family, pairs = asked
    try:
        request = read(family, pairs, {}, LIBRARY_PREFIXES)
        target = request.text("TARGET")
        result = resolve(request, find(target) if target else machine, {}, dry_run=True, now=NOON)
    except UsageError as error:
        outcomes["message"] += 1
        assert str(error).strip() and "Traceback" not in str(error)
        return
    outcomes["configuration"] += 1
    accepted_by_megatron_core(result.config)
    assert dry_run.text(result)


def without_transformer_engine(run: RunConfig) -> RunConfig:
    """Without the two things that megatron-core looks for it for, which this machine does not have."""
    precision = run.precision.model_copy(update={"rope_fusion": False})
    optimizer = run.optimizer.model_copy(update={"cpu_offload": False})
    return run.model_copy(update={"precision": precision, "optimizer": optimizer})


def accepted_by_megatron_core(run: RunConfig) -> None:
    transformer_config(without_transformer_engine(run))
    ddp_config(run)
    optimizer_config(without_transformer_engine(run))
    parallel, training = run.parallel, run.training
    assert parallel.world_size == parallel.tp * parallel.pp * parallel.cp * parallel.dp
    assert training.global_batch_size == training.micro_batch_size * parallel.dp * training.num_micro_batches
    chunks = layers_per_chunk(run.model.num_layers, parallel.pp, parallel.vpp, parallel.count_embedding_and_loss)
    assert chunks and sum(map(sum, chunks)) == run.model.num_layers
    assert run.model.padded_vocab_size % parallel.tp == 0
    assert lower_bound(run).total > 0
    assert RunConfig.model_validate(run.model_dump()).hash == run.hash


def test_2000_requests():
    check()
    # The generator is worth something only if it reaches both ends.
    assert outcomes["configuration"] > 300 and outcomes["message"] > 300, outcomes
