"""What is wrong with a step: a loss or gradient that is not finite, or a loss that jumps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Literal, NamedTuple

from megatron_rocm.config.schema import RunConfig, Training

WINDOW = 32  # losses that the median is taken of
FEWEST = 8  # before there are so many, no loss is a spike
MOST_CUT = 8.0  # a value so many times what FP8's scale can hold is cut by three of E4M3's fifteen binades

Policy = Literal["warn", "skip", "stop", "rollback"]


class Fault(NamedTuple):
    """Found on every rank alike, as it is judged by what all have: the mean loss and the gradient norm."""

    kind: Literal["nan", "spike"]
    policy: Policy
    what: str  # value and rule, then where it comes from

    @property
    def variable(self) -> str:
        return "NAN_POLICY" if self.kind == "nan" else "SPIKE_POLICY"

    @property
    def leaves_out(self) -> bool:
        """Whether the step's update is not to be made."""
        return self.policy != "warn"


def of_loss(training: Training, recent: Sequence[float], loss: float) -> Fault | None:
    """The fault of a step with this loss, after steps with the losses `recent`."""
    if not math.isfinite(loss):
        return Fault("nan", training.nan_policy, f"the lm loss is {loss}")
    if not training.spike_factor or len(recent) < FEWEST:
        return None
    usual = median(recent)
    if loss <= training.spike_factor * usual:
        return None
    what = (
        f"the lm loss is {loss:.4f}, more than {training.spike_factor:g} times {usual:.4f}, the recent losses' median"
    )
    return Fault("spike", training.spike_policy, what)


def of_amax(training: Training, times: float, what: str) -> Fault | None:
    """The fault of a step with a value, `what`, so many times what its FP8 scale was made for; Inf is no number."""
    if not math.isfinite(times):
        return Fault("nan", training.nan_policy, f"FP8: {what}")
    if not training.spike_factor or times <= MOST_CUT:
        return None
    cut = (
        f"FP8: {what}, {times:.0f} times what its scale was made for, and was cut (TE_FP8_RECIPE=tensorwise scales "
        "each tensor by itself)"
    )
    return Fault("spike", training.spike_policy, cut)


def of_gradient(training: Training, norm: float) -> Fault | None:
    """The fault of a step whose gradient has this norm."""
    if math.isfinite(norm):
        return None
    return Fault("nan", training.nan_policy, f"the lm loss is finite, but the grad norm is {norm}")


def of_overflow(run: RunConfig, scale: float) -> Fault | None:
    """The fault of a step whose gradient overflows in FP16 at this loss scale; None where a smaller one may help."""
    precision = run.precision
    if precision.loss_scale or scale > precision.min_loss_scale:
        return None
    what = f"the gradient overflows at MIN_LOSS_SCALE={scale:g}, the least loss scale"
    return Fault("nan", run.training.nan_policy, what)


def remember(training: Training, recent: list[float], loss: float) -> list[float]:
    """`recent` with one more loss, for the steps to come; empty where no spikes are looked for."""
    if not training.spike_factor:
        return []
    if not math.isfinite(loss):
        return recent
    return [*recent, loss][-WINDOW:]
