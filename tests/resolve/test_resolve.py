"""Defaults, adjustments, rules and the fit, each by what a person types and reads."""

import datetime
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from pydantic import ValidationError

from megatron_rocm.config import RunConfig, read
from megatron_rocm.errors import UsageError
from megatron_rocm.plan.memory import lower_bound
from megatron_rocm.platform.machine import GIB, Gpu, Machine, find
from megatron_rocm.platform.settings import LIBRARY_PREFIXES
from megatron_rocm.resolve import resolve

CPU = Machine("CPU", "cpu", "cpu", (), 24 * GIB, 2, "torch")
NOON = datetime.datetime(2026, 1, 2, 12)


def resolved(*arguments, family="llama3", machine=None, environment=None):
    request = read(family, arguments, environment or {}, LIBRARY_PREFIXES)
    target = request.text("TARGET")
    return resolve(request, machine or (find(target) if target else CPU), environment or {}, dry_run=True, now=NOON)


def message(*arguments, **more):
    with pytest.raises(UsageError) as caught:
        resolved(*arguments, **more)
    return str(caught.value)


def test_no_gpu_and_no_size_trains_tiny_and_says_so():
    result = resolved()
    assert (result.config.model.size, result.config.parallel.world_size) == ("tiny", 1)
    assert any("tiny is trained (no GPU here)" in note for note in result.notes)


@pytest.mark.parametrize(
    ("family", "target", "size"),
    [("llama3", "mi300x", "70"), ("llama2", "mi300x", "70"), ("llama3", "mi250x", "8"), ("llama2", "a100", "13")],
)
def test_gpus_without_a_size_train_the_guides_or_the_largest_that_fits(family, target, size):
    assert resolved(f"TARGET={target}", family=family).config.model.size == size


@pytest.mark.parametrize(("gpus", "tp"), [(8, 8), (4, 4), (6, 2), (1, 1), (3, 1)])
def test_tp_defaults_to_what_the_node_and_the_heads_divide(gpus, tp):
    machine = Machine("x", "amd", "gfx942", (Gpu(192 * GIB),) * gpus, 2048 * GIB, 96, "te")
    assert resolved("MODEL_SIZE=8", machine=machine).config.parallel.tp == tp


def test_processes_on_a_cpu_are_the_layouts():
    assert resolved("TP=2", "PP=2").config.parallel.gpus_per_node == 4
    assert resolved("TP=2", "NNODES=2").config.parallel.dp == 2


def test_megatron_fsdp_shards_over_all_processes_unless_told_otherwise():
    parallel = resolved("MEGATRON_FSDP=1", "MODEL_SIZE=8", "TARGET=mi300x").config.parallel
    assert (parallel.tp, parallel.dp) == (1, 8)
    parallel = resolved("MEGATRON_FSDP=1", "MODEL_SIZE=8", "TARGET=mi300x", "TP=4").config.parallel
    assert (parallel.tp, parallel.dp, parallel.sequence_parallel) == (4, 2, True)


def test_405_has_a_layout_of_its_own():
    config = resolved("MODEL_SIZE=405", "NNODES=16", "TARGET=mi300x").config
    parallel = config.parallel
    assert (parallel.tp, parallel.pp, parallel.dp, parallel.world_size) == (8, 8, 2, 128)
    assert parallel.count_embedding_and_loss and config.training.global_batch_size == 16
    assert resolved("MODEL_SIZE=405", "NNODES=16", "TARGET=mi300x", "TP=8", "PP=8", "VPP=8").config.parallel.vpp == 8


@pytest.mark.parametrize(("target", "nodes", "takes"), [("mi300x", 1, 8), ("h100", 8, 16), ("mi355x", 4, 8)])
def test_405_on_too_few_nodes_says_how_many_and_what_to_type(target, nodes, takes):
    text = message("MODEL_SIZE=405", f"NNODES={nodes}", f"TARGET={target}")
    assert f"It takes {takes} such nodes" in text
    line = text.splitlines()[-1].strip()
    assert line == f"MODEL_SIZE=405 NNODES={takes} NODE_RANK=$i MASTER_ADDR=$HEAD bash examples/llama/train_llama3.sh"
    words = [word for word in line.split() if "=" in word and "$" not in word]
    assert resolved(*words, f"TARGET={target}").config.parallel.nnodes == takes


