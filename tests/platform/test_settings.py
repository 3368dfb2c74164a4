"""The environment of a deterministic run."""

from __future__ import annotations

import datetime

import pytest

from megatron_rocm.config import read
from megatron_rocm.platform.machine import find
from megatron_rocm.platform.settings import LIBRARY_PREFIXES, YOURS
from megatron_rocm.resolve import resolve
from megatron_rocm.resolve.resolve import Resolution

ROWS = {"NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
OF_VENDOR = {
    "mi300x": {"ROCBLAS_DEFAULT_ATOMICS_MODE": "0", "TORCH_COMPILE_DISABLE": "1"},
    "h100": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
}


def resolved(*arguments: str) -> Resolution:
    request = read("llama3", arguments, {}, LIBRARY_PREFIXES)
    machine = find(request.text("TARGET"))
    return resolve(request, machine, {}, dry_run=True, now=datetime.datetime(2026, 1, 2, 12))


@pytest.mark.parametrize("target", OF_VENDOR)
def test_deterministic_runs_have_their_settings(target: str) -> None:
    expected = ROWS | OF_VENDOR[target]
    result = resolved("MODEL_SIZE=8", f"TARGET={target}", "DETERMINISTIC=1", "USE_FLASH_ATTN=1")
    assert {name: result.environment[name][0] for name in expected} == expected
    assert "TE_HIPBLASLT_TUNING_RUN_COUNT" not in result.environment  # it takes the kernel that was fastest just then
    assert not result.config.precision.flash_attention and not result.config.precision.cross_entropy_loss_fusion
    assert any("USE_FLASH_ATTN=1 becomes 0" in note for note in result.notes)
    others = OF_VENDOR["h100" if target == "mi300x" else "mi300x"]
    assert not set(others) & set(result.environment)
    assert not set(expected) & set(resolved("MODEL_SIZE=8", f"TARGET={target}").environment)


def test_another_algorithm_of_collectives_is_the_users() -> None:
    environment = resolved("TARGET=h100", "MODEL_SIZE=8", "DETERMINISTIC=1", "NCCL_ALGO=Tree").environment
    assert environment["NCCL_ALGO"] == ("Tree", YOURS)
