"""Who recommends a setting: public files and pages that were read for it, megatron-core, or a measurement of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Source:
    """A place to read a recommendation.

    `kind` says what `place` is: a "file" of a public repository on GitHub (owner/name), a "page" (https address), a
    file of "megatron-core"'s package, or a file of this repository ("here").
    """

    kind: Literal["file", "page", "megatron-core", "here"]
    place: str
    path: str = ""

    @property
    def link(self) -> str:
        """The address, or the path in the package or in this repository."""
        return f"https://github.com/{self.place}/blob/HEAD/{self.path}" if self.kind == "file" else self.place


_LLAMA, _PRIMUS, _TE = "ROCm/Megatron-LM", "AMD-AGI/Primus", "ROCm/TransformerEngine"

LLAMA3 = Source("file", _LLAMA, "examples/llama/train_llama3.sh")
LLAMA_SLURM = Source("file", _LLAMA, "examples/llama/train_llama_slurm.sh")
PRIMUS = Source("file", _PRIMUS, "runner/helpers/envs/base_env.sh")
PRIMUS_MI355X = Source("file", _PRIMUS, "runner/helpers/envs/MI355X.sh")
PRIMUS_AINIC = Source("file", _PRIMUS, "runner/helpers/hooks/03_enable_ainic.sh")
PRIMUS_AINIC_CONTAINER = Source("file", _PRIMUS, "runner/use_ainic.yaml")
PRIMUS_IMAGE = Source("file", _PRIMUS, ".github/workflows/docker-release/Dockerfile.primus-v26.5")
PRIMUS_INSTALL = Source("file", _PRIMUS, "docs/01-getting-started/bare-metal-installation.md")
PRIMUS_TRAINING = Source("file", _PRIMUS, "docs/02-user-guide/megatron-lm-training.md")
PRIMUS_LORA = Source("file", _PRIMUS, "examples/mlperf/llama2_70b/config_MI355X_1x8x1.sh")
MLPERF_8B = Source(
    "file", "mlcommons/training_results_v5.1",
    "AMD/benchmarks/llama31_8b/implementations/MI355X_EPYC_9575F_pytorch_llama3_8b/config_MI355X_1x8x1_8b.sh",
)  # fmt: skip
TE_README = Source("file", _TE, "README.rst")
HIPBLASLT = Source(
    "file", "ROCm/rocm-libraries", "projects/hipblaslt/docs/how-to/how-to-use-hipblaslt-offline-tuning.rst"
)
MEGATRON_ARGUMENTS = Source("file", "NVIDIA/Megatron-LM", "megatron/training/arguments.py")

TORCH_NCCL_PAGE = Source("page", "https://docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html")
TORCH_DETERMINISTIC_PAGE = Source(
    "page", "https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html"
)
TUNABLEOP_PAGE = Source("page", "https://docs.pytorch.org/docs/stable/cuda.tunable.html")
ROCM_MI300_PAGE = Source(
    "page", "https://rocm.docs.amd.com/en/docs-7.2.0/how-to/rocm-for-ai/inference-optimization/vllm-optimization.html"
)
ROCBLAS_PAGE = Source("page", "https://rocm.docs.amd.com/projects/rocBLAS/en/latest/reference/env-variables.html")
HIP_PAGE = Source("page", "https://rocm.docs.amd.com/projects/HIP/en/latest/reference/env_variables.html")
CUDA_PAGE = Source(
    "page", "https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html"
)

CORE_LANGUAGE = Source("megatron-core", "models/common/language_module/language_module.py")
CORE_TE = Source("megatron-core", "extensions/transformer_engine.py")

STEP = Source("here", "benchmarks/train_step.py")
