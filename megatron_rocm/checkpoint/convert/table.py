"""The weight mapping between Hugging Face, Meta and megatron-core's Llama, as a table, and how a row is carried over.

Pure functions over torch tensors: nothing is read or written here, no type is changed, and each tensor is done by
itself, so that a converter streams a model of any size.

Hugging Face and megatron-core rotate halves in their rotary embedding, Meta pairs of neighbours: its Q and K have their
rows in another order.
Sources: megatron/core/transformer/{attention,mlp}.py and models/gpt/gpt_layer_specs.py in megatron-core 0.16.1,
modeling_llama.py in transformers, llama/model.py in Meta's repository.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_rocm.config.schema import Model

Shape = tuple[int, ...]
LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
COMPUTED = ("rotary_emb.inv_freq", "rope.freqs")  # ends of names of tensors that older files have and nobody reads


@dataclass(frozen=True)
class How:
    """A way to carry a weight over.

    `split` makes Hugging Face's tensors of Megatron's one; `join` undoes it, in parts that lie one below the other;
    `unpair` makes Hugging Face's of Meta's.
    """

    split: Callable[[Tensor, Model], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], Model], Sequence[Tensor]]
    unpair: Callable[[Sequence[Tensor], Model], Sequence[Tensor]] = lambda parts, model: parts


def _split_qkv(weight: Tensor, model: Model) -> Sequence[Tensor]:
    """Megatron keeps each query group's rows together: its queries, its key, its value."""
    groups = model.num_query_groups
    queries = model.num_attention_heads // groups
    by_group = weight.reshape(groups, queries + 2, model.kv_channels, model.hidden_size)
    return [part.reshape(-1, model.hidden_size) for part in by_group.split((queries, 1, 1), dim=1)]


def _join_qkv(parts: Sequence[Tensor], model: Model) -> Sequence[Tensor]:
    groups = model.num_query_groups
    by_group = [part.reshape(groups, -1, model.kv_channels, model.hidden_size) for part in parts]
    return (torch.cat(by_group, dim=1).reshape(-1, model.hidden_size),)


def _unpair_qk(parts: Sequence[Tensor], model: Model) -> Sequence[Tensor]:
    """Meta rotates row 2i of a head with row 2i+1, the others row i with row i + half a head."""
    pairs = model.kv_channels // 2
    query_key = (part.reshape(-1, pairs, 2, model.hidden_size).transpose(1, 2) for part in parts[:2])
    return *(part.reshape(-1, model.hidden_size) for part in query_key), parts[2]


def _pad(parts: Sequence[Tensor], model: Model) -> Sequence[Tensor]:
    rows = model.padded_vocab_size - model.vocab_size
    return (*parts, parts[0].new_zeros(rows, model.hidden_size)) if rows else parts


COPY = How(lambda weight, model: (weight,), lambda parts, model: parts)
QKV = How(_split_qkv, _join_qkv, _unpair_qk)
GATE_UP = How(lambda weight, model: weight.chunk(2), lambda parts, model: parts)
VOCABULARY = How(lambda weight, model: (weight[: model.vocab_size],), _pad)


def _table(m: Model) -> Shape:
    return m.padded_vocab_size, m.hidden_size


def _norm(m: Model) -> Shape:
    return (m.hidden_size,)


@dataclass(frozen=True)
class Row:
    """One kind of weight; `{}` stands for the layer's number, from 0.

    `megatron` is Transformer Engine's name, which megatron-core writes into checkpoints for either kind of layer;
    `local` is what its own layers call the parameter where that differs (a norm fused into the linear after it).
    """

    megatron: str
    hugging_face: tuple[str, ...]
    meta: tuple[str, ...]
    how: How
    shape: Callable[[Model], Shape]
    local: str | None = None
    when: Callable[[Model], bool] = lambda model: True

    def elements(self, model: Model) -> int:
        return math.prod(self.shape(model))


_M, _H, _R = "decoder.layers.{}.", "model.layers.{}.", "layers.{}."

