"""One step: forward and backward over the micro batches, reduce, clip, update; or past a batch that is bad."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config

from megatron_rocm.checkpoint.state import State
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.model import documents
from megatron_rocm.train import amax, culprit, faults, ramp, signals
from megatron_rocm.train.batches import Batch, Recorded
from megatron_rocm.train.faults import Fault
from megatron_rocm.train.fused import clipped
from megatron_rocm.train.signals import Asked

Batches = Sequence[Iterator[Batch] | None]
Losses = list[dict[str, torch.Tensor]]  # of this rank's micro batches: sums over tokens and their count


class Result(NamedTuple):
    """What a step came to; the same on every rank."""

    loss: float  # mean over all tokens of the global batch, nats
    grad_norm: float  # before clipping; NaN where the update was left out before it was known
    learning_rate: float  # that the update used
    asked: Asked  # what any rank was asked for
    batch_size: int  # sequences over all ranks
    loss_scale: float = 1.0  # of the step to come
    updated: bool = True  # False: weights, moments and schedule are as before
    fault: Fault | None = None


def prepare(run: RunConfig, state: State) -> None:
    """Tell megatron-core's schedules how to reduce and scale gradients."""
    config = get_model_config(state.model[0])
    config.grad_scale_func = state.optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if run.parallel.megatron_fsdp:
        # Always: HSDP adds up its replicas' gradients in the micro batch that this names the last, else never.
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in state.model])
    elif run.parallel.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in state.model])
        config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in state.model])


