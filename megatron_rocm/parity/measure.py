"""A few steps of a run, measured: losses, gradient norms, and the first step's gradient of every parameter."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from megatron.core import parallel_state as mpu
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.parity import gradients, reference
from megatron_rocm.train.batches import micro_batches
from megatron_rocm.train.distributed import form_groups
from megatron_rocm.train.loop import build, open_data
from megatron_rocm.train.step import forward_backward, gradient_norm, prepare, update


@dataclass
class Measured:
    """One value a step. `gradients` are relative differences by parameter to those of the reference."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # before clipping
    learning_rates: list[float] = field(default_factory=list)
    gradients: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as JSON; whole or not at all."""
        partial = path.with_name(f".{path.name}")
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(path)


def measure(run: RunConfig, steps: int, folder: Path) -> Measured:
    """Train `steps` steps in the run's layout; its gradients against those kept in `folder`."""
    form_groups(run)
    measured, _ = _train(run, steps, folder)
    return measured


def measure_references(run: RunConfig, steps: int, folder: Path) -> tuple[Measured, Measured]:
    """(one process of ours, transformers' model) from the same weights.

    Our gradients stay in `folder`; the differences of `gradients` are those of ours to transformers'.
    """
    form_groups(run)
    ours, weights = _train(run, steps, folder, keep=True)
    model = reference.build(run, weights)
    weights.clear()
    dataset, _ = open_data(run)
    optimizer = reference.optimizer(run, model)
    theirs = Measured(learning_rates=ours.learning_rates)
    for step, rate in enumerate(ours.learning_rates):
        theirs.losses.append(reference.forward_backward(run, model, dataset, step))
        if step == 0:
            ours.gradients = gradients.differences(folder, reference.gradients(run, model))
        theirs.norms.append(reference.update(run, model, optimizer, rate))
    return ours, theirs


def _train(run: RunConfig, steps: int, folder: Path, *, keep: bool = False) -> tuple[Measured, dict[str, torch.Tensor]]:
    """`keep`: write the gradients to `folder` instead of comparing them, and give back the initial weights as
    transformers has them."""
    dataset, _ = open_data(run)
    state = build(run)
    prepare(run, state)
    weights = reference.exported(state.model[0], run.model) if keep else {}
    batches = [micro_batches(run, dataset, 0, chunk) for chunk in state.model]
    measured = Measured()
    for step in range(steps):
        loss, _ = forward_backward(run, state, batches)
        if step == 0 and keep:
            for name, copies in gradients.whole(state, run.model):
                gradients.write(folder, name, copies[0])
        elif step == 0:
            measured.gradients = gradients.differences(folder, gradients.whole(state, run.model))
        measured.losses.append(loss)
        measured.learning_rates.append(state.scheduler.get_lr(state.optimizer.param_groups[0]))
        norm, overflow = gradient_norm(state.optimizer)
        if not overflow:
            update(state.optimizer, norm)
            state.scheduler.step(increment=run.training.global_batch_size)
        measured.norms.append(norm)
    return measured, weights


def forget() -> None:
    """Make room for the next run in the same processes."""
    mpu.destroy_model_parallel()
    # DTensor's operations answer with a mesh that equals theirs: that of the run before, and its groups.
    _clear_sharding_prop_cache()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
