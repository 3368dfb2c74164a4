"""Where in the model, and on which rank, a bad step comes from. Looked for only once there is one.

Layers are counted as megatron-core does, from 1 over all pipeline stages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_rocm.model.fp8 import plain, scaled_with_delay
from megatron_rocm.model.llama import core

MOST_NAMED = 4  # ranks in one message


class Seen(NamedTuple):
    """Something not finite. The smallest is where it comes from: `order` is comparable between ranks."""

    order: tuple[int, ...]
    what: str


def first_not_finite(model: Sequence[Any], again: Callable[[], Any]) -> str:
    """What the first value is that is not finite, and on which ranks; every rank calls it.

    `again` computes the bad step's forward and backward pass once more, from the same weights. Causes go before their
    consequences: weights, then outputs in the order of the forward pass, then gradients in that of the backward pass,
    each before it is summed up with other ranks', then those sums.
    """
    watch = _Watch(model)
    with watch.hooked():
        again()
    mine = (_first(_bad_weights(model)), watch.output, watch.gradient, _first(_bad_sums(model)))
    for found in zip(*of_all_ranks(mine), strict=True):
        seen = [(one.order, one.what, rank) for rank, one in enumerate(found) if one]
        if seen:
            order, what, _ = min(seen)
            return f"first not finite is {what} {on(rank for place, _, rank in seen if place == order)}"
    moved = "FP8's scales, which have moved on since, or " if scaled_with_delay(core(model[0]).config) else ""
    return (
        f"computed again from the same weights and samples, all is finite: look for {moved}a fault of the hardware "
        f"({on(range(dist.get_world_size()))})"
    )


def largest(model: Sequence[Any], losses: list[dict[str, Tensor]]) -> str:
    """Which rank's samples have the largest loss, and which layer the largest gradient; every rank calls it.

    `losses` are this rank's micro batches' of the step, whose gradients the model still has.
    """
    total, tokens = torch.stack([micro["lm loss"] for micro in losses]).sum(0).tolist() if losses else (0.0, 0.0)
    gradients = [(float(piece.abs().max()), name) for name, _, piece in _sums(model) if piece.numel()]
    mine = (total / tokens if tokens else 0.0, max(gradients, default=(0.0, "")))
    all_of_them = of_all_ranks(mine)
    loss, rank = max((loss, -rank) for rank, (loss, _) in enumerate(all_of_them))
    (_, name), other = max((gradient, -rank) for rank, (_, gradient) in enumerate(all_of_them))
    text = f"the largest loss, {loss:.4f}, is that of the samples {on([-rank])}"
    return f"{text}; the largest gradient is that of {name} {on([-other])}" if name else text


class _Watch:
    """The first output and the first gradient that are not finite while the model runs, as it comes by them."""

    def __init__(self, model: Sequence[Any]) -> None:
        self.model = model
        self.output: Seen | None = None
        self.gradient: Seen | None = None
        self.micro_batch = [0] * len(model)  # that each chunk's forward pass is at
        self.backward_at = 0  # micro batch that the backward pass is at
        self.outputs = self.gradients = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles: list[Any] = []
        for number, chunk in enumerate(self.model):
            inner = core(chunk)
            handles.append(inner.register_forward_pre_hook(self._begin(number)))
            for name, module in inner.named_modules():
                handles.append(module.register_forward_hook(self._after(number, *place(inner, name))))
            for name, parameter in inner.named_parameters():
                if parameter.requires_grad:
                    handles.append(parameter.register_hook(self._of_weight(*place(inner, name))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, number: int) -> Callable[..., None]:
        def begin(module: Any, arguments: Any) -> None:
            self.micro_batch[number] += 1

        return begin

    def _after(self, number: int, layer: int, name: str) -> Callable[..., None]:
        def after(module: Any, arguments: Any, output: Any) -> None:
            micro = self.micro_batch[number]
            self.outputs += 1
            for value in output if isinstance(output, tuple) else (output,):
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    continue
                if not self.output and not _finite(value):
                    order = (micro, layer, self.outputs)
                    self.output = Seen(order, f"the output of {name}, in micro batch {micro},")
                if value.requires_grad:
                    value.register_hook(self._of_output(micro, layer, name))

        return after

    def _of_output(self, micro: int, layer: int, name: str) -> Callable[[Tensor], None]:
        def check(gradient: Tensor) -> None:
            self.backward_at = micro
            self._gradient(gradient, layer, f"the gradient of the output of {name}")

        return check

    def _of_weight(self, layer: int, name: str) -> Callable[[Tensor], None]:
        return lambda gradient: self._gradient(gradient, layer, f"the gradient of {name}")

    def _gradient(self, gradient: Tensor, layer: int, what: str) -> None:
        self.gradients += 1
        if not self.gradient and not _finite(gradient):
            order = (self.backward_at, -layer, self.gradients)
            self.gradient = Seen(order, f"{what}, in micro batch {self.backward_at},")


def _bad_weights(model: Sequence[Any]) -> Iterator[Seen]:
    for chunk in model:
        inner = core(chunk)
        for number, (name, parameter) in enumerate(inner.named_parameters()):
            if not _finite(plain(_local(parameter))):
                layer, what = place(inner, name)
                yield Seen((layer, number), f"the weight of {what}, before the step,")


def _bad_sums(model: Sequence[Any]) -> Iterator[Seen]:
    for number, (name, layer, piece) in enumerate(_sums(model)):
        if not _finite(piece):
            yield Seen((-layer, number), f"the sum over the ranks of the gradient of {name},")


def _sums(model: Sequence[Any]) -> Iterator[tuple[str, int, Tensor]]:
    """(name, layer, gradient) of each parameter: of the sum over data parallel ranks what this rank has of it."""
    for chunk in model:
        inner, mine = core(chunk), _shards(chunk)
        for name, parameter in inner.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            gradient = parameter.grad if gradient is None else gradient
            if gradient is not None:
                layer, what = place(inner, name)
                yield what, layer, mine.get(parameter, _local(gradient))


def _shards(chunk: Any) -> dict[Any, Tensor]:
    """What the distributed optimizer leaves reduced of each gradient on this rank; the rest of the buffer is not."""
    if not getattr(getattr(chunk, "ddp_config", None), "use_distributed_optimizer", False):
        return {}
    pieces = {}
    for group in getattr(chunk, "bucket_groups", []):
        ranks, rank = group.intra_distributed_optimizer_instance_size, group.intra_distributed_optimizer_instance_rank
        for bucket in group.buckets:
            size = bucket.grad_data.numel() // ranks
            for parameter, (start, end) in bucket.param_to_index.items():
                first, last = max(start, rank * size), min(end, (rank + 1) * size)
                pieces[parameter] = bucket.grad_data[first : max(first, last)]
    return pieces


def place(inner: Any, name: str) -> tuple[int, str]:
    """(position along the model, what to call it) of a module or parameter of the GPTModel `inner`."""
    match = re.match(r"decoder\.layers\.(\d+)\.?(.*)", name)
    layers = inner.config.num_layers
    if match:
        layer = inner.decoder.layers[int(match[1])].layer_number
        return layer, f"layer {layer} of {layers}" + (f" ({match[2]})" if match[2] else "")
    after = {"decoder": 1, "output_layer": 2, "": 3}
    position = 0 if name.startswith(("embedding", "rotary")) else layers + after.get(name.partition(".")[0], 2)
    return position, name or "the loss"


def _first(seen: Iterator[Seen]) -> Seen | None:
    return min(seen, default=None)


def _finite(value: Tensor) -> bool:
    """Of a tensor whose memory has been given back, as FSDP does with what is not in use, nothing is known."""
    return not value.untyped_storage().nbytes() or bool(torch.isfinite(value).all())


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def of_all_ranks(mine: Any) -> list[Any]:
    """What each rank has to say."""
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, mine)
    return answers


def on(ranks: Any) -> str:
    """The ranks by number, each with its place in the layout."""
    listed = list(ranks)
    named = ", ".join(f"{rank} ({_coordinates(rank)})" for rank in listed[:MOST_NAMED])
    more = f" and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
    return f"on rank{'s' if len(listed) > 1 else ''} {named}{more}"


def _coordinates(rank: int) -> str:
    """Ranks are dealt out in megatron-core's order: TP, CP, DP, PP."""
    place = []
    for name, size in (
        ("TP", mpu.get_tensor_model_parallel_world_size()),
        ("CP", mpu.get_context_parallel_world_size()),
        ("DP", mpu.get_data_parallel_world_size()),
        ("PP", mpu.get_pipeline_model_parallel_world_size()),
    ):
        place.append(f"{name} {rank % size}")
        rank //= size
    return ", ".join(place)
