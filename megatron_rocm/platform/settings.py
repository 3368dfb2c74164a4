"""Environment settings as data: what a run's processes are given unless the user has set it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.platform.machine import Machine

YOURS = "set by you"
When = Callable[[RunConfig, Machine], bool]


@dataclass(frozen=True)
class Setting:
    """One variable: set to `value` where `when` holds. `source` says who recommends it; `forced` beats the user's."""

    name: str
    value: str | Callable[[RunConfig, Machine], str]
    why: str
    source: str
    when: When
    forced: bool = False


def on(*, vendor: str | None = None, tier: str | None = None, multi_node: bool | None = None) -> When:
    """A condition over vendor, tier and number of nodes; None does not matter."""

    def holds(run: RunConfig, machine: Machine) -> bool:
        wanted = ((vendor, machine.vendor), (tier, machine.tier), (multi_node, run.parallel.nnodes > 1))
        return all(want is None or want == have for want, have in wanted)

    return holds


def _fully(run: RunConfig) -> bool:
    return run.parallel.fsdp or run.parallel.megatron_fsdp


def _gpu(run: RunConfig, machine: Machine) -> bool:
    return machine.vendor != "cpu"


def _repeats(vendor: str | None = None, tier: str | None = None) -> When:
    """DETERMINISTIC=1, on a GPU."""
    where = on(vendor=vendor, tier=tier)
    return lambda run, machine: run.training.deterministic and _gpu(run, machine) and where(run, machine)


def _tunes(run: RunConfig, machine: Machine) -> bool:
    return on(vendor="amd", tier="te")(run, machine) and not run.training.deterministic  # by timing, so not repeatable


_SCRIPT = "ROCm/Megatron-LM examples/llama/train_llama3.sh"
_MEASURED = "benchmarks/train_step.py"
_PRIMUS = "AMD-AGI/Primus --deterministic"

SETTINGS = (
    Setting("OMP_NUM_THREADS", lambda run, machine: str(run.hardware.threads), "cores divided by processes, so that they don't wait for each other", "measured: two busy processes with all cores each are 28 times slower", on()),
    Setting("MALLOC_MMAP_MAX_", "0", "memory that a step gives back is kept for the next: the kernel would clear its pages anew", _MEASURED, on(vendor="cpu")),
    Setting("MALLOC_TRIM_THRESHOLD_", "-1", "the same, at the end of the heap", _MEASURED, on(vendor="cpu")),
    Setting("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", "memory comes in huge pages where the kernel has them (glibc 2.35 and later)", _MEASURED, on(vendor="cpu")),
    Setting("TOKENIZERS_PARALLELISM", "false", "no threads that a fork would break", _SCRIPT, on()),
    Setting("CUDA_DEVICE_MAX_CONNECTIONS", "1", "kernels start in order, which TP and CP overlap relies on", "megatron/core/tensor_parallel/layers.py", lambda run, machine: _gpu(run, machine) and not _fully(run)),
    Setting("CUDA_DEVICE_MAX_CONNECTIONS", "", "FSDP=1 and MEGATRON_FSDP=1 need it unset: 1 keeps their communication from overlapping", _SCRIPT, lambda run, machine: _gpu(run, machine) and _fully(run), forced=True),
    Setting("CUDA_VISIBLE_DEVICES", "-1", "TARGET=cpu leaves this machine's GPUs alone", "NVIDIA's CUDA runtime", lambda run, machine: machine.hides_gpus, forced=True),
    Setting("HIP_VISIBLE_DEVICES", "-1", "TARGET=cpu leaves this machine's GPUs alone", "AMD's HIP runtime (ROCm/clr)", lambda run, machine: machine.hides_gpus, forced=True),
    Setting("TORCH_NCCL_HIGH_PRIORITY", "1", "communication streams go before compute", _SCRIPT, _gpu),
    Setting("NCCL_CHECKS_DISABLE", "1", "no argument checks in the hot path", _SCRIPT, _gpu),
    Setting("NCCL_CROSS_NIC", "0", "rings stay on their network card", _SCRIPT, lambda run, machine: _gpu(run, machine) and run.parallel.nnodes > 1),
    Setting("GPU_MAX_HW_QUEUES", "2", "copies overlap with compute without a queue each", _SCRIPT, on(vendor="amd")),
    Setting("HSA_NO_SCRATCH_RECLAIM", "1", "scratch memory is kept instead of being handed back at each kernel", _SCRIPT, on(vendor="amd")),
    Setting("RCCL_MSCCL_ENABLE", "0", "MSCCL's algorithms are slower on these messages", _SCRIPT, on(vendor="amd")),
    Setting("NVTE_CK_USES_BWD_V3", "1", "assembly kernels for attention's backward pass", "ROCm/Megatron-LM examples/llama/train_llama_slurm.sh", on(vendor="amd", tier="te")),
    Setting("NVTE_USE_CAST_TRANSPOSE_TRITON", "1", "Triton's cast-transpose", "ROCm/Megatron-LM examples/llama/train_llama_slurm.sh", on(vendor="amd", tier="te")),
    Setting("NCCL_ALGO", "Ring", "DETERMINISTIC=1: sums over ranks in one order", "Megatron-LM --deterministic-mode", _repeats()),
    Setting("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0", "DETERMINISTIC=1: Transformer Engine's deterministic kernels alone", "megatron/core/extensions/transformer_engine.py", _repeats(tier="te"), forced=True),
    Setting("CUBLAS_WORKSPACE_CONFIG", ":4096:8", "DETERMINISTIC=1: matrix products the same with each stream; torch demands it", "torch.use_deterministic_algorithms", _repeats(vendor="nvidia")),
    Setting("ROCBLAS_DEFAULT_ATOMICS_MODE", "0", "DETERMINISTIC=1: matrix products without atomic additions", "rocBLAS programming guide", _repeats(vendor="amd")),
    Setting("TORCH_COMPILE_DISABLE", "1", "DETERMINISTIC=1: torch.compile's Triton kernels race in some versions", _PRIMUS, _repeats(vendor="amd")),
)  # fmt: skip

