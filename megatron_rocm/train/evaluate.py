"""Validation loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import Dataset

from megatron_rocm.checkpoint.state import State
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.train.batches import micro_batches
from megatron_rocm.train.step import forward, mean_loss


def validation_loss(run: RunConfig, state: State, dataset: Dataset[Any]) -> tuple[float, bool]:
    """(mean loss over the first EVAL_ITERS global batches, whether a rank was asked to stop), the same on every rank.

    Always the same samples, so that one evaluation compares with the next. Ends early when asked to stop.
    """
    batches = [micro_batches(run, dataset, 0, chunk) for chunk in state.model]
    total = 0.0
    with evaluating(state):
        for done in range(1, run.logging.eval_iters + 1):
            loss, asked = mean_loss(forward(run, state.model, batches))
            total += loss
            if asked.stop:
                return total / done, True
    return total / run.logging.eval_iters, False


@contextmanager
def evaluating(state: State) -> Iterator[None]:
    """The model in evaluation mode, with whole parameters."""
    with state.whole_parameters():
        for chunk in state.model:
            chunk.eval()
        yield
        for chunk in state.model:
            chunk.train()