def test_what_cannot_fit_is_refused_with_the_numbers():
    text = message("MODEL_SIZE=70")
    # 70.55e9 parameters, 2 + 4 + 12 bytes each, padding of the vocabulary apart
    assert re.search(r"at least 118\d\.\d GiB", text) and "24.0 GiB" in text and "TARGET=" in text


def test_fsdp_switches_tp_and_sequence_parallel_off_and_says_so():
    result = resolved("FSDP=1", "TP=4", "SEQ_PARALLEL=1", "MODEL_SIZE=8", "TARGET=mi300x")
    parallel = result.config.parallel
    assert (parallel.tp, parallel.sequence_parallel, parallel.distributed_optimizer) == (1, False, False)
    assert any(note.startswith("TP=4 becomes 1") for note in result.notes)
    assert any(note.startswith("SEQ_PARALLEL=1 becomes 0") for note in result.notes)
    assert result.environment["CUDA_DEVICE_MAX_CONNECTIONS"][0] == ""  # unset, whatever was exported


@pytest.mark.parametrize(
    ("family", "size", "base", "scaling", "factor"),
    [
        ("llama2", "7", 10_000, False, 1.0),
        ("llama2", "code34", 1_000_000, False, 1.0),
        ("llama3", "8", 500_000, True, 8.0),
        ("llama3", "1", 500_000, True, 32.0),
    ],
)
def test_rotary_embedding_is_the_published_one(family, size, base, scaling, factor):
    model = resolved(f"MODEL_SIZE={size}", "TARGET=mi300x", family=family).config.model
    assert (model.rotary_base, model.rope_scaling, model.rope_scaling_factor) == (base, scaling, factor)


def test_rope_scaling_can_be_turned_off_for_llama_3_without_dot():
    assert not resolved("MODEL_SIZE=8", "TARGET=mi300x", "ROPE_SCALING=0").config.model.rope_scaling


def test_recompute_num_layers_is_honoured_and_bounded():
    assert resolved("RECOMPUTE=1").config.training.recompute_num_layers == 4
    assert resolved("RECOMPUTE=1", "RECOMPUTE_NUM_LAYERS=2").config.training.recompute_num_layers == 2
    result = resolved("RECOMPUTE=1", "RECOMPUTE_NUM_LAYERS=80", "PP=2")
    assert result.config.training.recompute_num_layers == 2
    assert any("RECOMPUTE_NUM_LAYERS=80 becomes 2" in note for note in result.notes)
    assert resolved("RECOMPUTE=0", "RECOMPUTE_NUM_LAYERS=2").config.training.recompute_num_layers is None


