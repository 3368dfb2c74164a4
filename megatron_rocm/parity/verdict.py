"""How far a layout lies from its reference, and how far it may."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rocm.config.schema import RunConfig


@dataclass(frozen=True)
class Allowed:
    """The largest differences that rounding explains up to a step, counted from 1."""

    until: int
    loss: float  # nats
    norm: float  # relative


@dataclass(frozen=True)
class Tolerance:
    """What a precision explains. `gradient` is relative, of any one parameter in the first step."""

    gradient: float
    steps: tuple[Allowed, ...]  # the last one's hold from there on
    why: str

    def at(self, step: int) -> Allowed:
        """What step number `step`, from 1, may differ by."""
        return next((allowed for allowed in self.steps if step <= allowed.until), self.steps[-1])


# Several times what was found (docs/parity.md).
TOLERANCES = {
    "fp32": Tolerance(
        1e-5, (Allowed(1, 1e-6, 1e-5), Allowed(5, 5e-5, 1e-3), Allowed(20, 1e-3, 1e-1)),
        "FP32 keeps 24 bits: the same sum in another order differs by 1e-7 of its size, and 1e-6 after all layers",
    ),
    "bf16": Tolerance(
        5e-2, (Allowed(1, 1e-3, 1e-2), Allowed(20, 1e-1, 5e-1)),
        "BF16 keeps 8 bits: each product and each activation is rounded by 4e-3, weights have FP32 master copies",
    ),
    "fp16": Tolerance(
        1e-2, (Allowed(1, 2e-4, 2e-3), Allowed(20, 5e-2, 2e-1)),
        "FP16 keeps 11 bits: each product and each activation is rounded by 5e-4, weights have FP32 master copies",
    ),
}  # fmt: skip
LATER = "Adam divides a gradient by its own size, so that later steps add to rounding what it makes of it"


@dataclass(frozen=True)
class Differences:
    """The largest over all steps; of gradients, over all parameters in the first step. `agree` is the verdict."""

    loss: float  # nats
    norm: float  # relative
    gradient: float  # relative: |difference| / |reference| of one parameter's gradient
    parameter: str  # the one
    agree: bool


def tolerance(run: RunConfig) -> Tolerance:
    """What the run's precision explains."""
    return TOLERANCES[run.precision.dtype]


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], allowed: Tolerance) -> Differences:
    """Between two `Measured`, as read from their files."""
    gradients = {name: _infinite(value) for name, value in found["gradients"].items()}
    parameter = max(gradients, key=lambda name: gradients[name])
    losses = [_infinite(abs(a - b)) for a, b in zip(found["losses"], expected["losses"], strict=True)]
    norms = [_infinite(abs(a - b) / abs(b or 1.0)) for a, b in zip(found["norms"], expected["norms"], strict=True)]
    agree = gradients[parameter] <= allowed.gradient and all(
        loss <= allowed.at(step).loss and norm <= allowed.at(step).norm
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1)
    )
    return Differences(max(losses), max(norms), gradients[parameter], parameter, agree)


def _infinite(value: float) -> float:
    """What is not a number is larger than any."""
    return math.inf if math.isnan(value) else value
