"""The table of environment settings: what applies where, whose values win, and that each row's source exists."""

from __future__ import annotations

import datetime
import importlib.util
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rocm.config import read
from megatron_rocm.launch.dry_run import text
from megatron_rocm.platform import network
from megatron_rocm.platform.machine import find
from megatron_rocm.platform.settings import AXES, LIBRARY_PREFIXES, NOT_SET, SETTINGS, YOURS, Setting, environment
from megatron_rocm.platform.sources import Source
from megatron_rocm.resolve import resolve
from megatron_rocm.resolve.resolve import Resolution

ROOT = Path(__file__).resolve().parents[2]

AMD, NVIDIA, CDNA3 = "mi250x mi300x mi355x", "a100 h100 b200", "mi300x mi355x"
TARGETS = [*AMD.split(), *NVIDIA.split(), "cpu"]

# What a BF16 run of the 8B (tiny without a GPU) gets: name, value, machines, numbers of nodes.
EXPECTED = (
    ("TOKENIZERS_PARALLELISM", "false", " ".join(TARGETS), "1 2"),
    ("MALLOC_MMAP_MAX_", "0", "cpu", "1 2"),
    ("MALLOC_TRIM_THRESHOLD_", "-1", "cpu", "1 2"),
    ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", "cpu", "1 2"),
    ("CUDA_VISIBLE_DEVICES", "-1", "cpu", "1 2"),
    ("HIP_VISIBLE_DEVICES", "-1", "cpu", "1 2"),
    ("CUDA_DEVICE_MAX_CONNECTIONS", "1", f"{AMD} a100 h100", "1 2"),
    ("TORCH_NCCL_HIGH_PRIORITY", "1", f"{AMD} {NVIDIA}", "1 2"),
    ("NCCL_CHECKS_DISABLE", "1", AMD, "1 2"),
    ("NCCL_PROTO", "Simple", AMD, "1 2"),
    ("RCCL_MSCCL_ENABLE", "0", AMD, "1 2"),
    ("RCCL_MSCCLPP_ENABLE", "0", AMD, "1 2"),
    ("RCCL_WARP_SPEED_AUTO", "0", "mi355x", "1 2"),
    ("NCCL_MIN_CTAS", "32", CDNA3, "1"),
    ("NCCL_MIN_P2P_NCHANNELS", "32", CDNA3, "1"),
    ("NCCL_IB_DISABLE", "1", AMD, "1"),
    ("NCCL_CROSS_NIC", "0", AMD, "2"),
    ("NCCL_PXN_DISABLE", "1", AMD, "2"),
    ("NCCL_P2P_NET_CHUNKSIZE", "524288", AMD, "2"),
    ("GPU_MAX_HW_QUEUES", "2", AMD, "1 2"),
    ("HSA_NO_SCRATCH_RECLAIM", "1", AMD, "1 2"),
    ("HSA_ENABLE_SCRATCH_ASYNC_RECLAIM", "0", CDNA3, "1 2"),
    ("HSA_ENABLE_SDMA", "1", AMD, "1 2"),
    ("HIP_FORCE_DEV_KERNARG", "1", CDNA3, "1 2"),
    ("TORCH_BLAS_PREFER_HIPBLASLT", "1", AMD, "1 2"),
    ("NVTE_CK_USES_FWD_V3", "1", CDNA3, "1 2"),
    ("NVTE_CK_USES_BWD_V3", "1", CDNA3, "1 2"),
    ("NVTE_CK_IS_V3_ATOMIC_FP32", "1", "mi300x", "1 2"),
    ("NVTE_USE_RMSNORM_TRITON", "1", "mi300x", "1 2"),
    ("TE_HIPBLASLT_TUNING_RUN_COUNT", "10", CDNA3, "1 2"),
    ("TE_HIPBLASLT_TUNING_ALGO_COUNT", "50", CDNA3, "1 2"),
)

