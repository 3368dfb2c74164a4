"""Root mean square normalization for where there is no Transformer Engine."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """x · weight / sqrt(mean(x²) + eps) over the last dimension (Zhang and Sennrich, arXiv:1910.07467).

    megatron-core's own wrapper of torch's norm refuses sequence parallelism, where each rank sees a part of the tokens
    and the weight's gradients must be summed over the tensor-parallel ranks. `finalize_model_grads` does that for
    weights marked `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