ROWS = (
    Row(
        "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("tok_embeddings.weight",),
        VOCABULARY, _table,
    ),
    Row(
        _M + "self_attention.linear_qkv.layer_norm_weight",
        (_H + "input_layernorm.weight",), (_R + "attention_norm.weight",),
        COPY, _norm, local=_M + "input_layernorm.weight",
    ),
    Row(
        _M + "self_attention.linear_qkv.weight",
        (_H + "self_attn.q_proj.weight", _H + "self_attn.k_proj.weight", _H + "self_attn.v_proj.weight"),
        (_R + "attention.wq.weight", _R + "attention.wk.weight", _R + "attention.wv.weight"),
        QKV, lambda m: ((m.num_attention_heads + 2 * m.num_query_groups) * m.kv_channels, m.hidden_size),
    ),
    Row(
        _M + "self_attention.linear_proj.weight",
        (_H + "self_attn.o_proj.weight",), (_R + "attention.wo.weight",),
        COPY, lambda m: (m.hidden_size, m.num_attention_heads * m.kv_channels),
    ),
    Row(
        _M + "mlp.linear_fc1.layer_norm_weight",
        (_H + "post_attention_layernorm.weight",), (_R + "ffn_norm.weight",),
        COPY, _norm, local=_M + "pre_mlp_layernorm.weight",
    ),
    Row(
        _M + "mlp.linear_fc1.weight",
        (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"),
        (_R + "feed_forward.w1.weight", _R + "feed_forward.w3.weight"),
        GATE_UP, lambda m: (2 * m.ffn_hidden_size, m.hidden_size),
    ),
    Row(
        _M + "mlp.linear_fc2.weight",
        (_H + "mlp.down_proj.weight",), (_R + "feed_forward.w2.weight",),
        COPY, lambda m: (m.hidden_size, m.ffn_hidden_size),
    ),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), ("norm.weight",), COPY, _norm),
    Row(
        "output_layer.weight", ("lm_head.weight",), ("output.weight",), VOCABULARY, _table,
        when=lambda m: not m.tied_embeddings,  # tied: all sides keep the embedding alone
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """One tensor of a model: a row, and the layer where the row has layers."""

    row: Row
    layer: int | None = None

    @property
    def megatron(self) -> str:
        """Transformer Engine's name."""
        return self.row.megatron.format(self.layer)

    @property
    def stacked(self) -> str:
        """Transformer Engine's name where all layers lie in one tensor, which megatron-core does by default."""
        return self.row.megatron.replace("{}.", "")

    @property
    def local(self) -> str:
        """The name with megatron-core's own layers."""
        return (self.row.local or self.row.megatron).format(self.layer)

    @property
    def hugging_face(self) -> tuple[str, ...]:
        return tuple(name.format(self.layer) for name in self.row.hugging_face)

    @property
    def meta(self) -> tuple[str, ...]:
        return tuple(name.format(self.layer) for name in self.row.meta)

    def hugging_face_shapes(self, model: Model) -> dict[str, Shape]:
        """Hugging Face's names, each with the shape of its tensor."""
        empty = torch.empty(self.row.shape(model), device="meta")
        return {name: tuple(part.shape) for name, part in self.to_hugging_face(empty, model).items()}

    def to_hugging_face(self, weight: Tensor, model: Model) -> dict[str, Tensor]:
        """Hugging Face's tensors by name, contiguous, without the rows that pad the vocabulary.

        `weight` is the whole tensor, put together from its tensor parallel parts. Raises ValueError for a shape
        that is not `model`'s.
        """
        self._expect(self.megatron, tuple(weight.shape), self.row.shape(model))
        parts = self.row.how.split(weight, model)
        return {name: part.contiguous() for name, part in zip(self.hugging_face, parts, strict=True)}

    def to_megatron(self, weights: Mapping[str, Tensor], model: Model) -> Sequence[Tensor]:
        """Megatron's tensor from Hugging Face's by name, in parts that lie one below the other: most are the tensors
        given, so that nothing is copied. The last may be zero rows up to `padded_vocab_size`.

        Raises KeyError for a name that is missing, ValueError for a shape that is not `model`'s.
        """
        for name, shape in self.hugging_face_shapes(model).items():
            self._expect(name, tuple(weights[name].shape), shape)
        return self.row.how.join([weights[name] for name in self.hugging_face], model)

    def from_meta(self, parts: Sequence[Tensor], model: Model) -> dict[str, Tensor]:
        """Hugging Face's tensors by name from Meta's, whole ones in the order of `meta`."""
        return dict(zip(self.hugging_face, self.row.how.unpair(parts, model), strict=True))

    @staticmethod
    def _expect(name: str, found: Shape, expected: Shape) -> None:
        if found != expected:
            raise ValueError(f"{name} has shape {found}; the model's configuration makes it {expected}")


def without_place(names: Iterable[str], model: Model, side: Literal["hugging_face", "meta"]) -> str:
    """Says which of a side's tensors would be lost, as the model has no place for them; empty where there are none."""
    known = {pattern for row in ROWS if row.when(model) for pattern in getattr(row, side)}
    lost = []
    for name in names:
        layer = LAYER.search(name)
        placed = LAYER.sub("{}", name, count=1) in known and (layer is None or int(layer[0]) < model.num_layers)
        if not placed and not name.endswith(COMPUTED):
            lost.append(name)
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return f"holds {min(lost)}{more}, which the configuration has no place for" if lost else ""


def weights(model: Model) -> Iterator[Weight]:
    """Every tensor of `model`, in the order of the forward pass."""
    rows = [row for row in ROWS if row.when(model)]
    first = next(i for i, row in enumerate(rows) if "{}" in row.megatron)
    layered = [row for row in rows if "{}" in row.megatron]
    yield from (Weight(row) for row in rows[:first])
    yield from (Weight(row, layer) for layer in range(model.num_layers) for row in layered)
    yield from (Weight(row) for row in rows[first + len(layered) :])
