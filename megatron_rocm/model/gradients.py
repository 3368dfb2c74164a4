"""How gradients get into the buffers that megatron-core reduces."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

# Elements at a time: of a sum of two types torch first makes a copy on a CPU, which then stays in cache.
BLOCK = 1 << 18


class DataParallel(DistributedDataParallel):
    """megatron-core's, which on a CPU spares what it does to memory in each step.

    The first micro batch's gradient is copied into the buffer, which so needs no zeros to add it to; later ones of 16
    bits are added without a copy in FP32 of their size. megatron-core adds gradients in a hook of its own
    (distributed_data_parallel.py:437), which finds them added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ours: set[torch.nn.Parameter] = set()
        self._fresh: set[torch.nn.Parameter] = set()  # of ours: nothing of this step is in their buffers yet
        for parameter in self.params_with_grad:
            # Where it looks at gradients when they are ready, it adds such a one whatever it finds.
            added_anyhow = self.ddp_config.overlap_grad_reduce and getattr(parameter, "zero_out_wgrad", False)
            if not parameter.is_cuda and not added_anyhow:
                self._ours.add(parameter)
                parameter.register_post_accumulate_grad_hook(self._take)

    def zero_grad_buffer(self) -> None:
        """Before a step; ours keep what they have until their first gradient comes."""
        if not self._ours:
            super().zero_grad_buffer()
            return
        self._fresh = set(self._ours)
        for parameter in self.params_with_grad:
            parameter.grad_added_to_main_grad = False
            if parameter not in self._ours:
                parameter.main_grad.zero_()  # type: ignore[attr-defined]
        for group in self.bucket_groups + self.expert_parallel_bucket_groups:
            group.reset()

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Reduce; a parameter that got no gradient has one of zeros."""
        for parameter in self._fresh:
            parameter.main_grad.zero_()  # type: ignore[attr-defined]
        self._fresh.clear()
        super().finish_grad_sync(force_all_reduce=force_all_reduce)

    @torch.no_grad()
    def _take(self, parameter: Any) -> None:
        buffer, grad = parameter.main_grad.view(-1), parameter.grad.reshape(-1)
        if parameter in self._fresh:
            self._fresh.remove(parameter)
            buffer.copy_(grad)
        else:
            size = grad.numel() if grad.dtype == buffer.dtype else BLOCK
            for into, part in zip(buffer.split(size), grad.split(size), strict=True):
                into.add_(part)
        if self.ddp_config.overlap_grad_reduce:
            parameter.grad_added_to_main_grad = True
        else:
            parameter.grad = None
