"""What every kind of source is to those that write: a model's shape, its weights one by one, and its other files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_rocm.checkpoint.convert.table import Weight, weights
from megatron_rocm.config.schema import Model
from megatron_rocm.errors import UsageError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AHEAD = 3  # weights that are being read while one is written


class Source(Protocol):
    """Weights to convert. Nothing of them is in memory but what is looked at."""

    folder: Path
    model: Model

    def dtype(self, weight: Weight) -> torch.dtype:
        """The type it is stored in. Raises UsageError where its parts have several."""

    def tensors(self, weight: Weight) -> dict[str, Tensor]:
        """Hugging Face's tensors of a weight, by name: contiguous, not to be written to. Raises UsageError."""

    def ahead(self, weight: Weight) -> None:
        """Begin to read what `tensors` will give."""

    def describe(self, folder: Path, tokenizer: str | None, dtype: torch.dtype) -> None:
        """Put config.json, generation_config.json and the tokenizer into a folder, as Hugging Face has them."""


def stream(source: Source, dtype: torch.dtype | None) -> Iterator[tuple[Weight, dict[str, Tensor]]]:
    """Every weight with Hugging Face's tensors of it, of `dtype` where that is given; what follows is read ahead.

    Raises UsageError for what is missing or has another shape than the model's, and for numbers that FP16 can't hold.
    """
    every = list(weights(source.model))
    for weight in every[:AHEAD]:
        source.ahead(weight)
    for number, weight in enumerate(every):
        for following in every[number + AHEAD : number + AHEAD + 1]:
            source.ahead(following)
        found = source.tensors(weight)
        for name, shape in weight.hugging_face_shapes(source.model).items():
            if tuple(found[name].shape) != shape:
                raise UsageError(
                    f"{source.folder}: {name} has shape {tuple(found[name].shape)}; its configuration makes it "
                    f"{shape}: weights and configuration are not of the same model"
                )
        yield weight, {name: _cast(source, name, tensor, dtype) for name, tensor in found.items()}


def _cast(source: Source, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(cast).all() and torch.isfinite(tensor).all():
        raise UsageError(f"{source.folder}: {name} has numbers that FP16 can't hold: use --dtype bf16 or fp32")
    return cast