# The files and pages that were read for the table, in November 2026.
READ = {
    ("ROCm/Megatron-LM", "examples/llama/train_llama3.sh"),
    ("ROCm/Megatron-LM", "examples/llama/train_llama_slurm.sh"),
    ("AMD-AGI/Primus", "runner/helpers/envs/base_env.sh"),
    ("AMD-AGI/Primus", "runner/helpers/envs/MI355X.sh"),
    ("AMD-AGI/Primus", "runner/helpers/hooks/03_enable_ainic.sh"),
    ("AMD-AGI/Primus", "runner/use_ainic.yaml"),
    ("AMD-AGI/Primus", ".github/workflows/docker-release/Dockerfile.primus-v26.5"),
    ("AMD-AGI/Primus", "docs/01-getting-started/bare-metal-installation.md"),
    ("AMD-AGI/Primus", "docs/02-user-guide/megatron-lm-training.md"),
    ("AMD-AGI/Primus", "examples/mlperf/llama2_70b/config_MI355X_1x8x1.sh"),
    (
        "mlcommons/training_results_v5.1",
        "AMD/benchmarks/llama31_8b/implementations/MI355X_EPYC_9575F_pytorch_llama3_8b/config_MI355X_1x8x1_8b.sh",
    ),
    ("ROCm/TransformerEngine", "README.rst"),
    ("ROCm/rocm-libraries", "projects/hipblaslt/docs/how-to/how-to-use-hipblaslt-offline-tuning.rst"),
    ("NVIDIA/Megatron-LM", "megatron/training/arguments.py"),
    ("https://docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html", ""),
    ("https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html", ""),
    ("https://docs.pytorch.org/docs/stable/cuda.tunable.html", ""),
    (
        "https://rocm.docs.amd.com/en/docs-7.2.0/how-to/rocm-for-ai/inference-optimization/vllm-optimization.html",
        "",
    ),
    ("https://rocm.docs.amd.com/projects/rocBLAS/en/latest/reference/env-variables.html", ""),
    ("https://rocm.docs.amd.com/projects/HIP/en/latest/reference/env_variables.html", ""),
    ("https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html", ""),
}


def resolved(*arguments: str, said: dict[str, str] | None = None) -> Resolution:
    request = read("llama3", arguments, said or {}, LIBRARY_PREFIXES)
    now = datetime.datetime(2026, 1, 2, 12)
    return resolve(request, find(request.text("TARGET")), said or {}, dry_run=True, now=now)


def settings(*arguments: str, said: dict[str, str] | None = None) -> dict[str, tuple[str, str]]:
    """What the table gives, without what the network's choice adds."""
    run = resolved(*arguments, said=said)
    return environment(run.config, run.machine, said or {}, run.request.exports)


@pytest.mark.parametrize(("target", "nodes"), [*itertools.product(TARGETS, ("1", "2"))])
def test_each_machine_gets_its_settings_and_no_others(target: str, nodes: str) -> None:
    size = "tiny" if target == "cpu" else "8"
    got = settings(f"TARGET={target}", f"NNODES={nodes}", f"MODEL_SIZE={size}")
    expected = {name: value for name, value, where, of in EXPECTED if target in where.split() and nodes in of.split()}
    assert int(got.pop("OMP_NUM_THREADS")[0]) >= 1
    assert {name: value for name, (value, _) in got.items()} == expected


