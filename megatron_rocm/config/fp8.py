"""The schema's FP8 section: which matrix products are computed in eight bits, and how they are scaled."""

from __future__ import annotations

from typing import Literal

from megatron_rocm.config.variable import MOST, OURS, REPAIRED, Section, var


class Fp8(Section):
    enabled: bool = var(
        "TE_FP8", False, "matrix products of the layers in FP8, through Transformer Engine; all else stays in BF16",
        note="MI300X, MI355X, H100, B200 and their like; docs/fp8.md",
    )  # fmt: skip
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = var(
        "TE_FP8_RECIPE", "delayed", "how FP8 is scaled: delayed (by earlier steps' largest values), tensorwise (by the "
        "tensor's own), blockwise (by those of 128 elements or 128 × 128) or mxfp8 (of 32 elements)",
        note="which GPU has which: docs/fp8.md",
    )  # fmt: skip
    format: Literal["hybrid", "e4m3"] = var(
        "TE_FP8_FORMAT", "hybrid", "hybrid (gradients in E5M2, all else in E4M3) or e4m3 (everything)",
        text="hybrid; e4m3 for blockwise and mxfp8", state=OURS,
    )  # fmt: skip
    amax_history: int = var(
        "FP8_AMAX_HISTORY", 1024, "with the delayed recipe: micro batches whose largest values are remembered",
        state=OURS, ge=1, le=MOST,
    )  # fmt: skip
    amax_algo: Literal["max", "most_recent"] = var(
        "FP8_AMAX_ALGO", "max", "with the delayed recipe: scale by the largest of them (max) or the last (most_recent)",
        state=OURS,
    )  # fmt: skip
    first_last_bf16: bool = var(
        "FP8_FIRST_LAST_LAYERS_BF16", False, "keep the first FP8_BF16_START and the last FP8_BF16_END layers in BF16",
        state=OURS,
    )  # fmt: skip
    bf16_start: int = var("FP8_BF16_START", 1, "first layers in BF16", state=OURS, ge=0, le=MOST)
    bf16_end: int = var("FP8_BF16_END", 1, "last layers in BF16", state=OURS, ge=0, le=MOST)
    param_gather: bool = var(
        "FP8_PARAM_GATHER", False, "keep the layers' weights in FP8 beside their FP32 masters, and gather them so",
        note="with the distributed optimizer",
    )  # fmt: skip
    transpose_cache: bool = var(
        "FP8_TRANSPOSE_CACHE", True, "make the FP8 copies of weights once a step and keep them; 0 makes them in every "
        "micro batch, and saves their memory", text="1; 0 with FSDP and MEGATRON_FSDP", state=REPAIRED,
        note="megatron-core's `disable_parameter_transpose_cache`; AMD's own switch is in AMD's fork alone",
    )  # fmt: skip
