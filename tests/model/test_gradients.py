"""Gradients in our data parallel wrapper are those in megatron-core's, over steps of several micro batches."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import execute, tiny_run

COMPARE = str(Path(__file__).with_name("data_parallel.py"))


@pytest.mark.timeout(300)
def test_buffers_are_megatron_core_s(tmp_path: Path) -> None:
    said = execute(tiny_run(tmp_path, dp=2), COMPARE, timeout=240)
    assert said.count("the same buffers, 5 steps") == 2 * 8, said