def _one_or_all(functions: Sequence[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def train_step(run: RunConfig, state: State, batches: Batches) -> Result:
    """Train on the next global batch and advance `state`.

    An overflow in FP16, or a fault whose policy says so, leaves out the update; the data goes on all the same.
    """
    training, optimizer = run.training, state.optimizer
    learning_rate = state.scheduler.get_lr(optimizer.param_groups[0])
    scale = loss_scale(optimizer)
    size = ramp.batch_size(training, state.consumed_samples)
    recorded = [None if one is None else Recorded(one) for one in batches]
    losses = _gradients(run, state, recorded)
    loss, asked = mean_loss(losses)
    cut = _beyond_fp8(run, state)
    fault = faults.of_loss(training, state.recent_losses, loss)
    if fault:
        fault = _with_place(run, state, recorded, losses, fault)
    if cut and (not fault or (fault.kind, cut.kind) == ("spike", "nan")):
        fault = cut
    elif cut and fault:
        fault = fault._replace(what=f"{fault.what}; {cut.what}")
    grad_norm, updated = math.nan, False
    if not (fault and fault.leaves_out):
        grad_norm, overflow = gradient_norm(optimizer)
        found = faults.of_overflow(run, scale) if overflow else faults.of_gradient(training, grad_norm)
        if found and (not fault or fault.kind == "spike"):  # of the two a gradient that is not finite is the worse
            fault = _with_place(run, state, recorded, losses, found)
            if not (overflow or found.leaves_out):
                optimizer.prepare_grads()  # those of the second computation, which are the same
        updated = not (overflow or (fault and fault.leaves_out))
    if fault and fault.kind == "nan" and run.fp8.enabled:
        amax.forget(state.model)
    if updated:
        update(optimizer, grad_norm)
        state.scheduler.step(increment=training.global_batch_size)
    state.iteration += 1
    state.consumed_samples += size
    state.recent_losses = faults.remember(training, state.recent_losses, loss)
    return Result(loss, grad_norm, learning_rate, asked, size, loss_scale(optimizer), updated, fault)


def forward_backward(run: RunConfig, state: State, batches: Batches) -> tuple[float, Asked]:
    """Gradients of the next global batch, reduced and divided by its tokens; the answer is `mean_loss`'s.

    Neither weights nor `state` change: the update is still to come.
    """
    return mean_loss(_gradients(run, state, batches))


def _gradients(run: RunConfig, state: State, batches: Batches) -> Losses:
    for chunk in state.model:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    count = ramp.micro_batches(run.training, state.consumed_samples)
    return _schedule(run, state.model, batches, count, forward_only=False)


def _beyond_fp8(run: RunConfig, state: State) -> Fault | None:
    """The fault of a step with values that FP8's delayed scales could not hold; other recipes have none."""
    if not run.fp8.enabled or run.fp8.recipe != "delayed":
        return None
    count = ramp.micro_batches(run.training, state.consumed_samples)
    seen = amax.worst(state.model, count, faults.MOST_CUT)
    return seen and faults.of_amax(run.training, *seen)


def loss_scale(optimizer: MegatronOptimizer) -> float:
    """That the next step's loss is multiplied by in FP16; else 1."""
    return float(optimizer.get_loss_scale().item())


def gradient_norm(optimizer: MegatronOptimizer) -> tuple[float, bool]:
    """(norm of the gradient that `forward_backward` has left, before clipping; whether it overflows in FP16).

    Hands the gradients to the optimizer, divided by the loss scale, which shrinks on an overflow. The norm is NaN then.
    """
    if optimizer.prepare_grads():
        return math.nan, True
    return float(optimizer.get_grad_norm()), False


def update(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip the gradients, whose norm is `norm`, and step."""
    with clipped(optimizer, norm):
        optimizer.step_with_ready_grads()


def _with_place(
    run: RunConfig, state: State, batches: Sequence[Recorded | None], losses: Losses, fault: Fault
) -> Fault:
    """The fault with the place it comes from. Leaves the gradients as they are."""
    if fault.kind == "spike":
        return fault._replace(what=f"{fault.what}; {culprit.largest(state.model, losses)}")

    def again() -> None:
        _gradients(run, state, [None if one is None else iter(one.seen) for one in batches])

    return fault._replace(what=f"{fault.what}; {culprit.first_not_finite(state.model, again)}")


def forward(run: RunConfig, model: list[torch.nn.Module], batches: Batches) -> Losses:
    """Loss sums of the next BS samples, without gradients."""
    with torch.no_grad():
        return _schedule(run, model, batches, run.training.num_micro_batches, forward_only=True)


def mean_loss(losses: Losses) -> tuple[float, Asked]:
    """(mean loss over all tokens of the global batch, what any rank was asked for), the same on every rank.

    Sums are added up exactly, so that the mean does not depend on how the tokens are spread.
    """
    counts = mpu.is_pipeline_last_stage(ignore_virtual=True) and mpu.get_tensor_model_parallel_rank() == 0
    total = torch.zeros(4, dtype=torch.float64, device=torch.cuda.current_device())
    if counts:
        total[:2] = torch.stack([micro["lm loss"].double() for micro in losses]).sum(0)
    total[2:] = torch.tensor(signals.asked(), dtype=torch.float64)
    dist.all_reduce(total)
    loss_sum, tokens, stop, save = total.tolist()
    return loss_sum / max(tokens, 1.0), Asked(stop > 0, save > 0)


def _schedule(
    run: RunConfig, model: list[torch.nn.Module], batches: Batches, count: int, *, forward_only: bool
) -> Losses:
    packed, rows = documents.are_packed(run), run.training.micro_batch_size
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, run),
        data_iterator=_one_or_all(list(batches)),
        model=_one_or_all(model),
        num_microbatches=count,
        seq_length=run.training.seq_length * (rows if packed else 1),
        micro_batch_size=1 if packed else rows,
        forward_only=forward_only,
    )


def _forward_step(run: RunConfig, batches: Iterator[Batch] | None, chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    if batches is None:  # neither the first nor the last of the pipeline, and documents are not looked for
        return chunk(None, None, None), None
    batch = next(batches)
    bounds = documents.boundaries(run, batch["tokens"]) if run.data.reset_attention_mask else None
    if documents.are_packed(run):
        batch = {name: values.reshape(1, -1) for name, values in batch.items()}
    device = torch.cuda.current_device()
    batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
    batch = get_batch_on_this_cp_rank(batch)
    output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=bounds)
    return output, partial(_loss, batch["loss_mask"])


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(sum over the micro batch's tokens, their count, what is reported)."""
    mask = mask.reshape(-1).float()
    counted = losses.reshape(-1).float() * mask
    tokens = mask.sum()
    # In FP32 the sum alone is off by more than a layout's rounding.
    exact = torch.sum(counted.detach(), dtype=torch.float64)
    return torch.sum(counted), tokens.to(torch.int), {"lm loss": torch.stack([exact, tokens.double()])}
