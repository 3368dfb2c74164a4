"""What Transformer Engine's delayed scaling has seen: largest values beyond what their scale could hold.

Under delayed scaling a tensor is scaled by the largest absolute values ("amax") of earlier micro batches. What exceeds
them is cut to the largest number that FP8 has, without a word; where it is Inf, the scale stays as it is until the
history has forgotten it. Other recipes scale by the tensor itself: there is nothing to look at.

The layout is Transformer Engine's: TransformerEngineBaseModule.fp8_meta has a DelayedScalingRecipeState under
"scaling_fwd" and "scaling_bwd", and its `recipe` (transformer_engine/pytorch/module/base.py); `amax_history` is
[history, tensors], whose first row is for the micro batch to come, zero after an update, and whose last is the newest
(transformer_engine/pytorch/quantization.py, common/recipe/delayed_scaling.cu). A zero leaves the history as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rocm.model.llama import core
from megatron_rocm.train import culprit

# Columns of a history, by direction: FP8FwdTensors and FP8BwdTensors in transformer_engine/pytorch/csrc/common.h.
TENSORS = {
    "scaling_fwd": ("input", "weight", "output"),
    "scaling_bwd": ("output's gradient", "input's gradient"),
}
FEWEST = 8  # earlier values; before there are so many, none is beyond them


class Seen(NamedTuple):
    """The worst of a step, the same on every rank: so many times what its scale was made for. Inf is no number."""

    times: float
    what: str


class _Entry(NamedTuple):
    """A history of one module, and what its columns are called."""

    history: Tensor
    names: tuple[str, ...]
    recipe: Any


def worst(model: Sequence[Any], micro_batches: int, least: float) -> Seen | None:
    """What exceeded its scale by more than `least` in the step just computed, or was no number; None for nothing.

    Every rank calls it, and it costs a few kernels and the reduction of one number.
    """
    entries = list(_entries(model))
    times = _times(entries, micro_batches)
    everywhere = times.max()
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
    most = float(everywhere)
    if most <= least:
        return None
    mine = _newest(entries, int(times.argmax()), micro_batches) if float(times.max()) == most else None
    answers = culprit.of_all_ranks(mine)
    ranks = [rank for rank, answer in enumerate(answers) if answer]
    name, value = answers[ranks[0]]
    return Seen(most, f"the largest value of the {name} {culprit.on(ranks)} is {value:.4g}")


def forget(model: Sequence[Any]) -> None:
    """Take Inf out of the histories, which would hold their scales for as long as they remember it."""
    for entry in _entries(model):
        entry.history.masked_fill_(~entry.history.isfinite(), 0.0)


def _entries(model: Sequence[Any]) -> Iterator[_Entry]:
    for chunk in model:
        inner = core(chunk)
        for name, module in inner.named_modules():
            meta = getattr(module, "fp8_meta", None) or {}
            for key, tensors in TENSORS.items():
                history = getattr(meta.get(key), "amax_history", None)
                if history is None:
                    continue
                _, place = culprit.place(inner, name)
                count = -(-history.shape[1] // len(tensors))
                yield _Entry(history, tuple(f"{tensor} of {place}" for tensor in tensors * count), meta["recipe"])


def _times(entries: Sequence[_Entry], micro_batches: int) -> Tensor:
    """By how much each column's new values exceed the earlier ones, over all entries; Inf for what is no number.

    At least one column, so that a rank without any has an answer too.
    """
    if not entries:
        return torch.zeros(1, device=torch.cuda.current_device())
    rows = torch.cat([entry.history for entry in entries], 1)[1:]
    names = [name for entry in entries for name in entry.names]
    # A weight has one new value a step: its earlier ones were looked at in the steps before.
    new = torch.tensor([1 if name.startswith("weight") else micro_batches for name in names], device=rows.device)
    is_new = torch.arange(rows.shape[0], 0, -1, device=rows.device).unsqueeze(1) <= new
    bad = (is_new & ~rows.isfinite()).any(0)
    if rows.shape[0] < 2:  # nothing is remembered that a value could be compared with
        return torch.where(bad, torch.inf, 0.0)
    recipe = entries[0].recipe
    held = rows.cummax(0).values if recipe.amax_compute_algo == "max" else rows
    before = held[:-1] * 2.0**recipe.margin
    enough = (rows > 0).cumsum(0)[:-1] >= min(FEWEST, rows.shape[0] - 1)
    times = torch.where(is_new[1:] & enough & (before > 0), rows[1:] / before, 0.0).amax(0)
    return torch.where(bad, torch.inf, times)


def _newest(entries: Sequence[_Entry], column: int, micro_batches: int) -> tuple[str, float]:
    """What the tensor of a column of all entries is called, and its largest new value."""
    values = torch.cat([entry.history[1:][-micro_batches:] for entry in entries], 1)[:, column]
    return [name for entry in entries for name in entry.names][column], float(values.max())