MI300X = ["MODEL_SIZE=8", "TARGET=mi300x"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL_SIZE=7"], ["MODEL_SIZE=7", "tiny, 1, 3, 8, 70, 405", "train_llama2.sh has it"]),
        (["MODEL_SIZE=9"], ["MODEL_SIZE=9", "tiny, 1, 3, 8, 70, 405"]),
        (["TP=3"], ["TP=3", "8 attention heads", "1, 2, 4"]),
        (["PP=5"], ["PP=5", "4 layers", "without layers", "1, 2, 3, 4"]),
        (["PP=2", "VPP=4"], ["VPP=4", "without layers"]),
        (["VPP=2"], ["VPP=2", "PP=1"]),
        (["TP=2", "GPUS_PER_NODE=3"], ["TP=2", "3 processes"]),
        (["TP=4", "GPUS_PER_NODE=2"], ["4 processes", "NNODES=1", "are 2", "It takes 2 such nodes"]),
        (["BS=7", "MBS=2"], ["BS=7", "MBS=2", "BS=6 or BS=8"]),
        (["BS=1", "MBS=2"], ["BS=1", "set BS=2"]),
        (["PP=2", "VPP=2", "BS=3"], ["VPP=2", "multiple of PP=2", "BS=2 or BS=4"]),
        (["FSDP=1", "PP=2"], ["PP=2", "FSDP=1", "FSDP=0"]),
        (["PRECISION=fp16", "FSDP=1"], ["PRECISION=fp16", "FSDP=1", "PRECISION=bf16"]),
        (["FSDP=1", "MEGATRON_FSDP=1"], ["FSDP=1", "MEGATRON_FSDP=1"]),
        (["ENABLE_HSDP=1"], ["ENABLE_HSDP=1", "MEGATRON_FSDP=1"]),
        (
            ["ENABLE_HSDP=1", "MEGATRON_FSDP=1", "GPUS_PER_NODE=3"],
            ["HSDP_NUM_REPLICAS=2", "3 data parallel", "set ENABLE_HSDP=0"],
        ),
        (["USE_DISTRIBUTED_OPTIMIZER=1", "OPTIMIZER=sgd"], ["USE_DISTRIBUTED_OPTIMIZER=1", "OPTIMIZER=sgd"]),
        (["RAMPUP_BATCH_SIZE=3 2 10", "BS=8"], ["RAMPUP_BATCH_SIZE=3 2 10", "BS=8", "multiple of increment"]),
        (["RAMPUP_BATCH_SIZE=3 5 10", "BS=8", "MBS=2"], ["RAMPUP_BATCH_SIZE=3 5 10", "MBS=2"]),
        (["LR_DECAY_STYLE=WSD", "LR_WSD_DECAY_ITERS=13"], ["LR_WSD_DECAY_ITERS=13", "LR_DECAY_ITERS=12"]),
        (["SPIKE_POLICY=rollback", "SPIKE_FACTOR=3"], ["SPIKE_POLICY=rollback", "SAVE_CKPT_PATH"]),
        (["PRECISION=fp16", "INITIAL_LOSS_SCALE=1", "MIN_LOSS_SCALE=4"], ["MIN_LOSS_SCALE=4", "INITIAL_LOSS_SCALE=1"]),
        (["SPIKE_FACTOR=0.5"], ["SPIKE_FACTOR=0.5", "more than 1"]),
        (["FINETUNE=1"], ["FINETUNE=1", "LOAD_CKPT_PATH"]),
        (["NO_LOAD_OPTIM=1"], ["NO_LOAD_OPTIM=1", "LOAD_CKPT_PATH"]),
        (["FINETUNE=1", "LOAD_CKPT_PATH=a/../b", "SAVE_CKPT_PATH=b"], ["FINETUNE=1", "SAVE_CKPT_PATH of its own"]),
        (["NO_LOAD_OPTIM=1", "LOAD_CKPT_PATH=b/iter_0000002", "SAVE_CKPT_PATH=b"], ["SAVE_CKPT_PATH of its own"]),
        (["ALLOW_CHANGE=SEED,SPLITT"], ["ALLOW_CHANGE", "did you mean SPLIT"]),
        (["RESET_POSITION_IDS=1"], ["RESET_POSITION_IDS=1", "RESET_ATTENTION_MASK=1"]),
        (["OPTIMIZER_CPU_OFFLOAD=1"], ["OPTIMIZER_CPU_OFFLOAD=1", "CPU"]),
        (["CPU_OFFLOADING_NUM_LAYERS=1"], ["CPU_OFFLOADING_NUM_LAYERS=1", "Transformer Engine"]),
        (
            ["OPTIMIZER_CPU_OFFLOAD=1", "MODEL_SIZE=8", "TARGET=mi250x"],
            ["OPTIMIZER_CPU_OFFLOAD=1", "Transformer Engine"],
        ),
        (["OPTIMIZER_CPU_OFFLOAD=1", "OPTIMIZER=sgd", *MI300X], ["OPTIMIZER=sgd", "OPTIMIZER_CPU_OFFLOAD=0"]),
        (["OPTIMIZER_CPU_OFFLOAD=1", "PRECISION=fp32", *MI300X], ["PRECISION=fp32", "PRECISION=bf16"]),
        (["CPU_OFFLOADING_NUM_LAYERS=1", "FSDP=1", *MI300X], ["CPU_OFFLOADING_NUM_LAYERS=1", "FSDP=1"]),
        (["CPU_OFFLOADING_NUM_LAYERS=1", "RECOMPUTE=1", *MI300X], ["CPU_OFFLOADING_NUM_LAYERS=1", "RECOMPUTE=0"]),
        (["CPU_OFFLOADING_NUM_LAYERS=32", *MI300X], ["CPU_OFFLOADING_NUM_LAYERS=32", "below", "32 layers"]),
        (["RESET_ATTENTION_MASK=1", "TP=4", "CP=2", *MI300X], ["RESET_ATTENTION_MASK=1", "CP=1"]),
        (["RESET_ATTENTION_MASK=1", "PRECISION=fp32", *MI300X], ["PRECISION=fp32", "PRECISION=bf16"]),
        (["RECOMPUTE_MODULES=layernorm"], ["RECOMPUTE_MODULES=layernorm", "core_attn, mlp, or both"]),
        (
            ["RECOMPUTE=1", "RECOMPUTE_METHOD=uniform", "RECOMPUTE_NUM_LAYERS=3"],
            ["RECOMPUTE_NUM_LAYERS=3", "4 layers", "one of 1, 2, 4", "RECOMPUTE_METHOD=block"],
        ),
        (["NODE_RANK=1"], ["NODE_RANK=1", "NNODES=1"]),
        (["TP=2", "SEQ_LENGTH=255"], ["SEQ_LENGTH=255", "256"]),
        (["LR_WARMUP_ITERS=9", "LR_DECAY_ITERS=9"], ["LR_WARMUP_ITERS=9", "LR_DECAY_ITERS=9"]),
        (["MIN_LR=1", "LR=0.1"], ["MIN_LR=1", "LR=0.1"]),
        (["SPLIT=1;2"], ["SPLIT=1;2", "99,1,0"]),
        (["SPLIT=0,1,0"], ["SPLIT=0,1,0", "above 0"]),
        (["SPLIT=1,0,0", "EVAL_ITERS=1"], ["EVAL_ITERS=1", "SPLIT=1,0,0"]),
        (["MOCK_DATA=0"], ["MOCK_DATA=0", "DATA_PATH"]),
        (["OVERLAP_PARAM_GATHER=1", "OPTIMIZER=sgd"], ["OVERLAP_PARAM_GATHER=1", "OPTIMIZER=sgd"]),
        (["MEGATRON_FSDP=1"], ["DP·CP=1", "GPUS_PER_NODE", "MEGATRON_FSDP=0"]),
        (["MEGATRON_FSDP=1", "GPUS_PER_NODE=2", "ENABLE_HSDP=1"], ["HSDP_NUM_REPLICAS=2", "none to shard over"]),
        (
            ["MEGATRON_FSDP=1", "GPUS_PER_NODE=8", "ENABLE_HSDP=1", "HSDP_NUM_REPLICAS=3"],
            ["=3 ", "8 data", "one of 2, 4"],
        ),
        (["MEGATRON_FSDP=1", "GPUS_PER_NODE=2", "OPTIMIZER=sgd"], ["OPTIMIZER=sgd", "OPTIMIZER=adam"]),
        (["GPUS_PER_NODE=9", "MODEL_SIZE=8", "TARGET=h100"], ["GPUS_PER_NODE=9", "8 GPUs"]),
    ],
)
def test_bad_input_names_key_value_rule_and_way_out(arguments, words):
    text = message(*arguments)
    for word in words:
        assert word in text, text


