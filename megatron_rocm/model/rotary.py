"""Self attention that applies the rotary embedding (Su et al., arXiv:2104.09864) while it divides Q, K and V."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


class RotarySelfAttention(SelfAttention):
    """megatron-core's SelfAttention with one pass over the undivided QKV in the place of a dozen over its parts."""

    _angles: Tensor | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        """As megatron-core's; the angles wait for `get_query_key_value_tensors`, which it calls."""
        angles = kwargs.get("rotary_pos_emb")
        if not self._is_plain(angles, kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)
        self._angles = angles
        try:
            return super().forward(hidden_states, attention_mask, **{**kwargs, "rotary_pos_emb": None})
        finally:
            self._angles = None

    def _is_plain(self, angles: Any, kwargs: dict[str, Any]) -> bool:
        """Whether it is Llama's embedding: all of each head, halves, rows that are sequences."""
        packed = kwargs.get("packed_seq_params")
        return (
            isinstance(angles, Tensor)
            and angles.size(-1) == self.hidden_size_per_attention_head
            and not self.config.rotary_interleaved
            and not self.config.no_rope_freq
            and kwargs.get("inference_context") is None
            and (packed is None or packed.qkv_format == "sbhd")
        )

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Query [s, b, heads, d], key and value [s, b, groups, d] of this rank, rotated where angles wait."""
        if self._angles is None:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, **kwargs)
        mixed, _ = super().get_query_key_value_tensors(hidden_states, key_value_states, split_qkv=False)
        query, key, value = rotate_and_divide(mixed, self._angles)
        ranks = self.world_size // self.config.num_query_groups
        if ranks > 1:  # that share a group: each has all of the group's queries here, and takes its own
            query = query.chunk(ranks, dim=2)[self.pg_collection.tp.rank() % ranks]
        return query, key, value


def rotate_and_divide(mixed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q [s, b, groups·queries, d], K and V [s, b, groups, d] from QKV [s, b, groups, (queries + 2)·d].

    Q and K are turned by the angles [s, 1 or b, 1, d]. In memory each head's tokens lie together, as attention kernels
    read them.
    """
    return _RotateAndDivide.apply(mixed, angles)  # type: ignore[no-any-return,no-untyped-call]


class _RotateAndDivide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = mixed.unflatten(-1, (-1, angles.size(-1)))
        queries = heads.size(3) - 2
        cos, sin = _cos_sin(angles, mixed)
        query, key, value = (_heads_first(heads, count) for count in (queries, 1, 1))
        _rotate(heads[:, :, :, :queries], cos, sin, query)
        _rotate(heads[:, :, :, queries:-1], cos, sin, key)
        value.copy_(heads[:, :, :, -1:])
        ctx.save_for_backward(angles)
        ctx.shape = heads.shape
        return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (angles,) = ctx.saved_tensors
        result = grads[0].new_empty(ctx.shape)
        query, key, value = (grad.unflatten(2, (ctx.shape[2], -1)) for grad in grads)
        cos, sin = _cos_sin(angles, result)
        _rotate(query, cos, -sin, result[:, :, :, :-2])
        _rotate(key, cos, -sin, result[:, :, :, -2:-1])
        result[:, :, :, -1:] = value
        return result.flatten(3), None


def _cos_sin(angles: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, [s, 1 or b, 1, 1, d / 2], in the type that they are multiplied in; angles repeat after d / 2."""
    half = angles[..., : angles.size(-1) // 2].unsqueeze(3)
    return half.cos().to(like.dtype), half.sin().to(like.dtype)


def _heads_first(heads: Tensor, count: int) -> Tensor:
    """Room for `count` heads of each group, [s, b, groups, count, d]."""
    s, b, groups, _, d = heads.shape
    return heads.new_empty(b, groups, count, s, d).permute(3, 0, 1, 2, 4)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """out = x turned by the angles; the halves of the last dimension are the two coordinates."""
    (x1, x2), (out1, out2) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin)