@pytest.mark.parametrize("target", [*AMD.split(), *NVIDIA.split()])
@pytest.mark.parametrize("layout", ["FSDP", "MEGATRON_FSDP"])
def test_sharded_runs_have_no_order_of_kernels(target: str, layout: str) -> None:
    got = settings(f"TARGET={target}", "MODEL_SIZE=8", f"{layout}=1", said={"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    assert got["CUDA_DEVICE_MAX_CONNECTIONS"][0] == ""


@pytest.mark.parametrize(
    ("target", "recipe", "names"),
    [
        ("mi300x", "delayed", "NVTE_USE_CAST_TRANSPOSE_TRITON=1 NVTE_USE_OPTIMIZED_HIPIFIED_CAST_TRANSPOSE=0"),
        ("mi355x", "tensorwise", "NVTE_USE_CAST_TRANSPOSE_TRITON=1 NVTE_USE_OPTIMIZED_HIPIFIED_CAST_TRANSPOSE=0"),
        (
            "mi355x",
            "mxfp8",
            "NVTE_USE_CAST_TRANSPOSE_TRITON=1 NVTE_USE_OPTIMIZED_HIPIFIED_CAST_TRANSPOSE=0 NVTE_ROCM_ENABLE_MXFP8=1",
        ),
        ("h100", "delayed", ""),
        ("h100", "blockwise", ""),
        ("b200", "mxfp8", ""),
    ],
)
def test_fp8_has_settings_of_its_own(target: str, recipe: str, names: str) -> None:
    plain = settings(f"TARGET={target}", "MODEL_SIZE=8")
    got = settings(f"TARGET={target}", "MODEL_SIZE=8", "TE_FP8=1", f"TE_FP8_RECIPE={recipe}")
    assert {name: value for name, (value, _) in got.items() if name not in plain} == dict(
        word.split("=") for word in names.split()
    )
    gone = {"TE_HIPBLASLT_TUNING_RUN_COUNT", "TE_HIPBLASLT_TUNING_ALGO_COUNT"}  # it can't try kernels of MXFP8
    assert set(plain) - set(got) == (gone if (target, recipe) == ("mi355x", "mxfp8") else set())


@pytest.mark.parametrize(
    ("size", "target", "has"), [("70", "mi300x", True), ("8", "mi300x", False), ("70", "mi355x", False)]
)
def test_large_models_in_fp8_get_an_allocator_that_grows(size: str, target: str, has: bool) -> None:
    got = settings("TE_FP8=1", f"TARGET={target}", f"MODEL_SIZE={size}", "NNODES=2")
    assert ("PYTORCH_CUDA_ALLOC_CONF" in got) == has


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
@pytest.mark.parametrize("how", ["environment", "argument"])
def test_an_allocator_that_the_user_set_by_another_name(name: str, how: str) -> None:
    words = ("TARGET=mi300x", "MODEL_SIZE=70", "NNODES=2")
    value = {name: "max_split_size_mb:128"}
    said, more = (value, ()) if how == "environment" else ({}, (f"{name}={value[name]}",))
    assert "PYTORCH_CUDA_ALLOC_CONF" not in settings("TE_FP8=1", *words, *more, said=said)


def test_a_value_of_the_users_wins() -> None:
    said = {"GPU_MAX_HW_QUEUES": "4", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    got = settings("TARGET=mi300x", "MODEL_SIZE=8", "NCCL_PROTO=LL128", "NCCL_DEBUG=INFO", said=said)
    assert got["GPU_MAX_HW_QUEUES"] == ("4", YOURS)
    assert got["CUDA_DEVICE_MAX_CONNECTIONS"] == ("8", YOURS)
    assert got["NCCL_PROTO"] == ("LL128", YOURS)
    assert got["NCCL_DEBUG"] == ("INFO", YOURS)


def test_what_amds_images_set_wrongly_is_put_right_unless_an_argument_says_so() -> None:
    of_the_image = {"NVTE_CK_IS_V3_ATOMIC_FP32": "0"}
    name = "NVTE_CK_IS_V3_ATOMIC_FP32"
    assert settings("TARGET=mi300x", "MODEL_SIZE=8", said=of_the_image)[name][0] == "1"
    assert settings("TARGET=mi300x", "MODEL_SIZE=8", f"{name}=0", said=of_the_image)[name] == ("0", YOURS)
    assert name not in settings("TARGET=mi355x", "MODEL_SIZE=8", said=of_the_image)


def test_the_attention_that_an_image_has_set_is_taken_away() -> None:
    of_the_image = {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1"}
    got = settings("TARGET=mi300x", "MODEL_SIZE=8", said=of_the_image)
    assert {name: got[name][0] for name in got if name.endswith("_ATTN")} == dict.fromkeys(of_the_image, "")
    asked = settings("TARGET=mi300x", "MODEL_SIZE=8", "NVTE_FLASH_ATTN=0", said=of_the_image)
    assert asked["NVTE_FLASH_ATTN"] == ("0", YOURS)


@pytest.mark.parametrize(
    ("target", "own", "others"),
    [
        ("mi300x", {"ROCBLAS_DEFAULT_ATOMICS_MODE": "0", "TORCH_COMPILE_DISABLE": "1"}, ["CUBLAS_WORKSPACE_CONFIG"]),
        ("h100", {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, ["ROCBLAS_DEFAULT_ATOMICS_MODE", "TORCH_COMPILE_DISABLE"]),
    ],
)
def test_deterministic_runs_have_their_settings(target: str, own: dict[str, str], others: list[str]) -> None:
    expected = {"NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"} | own
    result = resolved("MODEL_SIZE=8", f"TARGET={target}", "DETERMINISTIC=1", "USE_FLASH_ATTN=1")
    assert {name: result.environment[name][0] for name in expected} == expected
    assert "TE_HIPBLASLT_TUNING_RUN_COUNT" not in result.environment  # it takes the kernel that was fastest just then
    assert not result.config.precision.flash_attention and not result.config.precision.cross_entropy_loss_fusion
    assert any("USE_FLASH_ATTN=1 becomes 0" in note for note in result.notes)
    assert not set(others) & set(result.environment)
    assert not set(expected) & set(resolved("MODEL_SIZE=8", f"TARGET={target}").environment)


def test_another_algorithm_of_collectives_is_the_users() -> None:
    got = settings("TARGET=h100", "MODEL_SIZE=8", "DETERMINISTIC=1", "NCCL_ALGO=Tree")
    assert got["NCCL_ALGO"] == ("Tree", YOURS)


@pytest.mark.parametrize("layout", [(), ("FSDP=1",), ("PP=2", "DETERMINISTIC=1")])
def test_amd_and_nvidia_differ_in_the_machine_and_the_table_alone(layout: tuple[str, ...]) -> None:
    plans = {}
    for target in ("mi300x", "h100"):
        shown = text(resolved(f"TARGET={target}", "NNODES=2", "MODEL_SIZE=8", *layout))
        head, _, rest = shown.partition("\nenvironment\n")
        rows, _, commands = rest.partition("\n\n")
        plans[target] = (head, dict(" ".join(line.split()).split(" ", 1) for line in rows.splitlines()), commands)
    (amd, of_amd, run_amd), (nvidia, of_nvidia, run_nvidia) = plans["mi300x"], plans["h100"]

    hardware = r"^configuration \w+$|^hardware\n(?:  .*\n)+"  # its facts, and the hash that they are in
    assert re.sub(hardware, "", amd, flags=re.M) == re.sub(hardware, "", nvidia, flags=re.M)
    assert run_amd.replace("mi300x", "h100") == run_nvidia
    different = {name for name in {*of_amd, *of_nvidia} if of_amd.get(name) != of_nvidia.get(name)}
    by_machine = {row.name for row in SETTINGS if {"vendor", "arch", "blackwell"} & set(row.when)}
    assert different and different <= by_machine | set(network.VARIABLES)


def test_the_plan_tells_each_setting_with_its_reason() -> None:
    plan = resolved("TARGET=mi300x", "NNODES=2", "MODEL_SIZE=8")
    lines = [" ".join(line.split()) for line in text(plan).splitlines()]
    assert [
        name for name, row in plan.environment.items() if " ".join([name, *" ".join(row).split()]) not in lines
    ] == []


def test_rows_of_one_name_exclude_each_other() -> None:
    """So that the order of rows decides nothing."""
    for one, other in itertools.combinations(SETTINGS, 2):
        if one.name == other.name:
            shared = set(one.when) & set(other.when)
            assert any(not set(one.when[axis]) & set(other.when[axis]) for axis in shared), one.name


def test_conditions_are_of_known_axes_and_values() -> None:
    assert [row.name for row in SETTINGS if any(not set(row.when[axis]) <= set(AXES[axis]) for axis in row.when)] == []


def test_what_is_not_set_is_not_set() -> None:
    named = {name for names in NOT_SET for name in re.findall(r"[A-Z0-9]+(?:_[A-Z0-9]+)+", names)}
    chosen = set(network.VARIABLES)
    but = {"NVTE_CK_IS_V3_ATOMIC_FP32": "on gfx950", "HIP_VISIBLE_DEVICES": "without TARGET=cpu"}
    assert named & {row.name for row in SETTINGS} - chosen == set(but)


def flaw(row: Setting | network.Extra) -> str | None:
    """What is wrong with a row's reason or source, None where nothing is."""
    if not row.why.strip():
        return "no reason"
    source: Any = row.source
    if not isinstance(source, Source):
        return "no source"
    core = importlib.util.find_spec("megatron.core")
    exists = {
        "file": (source.place, source.path) in READ,
        "page": (source.place, "") in READ,
        "here": (ROOT / source.place).is_file(),
        "megatron-core": core is not None and (Path(str(core.origin)).parent / source.place).is_file(),
    }
    return None if exists[source.kind] else f"no such source: {source}"


def test_every_row_has_a_reason_and_a_source_that_exists() -> None:
    assert {row.name: flaw(row) for row in (*SETTINGS, *network.AINIC) if flaw(row)} == {}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"why": " "}, "no reason"),
        ({"source": None}, "no source"),
        ({"source": Source("file", "ROCm/Megatron-LM", "examples/llama/train_llama9.sh")}, "no such source"),
        ({"source": Source("page", "https://rocm.docs.amd.com/no-such-page.html")}, "no such source"),
        ({"source": Source("here", "benchmarks/no_such.py")}, "no such source"),
        ({"source": Source("megatron-core", "extensions/no_such.py")}, "no such source"),
    ],
)
def test_a_row_without_one_is_found(change: dict[str, Any], told: str) -> None:
    assert told in (flaw(replace(SETTINGS[0], **change)) or "")
