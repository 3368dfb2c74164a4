"""The published Llama shapes, by the family whose script trains them and the size people type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

GUIDE_SIZE = "70"  # what AMD's scripts train when nothing is said


@dataclass(frozen=True)
class Preset:
    """One model. Sources: the models' config.json on the Hugging Face hub and the Llama papers (arXiv 2307.09288,
    2308.12950, 2407.21783); `tiny` is ours."""

    title: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    max_position_embeddings: int
    rotary_base: int
    rope_scaling_factor: float | None = None  # None: published without RoPE scaling
    tied_embeddings: bool = False
    kv_channels: int | None = None  # None: hidden_size / num_attention_heads
    eod: int = 2
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # variables this size sets

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads


def _llama2(
    title: str,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    groups: int,
    vocab: int = 32000,
    positions: int = 4096,
    base: int = 10_000,
) -> Preset:
    return Preset(title, layers, hidden, ffn, heads, groups, vocab, positions, base)


def _llama3(
    title: str,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    groups: int,
    factor: float = 8.0,
    tied: bool = False,
    sets: Mapping[str, Any] = MappingProxyType({}),
) -> Preset:
    return Preset(
        title, layers, hidden, ffn, heads, groups, 128_256, 131_072, 500_000, factor, tied, eod=128_001, defaults=sets
    )


def _tiny(title: str, groups: int, positions: int, base: int, factor: float | None) -> Preset:
    sets = MappingProxyType({"SEQ_LENGTH": 256, "LR": 3e-3, "PRECISION": "fp32"})
    return Preset(title, 4, 256, 768, 8, groups, 4096, positions, base, factor, eod=1, defaults=sets)


#                                              layers hidden    ffn heads groups
PRESETS: Mapping[tuple[str, str], Preset] = MappingProxyType({
    ("llama2", "tiny"): _tiny("Llama 2 tiny", 8, 4096, 10_000, None),
    ("llama2", "7"): _llama2("Llama 2 7B", 32, 4096, 11008, 32, 32),
    ("llama2", "13"): _llama2("Llama 2 13B", 40, 5120, 13824, 40, 40),
    ("llama2", "70"): _llama2("Llama 2 70B", 80, 8192, 28672, 64, 8),
    ("llama2", "code7"): _llama2("Code Llama 7B", 32, 4096, 11008, 32, 32, 32016, 16384, 1_000_000),
    ("llama2", "code13"): _llama2("Code Llama 13B", 40, 5120, 13824, 40, 40, 32016, 16384, 1_000_000),
    ("llama2", "code34"): _llama2("Code Llama 34B", 48, 8192, 22016, 64, 8, 32000, 16384, 1_000_000),
    ("llama3", "tiny"): _tiny("Llama 3 tiny", 4, 131_072, 500_000, 8.0),
    ("llama3", "1"): _llama3("Llama 3.2 1B", 16, 2048, 8192, 32, 8, factor=32.0, tied=True),
    ("llama3", "3"): _llama3("Llama 3.2 3B", 28, 3072, 8192, 24, 8, factor=32.0, tied=True),
    ("llama3", "8"): _llama3("Llama 3.1 8B", 32, 4096, 14336, 32, 8),
    ("llama3", "70"): _llama3("Llama 3.1 70B", 80, 8192, 28672, 64, 8),
    ("llama3", "405"): _llama3("Llama 3.1 405B", 126, 16384, 53248, 128, 8, sets=MappingProxyType({"TP": 8, "PP": 8})),
})  # fmt: skip


def sizes(family: str) -> tuple[str, ...]:
    """The sizes a family's script takes, smallest first as declared."""
    return tuple(size for of, size in PRESETS if of == family)


def default_seq_length(family: str, size: str) -> int:
    """SEQ_LENGTH where none was said: AMD's scripts' for the family, unless the size has its own."""
    return PRESETS[family, size].defaults.get("SEQ_LENGTH", 4096 if family == "llama2" else 2048)
