"""One step: forward and backward over the micro batches, reduce, clip, update."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config

from megatron_rocm.checkpoint.state import State
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.train import signals
from megatron_rocm.train.batches import Batch

Batches = list[Iterator[Batch] | None]


class Result(NamedTuple):
    """What a step came to; the same on every rank."""

    loss: float  # mean over all tokens of the global batch, nats
    grad_norm: float  # before clipping
    learning_rate: float  # that the update used
    stop: bool  # a rank was asked to stop


def prepare(run: RunConfig, state: State) -> None:
    """Tell megatron-core's schedules how to reduce and scale gradients."""
    config = get_model_config(state.model[0])
    config.grad_scale_func = state.optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if run.parallel.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in state.model])
        config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in state.model])


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def train_step(run: RunConfig, state: State, batches: Batches) -> Result:
    """Train on the next global batch and advance `state`."""
    for chunk in state.model:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    learning_rate = state.scheduler.get_lr(state.optimizer.param_groups[0])
    losses = _schedule(run, state.model, batches, forward_only=False)
    loss, stop = mean_loss(losses)
    _, grad_norm, _ = state.optimizer.step()
    state.scheduler.step(increment=run.training.global_batch_size)
    state.iteration += 1
    state.consumed_samples += run.training.global_batch_size
    return Result(loss, float(grad_norm), learning_rate, stop)


def forward(run: RunConfig, model: list[torch.nn.Module], batches: Batches) -> list[dict[str, torch.Tensor]]:
    """Loss sums of the next global batch, without gradients."""
    with torch.no_grad():
        return _schedule(run, model, batches, forward_only=True)


def mean_loss(losses: list[dict[str, torch.Tensor]]) -> tuple[float, bool]:
    """(mean loss over all tokens of the global batch, whether a rank was asked to stop), the same on every rank.

    `losses` are this rank's micro batches: sums over tokens and their count. Sums are added up exactly, so that the
    mean does not depend on how the tokens are spread.
    """
    counts = mpu.is_pipeline_last_stage(ignore_virtual=True) and mpu.get_tensor_model_parallel_rank() == 0
    total = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
    if counts:
        total[:2] = torch.stack([micro["lm loss"].double() for micro in losses]).sum(0)
    total[2] = signals.received()
    dist.all_reduce(total)
    loss_sum, tokens, stop = total.tolist()
    return loss_sum / max(tokens, 1.0), stop > 0


def _schedule(
    run: RunConfig, model: list[torch.nn.Module], batches: Batches, *, forward_only: bool
) -> list[dict[str, torch.Tensor]]:
    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=_one_or_all(batches),
        model=_one_or_all(model),
        num_microbatches=run.training.num_micro_batches,
        seq_length=run.training.seq_length,
        micro_batch_size=run.training.micro_batch_size,
        forward_only=forward_only,
    )


def _forward_step(batches: Iterator[Batch] | None, chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    if batches is None:  # neither the first nor the last of the pipeline
        return chunk(None, None, None), None
    device = torch.cuda.current_device()
    batch = {name: values.to(device, non_blocking=True) for name, values in next(batches).items()}
    batch = get_batch_on_this_cp_rank(batch)
    output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_loss, batch["loss_mask"])


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(sum over the micro batch's tokens, their count, what is reported)."""
    mask = mask.reshape(-1).float()
    total = torch.sum(losses.reshape(-1).float() * mask)
    tokens = mask.sum()
    return total, tokens.to(torch.int), {"lm loss": torch.stack([total.detach(), tokens])}
