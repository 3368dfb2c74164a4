"""FP8 by GPU architecture, as data: which recipes it has, in which eight bits, and what each recipe asks of a run.

Sources: check_fp8_support and its neighbours in transformer_engine/pytorch/quantization.py, NVIDIA's (2.11) and AMD's
(030b7921); for the formats transformer_engine/common/recipe/__init__.py, NVIDIA's and AMD's (02858707).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rocm.platform.machine import Machine

OCP = "OCP E4M3, up to 448"
FNUZ = "FNUZ E4M3, up to 240"


@dataclass(frozen=True)
class Chip:
    """An architecture that computes in FP8: as which machines it is sold, its E4M3, and its recipes."""

    machines: str
    e4m3: str
    recipes: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A way to scale. Each side of a matrix must be a multiple of `unit` (by vendor), and where sequence parallelism
    gathers them, the tokens of one GPU of `gathered`. `lacking` says why a GPU has no such recipe, by its vendor.
    """

    scale: str
    unit: Mapping[str, int]
    gathered: int
    lacking: Mapping[str, str]


CHIPS: Mapping[str, Chip] = {
    "gfx942": Chip("MI300X, MI325X", FNUZ, ("delayed", "tensorwise")),
    "gfx950": Chip("MI350X, MI355X", OCP, ("delayed", "tensorwise", "mxfp8")),
    "sm_89": Chip("L40S, RTX 4090", OCP, ("delayed", "tensorwise")),
    "sm_90": Chip("H100, H200", OCP, ("delayed", "tensorwise", "blockwise")),
    "sm_100": Chip("B200, GB200", OCP, ("delayed", "tensorwise", "blockwise", "mxfp8")),
    "sm_103": Chip("B300, GB300", OCP, ("delayed", "tensorwise", "blockwise", "mxfp8")),
    "sm_120": Chip("RTX 5090, RTX PRO 6000", OCP, ("delayed", "tensorwise")),
}

# Why others have none.
WITHOUT: Mapping[str, str] = {
    "gfx90a": "an MI250X has no FP8 in hardware",
    "sm_80": "FP8 begins with compute capability 8.9, and an A100 has 8.0",
    "cpu": "FP8 is computed by Transformer Engine, on a GPU",
}
NOT_KNOWN = "Transformer Engine computes in FP8 on " + ", ".join(CHIPS) + " alone"

_BLACKWELL = "its 32-element scales need Blackwell (sm_100) or gfx950"
# assert_dim_for_fp8_exec in transformer_engine/pytorch/utils.py, MXFP8_BLOCK_SCALING_SIZE in constants.py, AMD's
# tests/cpp/operator/test_cublaslt_gemm.cu (MXFP8 with a sum over 128s; each side is summed over in one of the three
# products), and Quantizer.is_quantizable, which assert_dim_for_all_gather asks for what sequence parallelism gathers.
_SIXTEEN = {"amd": 16, "nvidia": 16}
RECIPES: Mapping[str, Recipe] = {
    "delayed": Recipe("one a tensor, by the largest values of earlier micro batches", _SIXTEEN, 16, {}),
    "tensorwise": Recipe("one a tensor, by its own largest value", _SIXTEEN, 16, {}),
    "blockwise": Recipe(
        "one a 1 × 128 piece of activations and a 128 × 128 block of weights", _SIXTEEN, 128,
        {
            "amd": "AMD's Transformer Engine has no products with such scales",
            "nvidia": "it needs an H100's or B200's products by blocks (sm_90, sm_100)",
        },
    ),
    "mxfp8": Recipe(
        "one a 32 elements, a power of two", {"amd": 128, "nvidia": 32}, 32, {"amd": _BLACKWELL, "nvidia": _BLACKWELL}
    ),
}  # fmt: skip


def without(machine: Machine) -> str:
    """Why a machine computes nothing in FP8; "" where its GPU can."""
    return "" if machine.arch in CHIPS else WITHOUT.get(machine.arch, NOT_KNOWN)


def recipes(machine: Machine) -> tuple[str, ...]:
    """The recipes that a machine's GPU has."""
    return CHIPS[machine.arch].recipes if machine.arch in CHIPS else ()