GEMM_TUNING = (
    Setting("TE_HIPBLASLT_TUNING_RUN_COUNT", "10", "GEMM_TUNING=1: runs per candidate kernel", _SCRIPT, _tunes),
    Setting("TE_HIPBLASLT_TUNING_ALGO_COUNT", "50", "GEMM_TUNING=1: candidate kernels per shape", _SCRIPT, _tunes),
)  # fmt: skip

# Names of libraries that a KEY=VALUE argument may set as well as the environment.
LIBRARY_PREFIXES = (
    "NCCL_", "RCCL_", "MSCCLPP_", "GLOO_", "TORCH_", "TORCHELASTIC_", "PYTORCH_", "NVTE_", "TE_HIPBLASLT_", "HIPBLASLT_", "ROCBLAS_",
    "HSA_", "HIP_", "ROCR_", "CUDA_", "CUBLAS_", "GPU_MAX_HW_QUEUES", "OMP_", "MKL_", "UCX_", "FI_", "HF_", "AITER_", "CK_TILE_",
)  # fmt: skip


def environment(
    run: RunConfig,
    machine: Machine,
    said: Mapping[str, str],
    exports: Mapping[str, str] = MappingProxyType({}),
    gemm_tuning: bool = True,
) -> dict[str, tuple[str, str]]:
    """Variable → (value, why) for a run's processes.

    A name in `said` (the user's environment) or `exports` (KEY=VALUE arguments) keeps the user's value, but for the
    forced rows. An empty value stands for an unset variable.
    """
    result = {name: (value, YOURS) for name, value in exports.items()}
    for row in SETTINGS + (GEMM_TUNING if gemm_tuning else ()):
        if not row.when(run, machine):
            continue
        value = row.value if isinstance(row.value, str) else row.value(run, machine)
        if row.forced or row.name not in {**said, **exports}:
            result[row.name] = value, row.why
        else:
            result[row.name] = exports.get(row.name, said.get(row.name, "")), YOURS
    return result