def test_a_target_is_planned_for_but_not_trained_on():
    with pytest.raises(UsageError, match="DRY_RUN=1"):
        resolve(read("llama3", ["TARGET=mi300x"], {}), find("mi300x"))


def test_users_own_settings_win():
    result = resolved("MODEL_SIZE=8", "TARGET=mi300x", "NCCL_DEBUG=INFO", environment={"GPU_MAX_HW_QUEUES": "4"})
    assert result.environment["GPU_MAX_HW_QUEUES"] == ("4", "set by you")
    assert result.environment["NCCL_DEBUG"] == ("INFO", "set by you")
    assert result.environment["HSA_NO_SCRATCH_RECLAIM"][0] == "1"


def test_gemm_tuning_sets_transformer_engines_counts():
    assert resolved("MODEL_SIZE=8", "TARGET=mi300x").environment["TE_HIPBLASLT_TUNING_RUN_COUNT"][0] == "10"
    assert "TE_HIPBLASLT_TUNING_RUN_COUNT" not in resolved("MODEL_SIZE=8", "TARGET=mi300x", "GEMM_TUNING=0").environment
    assert "TE_HIPBLASLT_TUNING_RUN_COUNT" not in resolved("MODEL_SIZE=8", "TARGET=h100").environment


def test_target_cpu_leaves_gpus_alone():
    settings = resolved("TARGET=cpu", "HIP_VISIBLE_DEVICES=0", environment={"CUDA_VISIBLE_DEVICES": "0,1"}).environment
    assert settings["CUDA_VISIBLE_DEVICES"][0] == settings["HIP_VISIBLE_DEVICES"][0] == "-1"
    assert "CUDA_VISIBLE_DEVICES" not in resolved().environment


def test_fields_of_megatron_cores_own_classes():
    config = resolved("core.transformer.qk_layernorm=1", "core.ddp.bucket_size=1000").config
    assert (config.core.transformer, config.core.ddp) == ({"qk_layernorm": True}, {"bucket_size": 1000})
    assert config.hash != resolved().config.hash


