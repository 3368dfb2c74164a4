"""Causal attention over torch's `scaled_dot_product_attention`, for where there is no Transformer Engine."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import divide
from torch import Tensor

from megatron_rocm.model.documents import Documents


class SdpaCoreAttention(MegatronModule):
    """Stands where megatron-core has `DotProductAttention` or Transformer Engine's attention.

    Takes query [s, b, heads, d] and key, value [s, b, groups, d] of this tensor-parallel rank, returns [s, b, heads·d].

    Under context parallelism s is this rank's part of the sequence: of 2·CP equal chunks rank r holds chunks r and
    2·CP-1-r, as `megatron.core.utils.get_batch_on_this_cp_rank` deals them out. Keys and values are gathered from all
    ranks whatever `cp_comm_type` says; their gradients are summed back to the ranks they came from.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"SdpaCoreAttention is causal self attention, not {attn_mask_type} {attention_type}")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.cp_group = groups.cp
        self.heads = divide(config.num_attention_heads, groups.tp.size())
        self.query_groups = divide(config.num_query_groups, groups.tp.size())
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend, within each of the Documents in `packed_seq_params` if there are any.

        A mask of one's own, a bias or other packed sequences would be ignored and raise a ValueError instead.
        """
        if attn_mask_type not in (None, AttnMaskType.causal):
            raise ValueError(f"SdpaCoreAttention is causal, not {attn_mask_type}")
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("SdpaCoreAttention takes no attention_mask or attention_bias")
        if not (packed_seq_params is None or isinstance(packed_seq_params, Documents)):
            raise ValueError(f"SdpaCoreAttention takes Documents, no other packed_seq_params: {packed_seq_params}")

        ranks, rank = self.cp_group.size(), self.cp_group.rank()
        if ranks == 1 and packed_seq_params is None:
            return self._attend(query, key, value)
        chunks = [(0, query)]
        if ranks > 1:
            key, value = self._whole_sequence(key, value)
            early, late = query.chunk(2)
            chunks = [(rank * early.size(0), early), ((2 * ranks - 1 - rank) * early.size(0), late)]
        if packed_seq_params is None:
            # A chunk sees the keys up to its own end.
            ends = [first + chunk.size(0) for first, chunk in chunks]
            parts = [self._attend(chunk, key[:e], value[:e]) for e, (_, chunk) in zip(ends, chunks, strict=True)]
            return torch.cat(parts)
        rows = []
        for row, lengths in enumerate(packed_seq_params.lengths):
            of_row = [(first, chunk[:, row : row + 1]) for first, chunk in chunks]
            rows.append(self._attend_documents(of_row, key[:, row : row + 1], value[:, row : row + 1], lengths))
        return torch.cat(rows, dim=1)

    def _attend_documents(
        self, chunks: list[tuple[int, Tensor]], key: Tensor, value: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        """One row's attention, each document for itself: no mask, and no more scores than documents have.

        `chunks` are queries, each with its place in the whole sequence; `key` and `value` are of the whole sequence.
        """
        # Split once: the backward pass of a slice writes zeros in the size of what it was cut from.
        keys, values = key.split(lengths), value.split(lengths)
        starts = list(itertools.accumulate(lengths, initial=0))
        out = []
        for first, chunk in chunks:
            after = first + chunk.size(0)
            met = [n for n in range(len(lengths)) if starts[n] < after and starts[n + 1] > first]
            ends = [min(starts[n + 1], after) for n in met]
            queries = chunk.split([end - max(starts[n], first) for n, end in zip(met, ends, strict=True)])
            for n, end, part in zip(met, ends, queries, strict=True):
                seen = end - starts[n]
                out.append(self._attend(part, keys[n][:seen], values[n][:seen]))
        return torch.cat(out)

    def _whole_sequence(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All ranks' keys and values in the order of the sequence, by one gather."""
        ranks = self.cp_group.size()
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.cp_group)
        # Gathered: 0, 2·CP-1, 1, 2·CP-2, … The first half is at the even places, the second at the odd ones, backwards.
        chunks = both.chunk(2 * ranks)
        in_order = torch.cat([*chunks[0::2], *reversed(chunks[1::2])])
        whole_key, whole_value = in_order.split([key.size(-1), value.size(-1)], dim=-1)
        return whole_key, whole_value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of queries that are the last ones of the keys' span."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        behind = key.size(2) - query.size(2)
        mask = None
        if behind:
            # is_causal counts from the first key, and torch's lower-right bias is not for every AMD GPU.
            mask = torch.ones(query.size(2), key.size(2), dtype=torch.bool, device=query.device).tril(behind)
        grouped = self.query_groups != self.heads
        if grouped and (mask is not None or (query.is_cuda and query.dtype == torch.float32)):
            # Only flash kernels take grouped heads, and a GPU's take neither a mask nor FP32. The memory-efficient ones
            # take these, where the fallback for grouped heads would write out all scores.
            key, value = (x.repeat_interleave(self.heads // self.query_groups, dim=1) for x in (key, value))
            grouped = False
        with self._dropout_generator():
            out = torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=mask is None,
                scale=self.softmax_scale,
                enable_gqa=grouped,
            )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _dropout_generator(self) -> contextlib.AbstractContextManager[Any]:
        """The generator that megatron-core's DotProductAttention draws its dropout from."""
        if self.dropout > 0 and self.training and not self.config.sequence_parallel:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()
