"""The documents within a sequence, for attention that does not look from one into another.

A document ends with its EOD; what follows begins the next one (as Megatron-LM's `get_ltor_masks_and_position_ids`,
megatron/training/utils.py). Only attention has to know: rotary embeddings enter it by differences of positions, so
positions that begin anew in each document give what running ones give.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_rocm.config.schema import RunConfig

Lengths = tuple[tuple[int, ...], ...]  # of the documents of each row


@dataclass
class Documents(PackedSeqParams):
    """What `SdpaCoreAttention` takes as `packed_seq_params`: rows as they are, and how long their documents are.

    megatron-core hands it through all layers, and recomputation, to attention. With `qkv_format` "sbhd" it reads
    nothing of it but the sequence's length, which it builds the rotary embedding for.
    """

    lengths: Lengths = ()


def lengths(tokens: torch.Tensor, eod: int) -> Lengths:
    """How long the documents of each row of `tokens` [rows, sequence] are; each row's add up to the sequence."""
    found = []
    for row in tokens == eod:
        starts = [0, *(row.nonzero().flatten() + 1).tolist()]
        ends = [*starts[1:], tokens.size(1)]  # equal to the start where the last token is an EOD
        found.append(tuple(end - start for start, end in zip(starts, ends, strict=True) if end > start))
    return tuple(found)


def are_packed(run: RunConfig) -> bool:
    """Whether documents go through the model one after the other in a single row: Transformer Engine's way."""
    return run.data.reset_attention_mask and run.hardware.tier == "te"


def boundaries(run: RunConfig, tokens: torch.Tensor) -> PackedSeqParams:
    """GPTModel's `packed_seq_params` for `tokens` [MBS, sequence], whole rows, in the CPU's memory.

    Where `are_packed`, the model is to have them as one row of MBS·sequence.
    """
    found = lengths(tokens, run.data.eod)
    if not are_packed(run):
        size = tokens.size(1)
        return Documents(qkv_format="sbhd", max_seqlen_q=size, max_seqlen_kv=size, lengths=found)
    flat = list(chain.from_iterable(found))
    device = torch.cuda.current_device()
    ends = torch.tensor([0, *accumulate(flat)], dtype=torch.int32).to(device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=max(flat), max_seqlen_kv=max(flat)
    )
