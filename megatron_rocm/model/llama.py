"""megatron-core's GPTModel, as Llama."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_rocm.model.loss import cross_entropy

NEVER = -1e4  # a logit that adds exactly 0 to a softmax in FP32; an infinite one makes fused kernels divide 0 by 0


class Llama(GPTModel):
    """A GPTModel whose loss knows which rows of the output layer are tokens.

    megatron-core pads the vocabulary to a multiple of 128·TP and lets the padding take part in the softmax, so that
    the loss depends on TP and on rows that no other program has. `tokens` is the number of real ones.
    """

    def __init__(self, *args: Any, tokens: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens = tokens

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Loss [batch, sequence] of `labels` under `logits` [sequence, batch, this rank's part of the vocabulary]."""
        tp = self.pg_collection.tp
        if not self.config.cross_entropy_loss_fusion:
            return cross_entropy(logits, labels.t(), self.tokens, tp).t().contiguous()
        rows = logits.size(-1)
        mine = max(0, self.tokens - tp.rank() * rows)
        if mine < rows:
            logits[..., mine:].fill_(NEVER)
        return super().compute_language_model_loss(labels, logits)


def core(chunk: Any) -> GPTModel:
    """The GPTModel within the wrappers."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module
    return chunk
