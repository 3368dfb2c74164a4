"""State of the optimizers before their first step, and their count of steps.

megatron-core 0.16.1 keeps checkpoints as the fused Adam of Transformer Engine and Apex needs it. Where these are
missing it trains with torch's Adam and SGD, and its own way of saving and loading (lines of megatron/core/optimizer)
fails:

- distrib_optimizer.py:642 asserts that there is Adam state, which before the first step there is not;
- distrib_optimizer.py:940 asks the checkpoint for `step`, which is not kept per parameter, and copies into leaves;
- distrib_optimizer.py:807 gives all parameters one `step` tensor, which every parameter then increments, so that a
  resumed run silently diverges;
- optimizer.py:791 and :1019 call a state initializer that SGD, also that of the fused ones, does not have;
- optimizer.py:845 and :1033 leave out a `step` of zero, without which Adam's state does not load.

So checkpoint/shards.py writes and reads the bare tensors, for which state must be there (`initialize`), and steps are
counted and set here. A checkpoint has one count for all parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

_ADAM = (torch.optim.Adam, torch.optim.AdamW)
_TORCH = (*_ADAM, torch.optim.SGD)


def parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """The optimizers chained in this one that have parameters."""
    return (part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if not part.is_stub_optimizer)


def initialize(optimizer: MegatronOptimizer) -> None:
    """Give parameters that have no optimizer state yet the state they have before the first step.

    Needed before a load and before a save that no step precedes. Parameters are not changed, nor is state that is
    there; but an optimizer in host memory, which makes its state in a step, changes parameters: load, then.
    """
    for part in parts(optimizer):
        inner = part.optimizer
        if isinstance(inner, _TORCH):
            _initialize(inner)
        elif hasattr(inner, "dummy_step"):
            if not inner.state:
                inner.dummy_step()
        else:
            (part.init_state_fn or _initialize_momentum)(inner, part.config)


def _initialize(inner: torch.optim.Optimizer) -> None:
    for group in inner.param_groups:
        for param in group["params"]:
            if not inner.state[param]:
                inner.state[param] = _first_state(inner, group, param)


def _first_state(inner: torch.optim.Optimizer, group: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
    """The state with which torch's Adam or SGD begins its first step."""
    if isinstance(inner, _ADAM):
        moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": _step_zero(group, param), **moments}
    return {"momentum_buffer": torch.zeros_like(param)} if group["momentum"] else {}


def _step_zero(group: Mapping[str, Any], param: Tensor) -> Tensor:
    """Torch keeps the step count beside the parameter for fused and capturable optimizers, else on the CPU."""
    beside = group.get("fused") or group.get("capturable")
    return torch.zeros((), dtype=torch.float32, device=param.device if beside else "cpu")


def _initialize_momentum(inner: torch.optim.Optimizer, config: Any = None) -> None:
    """State of an SGD that is not torch's before its first step; zeros do as the first gradient would alone."""
    for group in inner.param_groups:
        for param in group["params"]:
            if group.get("momentum") and not inner.state[param]:
                inner.state[param]["momentum_buffer"] = torch.zeros_like(param)


def steps(optimizer: MegatronOptimizer) -> float:
    """Steps that the optimizer has counted, for each parameter or for a group; 0 where it does not count."""
    counts = [0.0]
    for part in parts(optimizer):
        counts += [float(state["step"]) for state in part.optimizer.state.values() if "step" in state]
        counts += [float(group["step"]) for group in part.optimizer.param_groups if "step" in group]
    return max(counts)


def steps_in(saved: Any) -> float:
    """The count of steps in a checkpoint's `optimizer`, wherever megatron-core's optimizers or ours have put it."""
    if isinstance(saved, dict):
        found = [float(saved[name]) for name in ("step", "common_step") if saved.get(name) is not None]
        return max([0.0, *found, *map(steps_in, saved.values())])
    return max(map(steps_in, saved), default=0.0) if isinstance(saved, list) else 0.0


def set_steps(optimizer: MegatronOptimizer, count: float) -> None:
    """Go on after so many steps.

    Raises RuntimeError where the optimizer would go on without what it has to remember.
    """
    for part in parts(optimizer):
        inner = part.optimizer
        for group in inner.param_groups:
            states = [inner.state[param] for param in group["params"]]
            if count and not all("exp_avg" in state for state in states):
                raise RuntimeError(f"{type(inner).__name__} has no moments to load")
            counted = [state["step"] for state in states if "step" in state]
            for step in counted:
                step.fill_(count)
            if states and not counted and (count or "step" in group):
                group["step"] = int(count)  # Transformer Engine's and Apex's Adam
