"""One process of ours computes what transformers computes, for each family: logits, loss, every weight's gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from parity.families import FAMILIES
from support import ROOT, environment

PROGRAM = Path(__file__).with_name("families.py")
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found() -> Found:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, PROGRAM], capture_output=True, text=True, env=environment(PYTHONPATH=path), timeout=400
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(420)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_transformers(found: Found, family: str) -> None:
    one = found[family]
    assert one["logits"] < 1e-5
    assert one["loss"] < 1e-6
    assert one["compared"] == one["theirs"]  # every weight of theirs, and none else
    assert max(one["gradients"].values()) < 1e-5
    assert min(one["gradients"].values()) > 0  # two programs, not one twice


@pytest.mark.timeout(420)
@pytest.mark.parametrize("family", FAMILIES)
def test_another_rotary_base_is_told_apart(found: Found, family: str) -> None:
    assert found[family]["other base"] > 100 * found[family]["logits"]
