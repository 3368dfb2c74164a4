"""Cross entropy over a vocabulary that tensor parallel ranks share, without a copy of the logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rocm.model.blocks import blocks


def cross_entropy(logits: Tensor, labels: Tensor, tokens: int, group: dist.ProcessGroup) -> Tensor:
    """The loss [s, b], FP32, of `labels` [s, b] under `logits` [s, b, this rank's rows of the vocabulary].

    The vocabulary's first `tokens` rows are tokens; what pads it after them has no part in the softmax and no gradient.
    Logits may be of any floating type; all arithmetic is in FP32. The backward pass turns the logits into their
    gradient in place, so that they are of use to nothing else, and once.
    """
    return _CrossEntropy.apply(logits, labels, tokens, group)  # type: ignore[no-any-return,no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logarithm of each position's sum of exponentials; the backward pass makes the softmax from it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tokens: int, group: dist.ProcessGroup) -> Tensor:
        rows = logits.size(-1)
        first = group.rank() * rows
        real = min(max(tokens - first, 0), rows)
        flat, targets = logits.view(-1, rows), labels.reshape(-1) - first
        mine = (targets >= 0) & (targets < real)
        targets = targets.where(mine, 0)
        target = flat.gather(1, targets.unsqueeze(1)).squeeze(1).float().where(mine, 0.0)
        lse = _log_sum_exp(flat[:, :real])
        if group.size() > 1:
            highest = lse.clone()
            dist.all_reduce(highest, dist.ReduceOp.MAX, group)
            sums = torch.stack([(lse - highest).exp_(), target])
            dist.all_reduce(sums, group=group)
            lse, target = sums[0].log_().add_(highest), sums[1]
        ctx.save_for_backward(logits, targets, mine, lse)
        ctx.real = real
        return (lse - target).view_as(labels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, mine, lse = ctx.saved_tensors
        flat, real = logits.view(-1, logits.size(-1)), ctx.real
        scale, lse, at = grads[0].reshape(-1, 1), lse.unsqueeze(1), targets.unsqueeze(1)
        minus_one = -mine.unsqueeze(1).float()
        for part, x, y in _in_fp32(flat[:, :real]):
            y.sub_(lse[part]).exp_().scatter_add_(1, at[part], minus_one[part])
            y.mul_(scale[part])
            if y is not x:
                x.copy_(y)
        flat[:, real:] = 0
        return logits, None, None, None


def _in_fp32(matrix: Tensor, *, may_write: bool = True) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows: which, as they are, and in FP32: where they are if they are that and one may write, else a copy.

    All copies are in one place, which the next block takes over.
    """
    room: Tensor | None = None
    for part in blocks(len(matrix), matrix.size(1) * 4, matrix.device) if matrix.numel() else ():
        block = matrix[part]
        if may_write and block.dtype == torch.float32:
            yield part, block, block
            continue
        room = torch.empty(block.shape, device=block.device) if room is None else room
        yield part, block, room[: len(block)].copy_(block)


def _log_sum_exp(matrix: Tensor) -> Tensor:
    """log(sum(exp)) of each row, FP32; of no columns, -inf."""
    result = torch.full((len(matrix),), -torch.inf, device=matrix.device)
    for part, _, y in _in_fp32(matrix, may_write=False):
        highest = y.amax(-1, keepdim=True)
        result[part] = y.sub_(highest).exp_().sum(-1).log_().add_(highest.squeeze(-1))
    return result