def test_hash_is_of_the_run_and_not_of_the_node():
    one, other = resolved("NNODES=2"), resolved("NNODES=2", "NODE_RANK=1", "LOG_DIR=elsewhere")
    assert one.config.hash == other.config.hash
    assert resolved("NNODES=2", machine=replace(CPU, host_memory=23 * GIB, cores=4)).config.hash == one.config.hash
    assert one.config.hash != resolved("NNODES=2", "SEED=2").config.hash


def test_config_is_frozen_and_survives_a_file(tmp_path):
    config = resolved("TP=2").config
    with pytest.raises(ValidationError):
        config.parallel.tp = 4
    file = tmp_path / "run.json"
    config.save(file)
    assert RunConfig.load(file) == config
    fields = json.loads(file.read_text())
    fields["training"]["train_iters"] += 1
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="changed by hand"):
        RunConfig.load(file)


def test_what_needs_a_missing_package_is_off_or_refused():
    machine = Machine("x", "nvidia", "sm_90", (Gpu(80 * GIB),) * 8, 2048 * GIB, 96, "te")
    result = resolved("MODEL_SIZE=8", machine=machine)
    assert not result.config.precision.gradient_accumulation_fusion
    assert any("fused_weight_gradient_mlp_cuda is not installed" in note for note in result.notes)
    assert "needs the Python package flash_attn" in message("MODEL_SIZE=8", "USE_FLASH_ATTN=1", machine=machine)
    assert resolved("MODEL_SIZE=8", "TARGET=h100").config.precision.gradient_accumulation_fusion


def test_a_sequence_beyond_the_published_positions_is_told():
    notes = resolved("MODEL_SIZE=7", "TARGET=mi300x", "SEQ_LENGTH=8192", family="llama2").notes
    assert any("SEQ_LENGTH=8192 is longer than Llama 2 7B's 4096 positions" in note for note in notes)


def test_pipeline_stages_on_a_cpu_share_its_memory():
    whole, split = (lower_bound(resolved(f"PP={pp}", f"GPUS_PER_NODE={pp}").config) for pp in (1, 4))
    assert split.parameters == pytest.approx(whole.parameters / 4, abs=1)


def test_origins_say_where_values_come_from():
    origins = resolved("TP=2", "MODEL_SIZE=tiny", environment={"BS": "16"}).origins
    assert (origins["TP"], origins["BS"], origins["SEQ_LENGTH"]) == ("argument", "environment", "preset Llama 3 tiny")


def test_torch_is_not_imported():
    code = (
        "import sys; from megatron_rocm.config import read; from megatron_rocm.resolve import resolve\n"
        "from megatron_rocm.platform.machine import find\n"
        "resolve(read('llama3', ['MODEL_SIZE=8'], {}), find('mi300x'), dry_run=True)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'megatron.core')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("argument", "switch"),
    [
        ("SPIKE_POLICY=stop", "SPIKE_FACTOR"),
        ("RECOMPUTE_GRANULARITY=selective", "RECOMPUTE=1"),
        ("HSDP_NUM_REPLICAS=4", "ENABLE_HSDP=1"),
        ("LR_WSD_DECAY_ITERS=3", "LR_DECAY_STYLE=WSD"),
        ("LOSS_SCALE=16", "PRECISION=fp16"),
        ("EOD_MASK_LOSS=1", "DATA_PATH"),
    ],
)
def test_what_has_no_effect_is_said(argument, switch):
    assert any(note.startswith(f"{argument.split('.')[0]} has no effect without {switch}") for note in notes(argument))


def notes(*arguments):
    return [note.replace("=16.0 ", "=16 ") for note in resolved(*arguments).notes]


def test_wsd_decays_within_what_the_warmup_leaves():
    run = resolved("LR_DECAY_STYLE=WSD", "TOTAL_ITERS=100", "LR_WARMUP_ITERS=95").config
    assert run.optimizer.wsd_decay_iters == 5


@pytest.mark.parametrize("fully", ["FSDP=1", "MEGATRON_FSDP=1"])
def test_fully_sharded_405b_takes_nothing_of_the_presets_cuts(fully):
    parallel = resolved(fully, "MODEL_SIZE=405", "NNODES=16", "TARGET=mi300x").config.parallel
    assert (parallel.tp, parallel.pp, parallel.dp) == (1, 1, 128)
