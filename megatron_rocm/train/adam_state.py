"""State of the optimizers, so that megatron-core 0.16.1 saves and loads it exactly.

Where Transformer Engine and Apex are missing, megatron-core trains with torch's Adam and SGD but keeps checkpoints as
the fused optimizers of those two need it. What goes wrong (lines of megatron/core/optimizer), and is put right here:

- distrib_optimizer.py:642 asserts that there is Adam state, which before the first step there is not;
- distrib_optimizer.py:940 asks the checkpoint for `step`, which is not kept per parameter, and copies into leaves;
- distrib_optimizer.py:807 gives all parameters one `step` tensor, which every parameter then increments, so that a
  resumed run silently diverges;
- optimizer.py:791 and :1019 call a state initializer that SGD, also that of the fused ones, does not have;
- optimizer.py:845 and :1033 leave out a `step` of zero, without which Adam's state does not load.

    with loading(optimizer):
        state = load({..., "optimizer": optimizer.sharded_state_dict(..., is_loading=True, ...)}, folder)
        optimizer.load_state_dict(state["optimizer"])

Of Transformer Engine's and Apex's optimizers SGD's missing initializer is put right; their Adam is left alone. FSDP's
checkpoints, which checkpoint/fsdp.py makes of the bare tensors, need `initialize_all` for them.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_ADAM = (torch.optim.Adam, torch.optim.AdamW)
_TORCH = (*_ADAM, torch.optim.SGD)


def initialize(optimizer: MegatronOptimizer) -> None:
    """Give parameters that have no optimizer state yet the state they have before the first step.

    Parameters are not changed, nor is state that is there. Needed before a save that no step precedes.
    """
    for part in _torch_parts(optimizer):
        _initialize(part.optimizer)


def initialize_all(optimizer: MegatronOptimizer) -> None:
    """`initialize` also for the fused optimizers, by megatron-core's own means where it has them."""
    initialize(optimizer)
    for part in _parts(optimizer):
        if not isinstance(part.optimizer, _TORCH):
            (part.init_state_fn or _initialize_momentum)(part.optimizer, part.config)


@contextmanager
def loading(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Within this, `sharded_state_dict(is_loading=True)` and `load_state_dict` of the optimizer are exact.

    Works for one process and for many, with and without the distributed optimizer.
    """
    initialize(optimizer)
    for part in _parts(optimizer):
        part.init_state_fn = part.init_state_fn or _initialize_momentum
    parts = list(_torch_parts(optimizer))
    for part in parts:
        part.init_state_fn = lambda inner, config=None: _initialize(inner)
        name, method = _repair(part)
        setattr(part, name, types.MethodType(method, part))
    try:
        yield
    finally:
        for part in parts:
            delattr(part, _repair(part)[0])
    for part in parts:
        _own_steps(part.optimizer)


def _torch_parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """Those that run on torch's Adam or SGD."""
    return (part for part in _parts(optimizer) if isinstance(part.optimizer, _TORCH))


def _parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """The optimizers chained in this one that have parameters."""
    return (part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if not part.is_stub_optimizer)


def _initialize_momentum(inner: torch.optim.Optimizer, config: Any = None) -> None:
    """State of an SGD that is not torch's before its first step; zeros do as the first gradient would alone."""
    for group in inner.param_groups:
        for param in group["params"]:
            if group.get("momentum") and not inner.state[param]:
                inner.state[param]["momentum_buffer"] = torch.zeros_like(param)


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


def _repair(part: MegatronOptimizer) -> tuple[str, Callable[..., None]]:
    """The method of this optimizer that fails while loading, and what stands in for it meanwhile."""
    if isinstance(part, DistributedOptimizer):
        return "_set_main_param_and_optimizer_states", _copy_into_shard
    return "load_state_dict", _load_from_step_zero


@torch.no_grad()
def _copy_into_shard(self: DistributedOptimizer, model_param: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """`DistributedOptimizer._set_main_param_and_optimizer_states` for tensors that have no `step`."""
    group, index = self.model_param_group_index_map[model_param]
    shard = self.optimizer.param_groups[group]["params"][index]
    for name, mine in {"param": shard, **self.optimizer.state[shard]}.items():
        if name != "step":
            mine.copy_(tensors[name])


def _load_from_step_zero(self: Any, state_dict: dict[str, Any]) -> None:
    """`load_state_dict` of the optimizers that are not distributed, where a step of zero may be missing."""
    if isinstance(self.optimizer, _ADAM):
        state_dict.get("optimizer", state_dict)["state"].setdefault("common_step", torch.zeros(()))
    type(self).load_state_dict(self, state_dict)


def _own_steps(inner: torch.optim.Optimizer) -> None:
    for state in inner.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()
