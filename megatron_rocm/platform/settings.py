"""Environment settings as data: what a run's processes are given unless the user has set it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.platform import sources as by
from megatron_rocm.platform.machine import Machine
from megatron_rocm.platform.sources import Source
from megatron_rocm.tune import tuned

YOURS = "set by you"

# What a row can depend on → its values. A row's `when` names those with which it applies; another axis doesn't matter.
AXES: Mapping[str, tuple[str, ...]] = {
    "vendor": ("amd", "nvidia", "cpu"),
    "arch": ("gfx90a", "gfx942", "gfx950", "sm_80", "sm_90", "sm_100"),
    "blackwell": ("yes", "no"),  # NVIDIA's compute capability 10 and above
    "nodes": ("one", "several"),
    "tier": ("torch", "te"),
    "layout": ("fsdp", "replicated"),  # fsdp: PyTorch's or Megatron's
    "size": ("70B and up", "smaller"),  # by hidden size, 8192
    "fp8": ("no", "delayed", "tensorwise", "blockwise", "mxfp8"),
    "deterministic": ("yes", "no"),
    "gemm_tuning": ("0", "1", "hipblaslt", "tunableop"),  # the latter two: GEMM_TUNING=FILE, by who reads it
    "target": ("cpu", "this machine"),  # cpu: TARGET=cpu, whose GPUs are left alone
}


def facts(run: RunConfig, machine: Machine) -> dict[str, str]:
    """Axis → where this run is on it."""
    parallel = run.parallel
    capability = machine.arch.removeprefix("sm_")
    return {
        "vendor": machine.vendor,
        "arch": machine.arch,
        "blackwell": _yes(machine.vendor == "nvidia" and capability.isdigit() and int(capability) >= 100),
        "nodes": "several" if parallel.nnodes > 1 else "one",
        "tier": machine.tier,
        "layout": "fsdp" if parallel.fsdp or parallel.megatron_fsdp else "replicated",
        "size": "70B and up" if run.model.hidden_size >= 8192 else "smaller",
        "fp8": fp8_recipe(run),
        "deterministic": _yes(run.training.deterministic),
        "gemm_tuning": tuned.kind(run.launch.gemm_tuning),
        "target": "cpu" if machine.hides_gpus else "this machine",
    }


def fp8_recipe(run: RunConfig) -> str:
    """The FP8 recipe of the linear layers, "no" without FP8."""
    return run.fp8.recipe if run.fp8.enabled else "no"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


@dataclass(frozen=True)
class Setting:
    """One variable: set to `value` where `when` (axis → values) holds. An empty value takes the variable away.

    `over` says what it wins against: nothing that the user has set, their "environment" but not a KEY=VALUE argument
    (AMD's images set the opposite in theirs), or "all".
    """

    name: str
    value: str | Callable[[RunConfig, Machine], str]
    why: str
    source: Source
    when: Mapping[str, tuple[str, ...]]
    over: Literal["nothing", "environment", "all"] = "nothing"
    also: tuple[str, ...] = ()  # other names that are read for the same: the user's value under one of them stands

    def applies(self, where: Mapping[str, str]) -> bool:
        return all(where[axis] in values for axis, values in self.when.items())


def on(**axes: str | tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    return {axis: (values,) if isinstance(values, str) else values for axis, values in axes.items()}


def _threads(run: RunConfig, machine: Machine) -> str:
    return str(run.hardware.threads)


def _tuned(run: RunConfig, machine: Machine) -> str:
    return tuned.library_file(run.launch.gemm_tuning)


_ALWAYS = on()
_GPU = ("amd", "nvidia")
_CDNA = ("gfx90a", "gfx942", "gfx950")
_CDNA3 = ("gfx942", "gfx950")
_FP8 = ("delayed", "tensorwise", "blockwise", "mxfp8")
_TUNED = ("no", "delayed", "tensorwise")  # Transformer Engine times no kernels for MXFP8
_ATTENTION = (
    "USE_FLASH_ATTN decides, through megatron-core, which ends where an image has set another kind of attention"
)
_AMD_FP8 = ("delayed", "tensorwise", "mxfp8")  # AMD's Transformer Engine has no blockwise recipe

SETTINGS = (
    # the host
    Setting("OMP_NUM_THREADS", _threads, "cores divided by processes, so that they don't wait for each other; AMD's scripts have a fixed number", by.LLAMA_SLURM, _ALWAYS),
    Setting("TOKENIZERS_PARALLELISM", "false", "no threads that a fork would break", by.LLAMA3, _ALWAYS),
    Setting("MALLOC_MMAP_MAX_", "0", "memory that a step gives back is kept for the next: the kernel would clear its pages anew", by.STEP, on(vendor="cpu")),
    Setting("MALLOC_TRIM_THRESHOLD_", "-1", "the same, at the end of the heap", by.STEP, on(vendor="cpu")),
    Setting("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", "memory comes in huge pages where the kernel has them (glibc 2.35 and later)", by.STEP, on(vendor="cpu")),
    Setting("CUDA_VISIBLE_DEVICES", "-1", "TARGET=cpu leaves this machine's GPUs alone", by.CUDA_PAGE, on(target="cpu"), over="all"),
    Setting("HIP_VISIBLE_DEVICES", "-1", "TARGET=cpu leaves this machine's GPUs alone", by.HIP_PAGE, on(target="cpu"), over="all"),
    # both vendors
    Setting("CUDA_DEVICE_MAX_CONNECTIONS", "1", "kernels start in order, which TP and CP overlap relies on before Blackwell", by.MEGATRON_ARGUMENTS, on(vendor=_GPU, layout="replicated", blackwell="no")),
    Setting("CUDA_DEVICE_MAX_CONNECTIONS", "", "FSDP=1 and MEGATRON_FSDP=1 need it unset: 1 keeps their communication from overlapping", by.MEGATRON_ARGUMENTS, on(vendor=_GPU, layout="fsdp"), over="all"),
    Setting("TORCH_NCCL_HIGH_PRIORITY", "1", "communication streams go before compute", by.TORCH_NCCL_PAGE, on(vendor=_GPU)),
    # AMD: collectives
    Setting("NCCL_CHECKS_DISABLE", "1", "no argument checks before each collective", by.LLAMA3, on(vendor="amd")),
    Setting("NCCL_PROTO", "Simple", "the protocol with full bandwidth on training's large messages", by.LLAMA3, on(vendor="amd")),
    Setting("RCCL_MSCCL_ENABLE", "0", "MSCCL's algorithms are left out, for stability", by.LLAMA3, on(vendor="amd")),
    Setting("RCCL_MSCCLPP_ENABLE", "0", "MSCCL++ is for small messages, which training has few of", by.PRIMUS, on(vendor="amd")),
    Setting("RCCL_WARP_SPEED_AUTO", "0", "RCCL does not choose its warp-speed kernels by itself", by.PRIMUS_MI355X, on(arch="gfx950")),
    Setting("NCCL_MIN_CTAS", "32", "at least so many workgroups for a collective: AMD's choice for the eight GPUs of a node", by.MLPERF_8B, on(arch=_CDNA3, nodes="one")),
    Setting("NCCL_MIN_P2P_NCHANNELS", "32", "and so many channels for sends and receives", by.MLPERF_8B, on(arch=_CDNA3, nodes="one")),
    Setting("NCCL_IB_DISABLE", "1", "one node needs no network: a libibverbs that does not fit the driver can't hang the start", by.PRIMUS_LORA, on(vendor="amd", nodes="one")),
    Setting("NCCL_CROSS_NIC", "0", "rings stay on their network card", by.LLAMA3, on(vendor="amd", nodes="several")),
    Setting("NCCL_PXN_DISABLE", "1", "no detour over another GPU's network card: it costs GPU memory", by.PRIMUS, on(vendor="amd", nodes="several")),
    Setting("NCCL_P2P_NET_CHUNKSIZE", "524288", "larger pieces for sends between pipeline stages on different nodes", by.PRIMUS, on(vendor="amd", nodes="several")),
    # AMD: runtime
    Setting("GPU_MAX_HW_QUEUES", "2", "copies overlap with compute without a queue each", by.LLAMA3, on(vendor="amd")),
    Setting("HSA_NO_SCRATCH_RECLAIM", "1", "scratch memory is kept instead of being handed back at each kernel", by.LLAMA3, on(vendor="amd")),
    Setting("HSA_ENABLE_SCRATCH_ASYNC_RECLAIM", "0", "nor is it taken back while kernels run: HSA_STATUS_ERROR_OUT_OF_RESOURCES", by.PRIMUS_IMAGE, on(arch=_CDNA3)),
    Setting("HSA_ENABLE_SDMA", "1", "copies go through the DMA engines", by.PRIMUS, on(vendor="amd")),
    Setting("HIP_FORCE_DEV_KERNARG", "1", "kernel arguments lie in the GPU's memory, so that kernels start sooner", by.ROCM_MI300_PAGE, on(arch=_CDNA3)),
    Setting("TORCH_BLAS_PREFER_HIPBLASLT", "1", "torch's own matrix products go through hipBLASLt", by.ROCM_MI300_PAGE, on(arch=_CDNA)),
    Setting("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "large models in FP8 run out of memory that is free but in pieces", by.PRIMUS_TRAINING, on(arch="gfx942", size="70B and up", fp8=_FP8), also=("PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")),
    # Transformer Engine
    Setting("NVTE_FLASH_ATTN", "", _ATTENTION, by.CORE_LANGUAGE, on(tier="te"), over="environment"),
    Setting("NVTE_FUSED_ATTN", "", _ATTENTION, by.CORE_LANGUAGE, on(tier="te"), over="environment"),
    Setting("NVTE_UNFUSED_ATTN", "", _ATTENTION, by.CORE_LANGUAGE, on(tier="te"), over="environment"),
    Setting("NVTE_CK_USES_FWD_V3", "1", "assembly kernels for attention's forward pass; older builds have them off", by.TE_README, on(arch=_CDNA3, tier="te")),
    Setting("NVTE_CK_USES_BWD_V3", "1", "assembly kernels for attention's backward pass; older builds have them off", by.TE_README, on(arch=_CDNA3, tier="te")),
    Setting("NVTE_CK_IS_V3_ATOMIC_FP32", "1", "attention's gradients are summed in FP32: in 16 bits they become Inf on gfx942, and AMD's images set 0", by.PRIMUS_INSTALL, on(arch="gfx942", tier="te"), over="environment"),
    Setting("NVTE_USE_RMSNORM_TRITON", "1", "Triton's RMSNorm; AMD's submissions on gfx950 leave it off", by.LLAMA_SLURM, on(arch="gfx942", tier="te")),
    Setting("NVTE_USE_CAST_TRANSPOSE_TRITON", "1", "FP8: Triton's cast and transpose", by.LLAMA_SLURM, on(arch=_CDNA3, tier="te", fp8=_AMD_FP8)),
    Setting("NVTE_USE_OPTIMIZED_HIPIFIED_CAST_TRANSPOSE", "0", "FP8: and not the other one of the two", by.PRIMUS, on(arch=_CDNA3, tier="te", fp8=_AMD_FP8)),
    Setting("NVTE_ROCM_ENABLE_MXFP8", "1", "TE_FP8_RECIPE=mxfp8: off by default in AMD's builds", by.TE_README, on(arch="gfx950", tier="te", fp8="mxfp8")),
    # DETERMINISTIC=1
    Setting("NCCL_ALGO", "Ring", "DETERMINISTIC=1: sums over ranks in one order", by.MEGATRON_ARGUMENTS, on(vendor=_GPU, deterministic="yes")),
    Setting("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0", "DETERMINISTIC=1: Transformer Engine's deterministic kernels alone", by.CORE_TE, on(vendor=_GPU, tier="te", deterministic="yes"), over="all"),
    Setting("CUBLAS_WORKSPACE_CONFIG", ":4096:8", "DETERMINISTIC=1: matrix products the same with each stream; torch demands it", by.TORCH_DETERMINISTIC_PAGE, on(vendor="nvidia", deterministic="yes")),
    Setting("ROCBLAS_DEFAULT_ATOMICS_MODE", "0", "DETERMINISTIC=1: matrix products without atomic additions", by.ROCBLAS_PAGE, on(vendor="amd", deterministic="yes")),
    Setting("TORCH_COMPILE_DISABLE", "1", "DETERMINISTIC=1: torch.compile's Triton kernels race in some versions", by.PRIMUS, on(vendor="amd", deterministic="yes")),
    # GEMM_TUNING; a choice by timing is not repeatable
    Setting("TE_HIPBLASLT_TUNING_RUN_COUNT", "10", "GEMM_TUNING=1: runs per candidate kernel", by.TE_README, on(vendor="amd", tier="te", gemm_tuning="1", deterministic="no", fp8=_TUNED)),
    Setting("TE_HIPBLASLT_TUNING_ALGO_COUNT", "50", "GEMM_TUNING=1: candidate kernels per shape", by.TE_README, on(vendor="amd", tier="te", gemm_tuning="1", deterministic="no", fp8=_TUNED)),
    Setting("TE_HIPBLASLT_TUNING_RUN_COUNT", "0", "GEMM_TUNING=FILE: Transformer Engine takes hipBLASLt's first choice, which the file names", by.TE_README, on(vendor="amd", tier="te", gemm_tuning="hipblaslt")),
    Setting("HIPBLASLT_TUNING_OVERRIDE_FILE", _tuned, "GEMM_TUNING=FILE: the kernels that `megatron-rocm tune` has judged right", by.HIPBLASLT, on(vendor="amd", gemm_tuning="hipblaslt")),
    Setting("PYTORCH_TUNABLEOP_ENABLED", "1", "GEMM_TUNING=FILE: torch looks up the kernels of its products", by.TUNABLEOP_PAGE, on(vendor=_GPU, gemm_tuning="tunableop")),
    Setting("PYTORCH_TUNABLEOP_TUNING", "0", "GEMM_TUNING=FILE: and tries no others", by.TUNABLEOP_PAGE, on(vendor=_GPU, gemm_tuning="tunableop")),
    Setting("PYTORCH_TUNABLEOP_FILENAME", _tuned, "GEMM_TUNING=FILE: torch puts the GPU's number in place of %d", by.TUNABLEOP_PAGE, on(vendor=_GPU, gemm_tuning="tunableop")),
)  # fmt: skip

# What AMD's scripts, images and submissions set and this program leaves alone → why.
NOT_SET: Mapping[str, str] = {
    "NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, NCCL_IB_HCA, NCCL_IB_GID_INDEX and what Pensando's cards need": "chosen from what the machine has: docs/network.md",
    "NCCL_MIN_NCHANNELS": "112 is AMD's advice for inference; neither its Llama scripts nor Primus set it",
    "NCCL_NCHANNELS_PER_NET_PEER": "of a submission on one node, which has no network",
    "NCCL_NVLS_ENABLE": "NVLink SHARP: AMD's GPUs have none, and on NVIDIA's NCCL knows when to use it",
    "NCCL_P2P_LEVEL, NCCL_SINGLE_RING_THRESHOLD, NCCL_BUFFSIZE": "tuned for one MLPerf submission (8B in FP4 on MI355X)",
    "RCCL_MSCCLPP_FORCE_ENABLE, RCCL_MSCCLPP_THRESHOLD, MSCCLPP_DISABLE_CHANNEL_CACHE": "read only with MSCCL++ on",
    "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK": "0 is torch's own default",
    "NCCL_CTA_POLICY, NCCL_CUMEM_ENABLE, NCCL_LOCAL_REGISTER": "Primus's all-gather by DMA engines: experimental, and needs a library preloaded",
    "HSA_ENABLE_INTERRUPT": "0 lets every waiting thread poll: for a machine that does nothing else",
    "HSA_KERNARG_POOL_SIZE": "for models of many small kernels; Primus has it commented out",
    "HIP_VISIBLE_DEVICES": "every process takes its GPU by its number; a mask of yours is kept",
    "NVTE_USE_HIPBLASLT, USE_HIPBLASLT": "hipBLASLt is the only backend that AMD's Transformer Engine has left",
    "NVTE_CK_HOW_V3_BF16_CVT, CK_TILE_FLOAT_TO_BFLOAT16_DEFAULT": "2 rounds attention's BF16 toward zero, for speed; the kernels' own default is more exact. What an image sets stays",
    "NVTE_FUSED_ATTN_CK, NVTE_FUSED_ATTN_AOTRITON": "1 is the default",
    "NVTE_CK_IS_V3_ATOMIC_FP32 on gfx950": "its kernels do without; what an image sets stays",
    "NVTE_FP8_DPA_BWD, NVTE_RS_STRIDED_ATOMIC": "for FP8 attention and for Transformer Engine's own TP overlap, which are not used",
    "NVTE_ASYNC_AMAX_REDUCTION, NVTE_DP_AMAX_REDUCE_INTERVAL": "Transformer Engine 2 reads neither",
    "NVTE_MXFP4_USE_HADAMARD, NVTE_USE_AITER_ROPE, AITER_CONFIG_GEMM_A4W4, USE_TE_SWIGLU, ENABLE_TRANSPOSE_CACHE": "of AMD's FP4 submission, with kernels that upstream megatron-core does not call",
    "NVTE_DEBUG, NVTE_DEBUG_LEVEL, NVTE_LOG_CK_CONFIG, NVTE_LOG_FUSED_ATTN_CONFIG": "for you, to see which kernel was chosen",
    "numa_balancing, the CPU governor, huge pages, /dev/kfd, --shm-size": "the host's and the container's: `megatron-rocm doctor` names what is missing",
}  # fmt: skip

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
) -> dict[str, tuple[str, str]]:
    """Variable → (value, why) for a run's processes.

    A name in `said` (the user's environment) or `exports` (KEY=VALUE arguments) keeps the user's value, but for rows
    that win over it. An empty value stands for an unset variable; a row that takes one of an image's away is left out
    where there is none.
    """
    result = {name: (value, YOURS) for name, value in exports.items()}
    where = facts(run, machine)
    kept = {"nothing": {**said, **exports}, "environment": exports, "all": {}}
    for row in [row for row in SETTINGS if row.applies(where)]:
        value = row.value if isinstance(row.value, str) else row.value(run, machine)
        if any(name in kept[row.over] for name in row.also):
            continue
        if row.name in kept[row.over]:
            result[row.name] = kept[row.over][row.name], YOURS
        elif value or row.over == "all" or row.name in said:
            result[row.name] = value, row.why
    return result
