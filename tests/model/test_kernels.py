"""Our cross entropy, SwiGLU, rotary embedding and norm against torch's own, with gradients, over several blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_rocm.model import blocks as block_sizes
from megatron_rocm.model.blocks import blocks

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A few rows each, the last one shorter."""
    monkeypatch.setattr(block_sizes, "CACHE", 2000 // torch.get_num_threads())
    torch.manual_seed(1)
    yield


class Alone:
    """The process group of one process, as far as the loss asks."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def compare(ours: Callable[..., Any], exact: Callable[..., Any], *inputs: Tensor) -> None:
    """Outputs and gradients of `ours` are those of `exact` in FP64, to the rounding of the inputs' type."""
    mine = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    outs, exacts = (list(out) if isinstance(out, tuple) else [out] for out in (ours(*mine), exact(*theirs)))
    grads = [torch.randn(out.shape, dtype=out.dtype) for out in outs]
    torch.autograd.backward([out.clone() for out in outs], grads)
    torch.autograd.backward(exacts, [grad.double() for grad in grads])
    tolerance = TOLERANCE[inputs[0].dtype]
    pairs = [*zip(outs, exacts, strict=True), *((a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))]
    for got, wanted in pairs:
        assert got.shape == wanted.shape
        assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_blocks_cover_all_rows_once() -> None:
    found = [row for part in blocks(100, 300, torch.device("cpu")) for row in range(100)[part]]
    assert found == list(range(100))
    assert len(list(blocks(100, 300, torch.device("cpu")))) > 5
    assert [part.stop for part in blocks(2, 10**9, torch.device("cpu"))] == [1, 2]  # a row is never cut


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [64, 50])
def test_cross_entropy(dtype: torch.dtype, tokens: int) -> None:
    from megatron_rocm.model.loss import cross_entropy

    labels = torch.randint(tokens, (2, 9)).t()
    labels[0] = tokens - 1

    def exact(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[..., :tokens].flatten(0, 1), labels.flatten(), reduction="none").view(9, 2)

    logits = 5 * torch.randn(9, 2, 64).to(dtype)
    logits[..., tokens:] = 100
    compare(lambda x: cross_entropy(x.clone(), labels, tokens, Alone()), exact, logits)  # type: ignore[arg-type]


def test_a_sure_token_keeps_its_gradient_in_bf16() -> None:
    """1 - p is 0.001 here, where BF16 knows no number between 0.996 and 1: the difference is made in FP32."""
    from megatron_rocm.model.loss import cross_entropy

    logits = torch.zeros(1, 1, 2, dtype=torch.bfloat16)
    logits[..., 0] = 7
    leaf = logits.clone().requires_grad_()
    cross_entropy(leaf.clone(), torch.zeros(1, 1, dtype=torch.int64), 2, Alone()).sum().backward()  # type: ignore[arg-type]
    assert leaf.grad is not None
    assert leaf.grad[0, 0, 0].item() == pytest.approx(-1 / (1 + torch.e**7), rel=4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype: torch.dtype) -> None:
    from megatron_rocm.model.mlp import swiglu

    compare(swiglu, lambda x: F.silu(x[..., :24]) * x[..., 24:], torch.randn(7, 3, 48).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype: torch.dtype) -> None:
    from megatron_rocm.model.norm import rms_norm

    x, weight = torch.randn(7, 3, 64).to(dtype), torch.randn(64).to(dtype)
    compare(lambda x, w: rms_norm(x, w, 1e-2), lambda x, w: F.rms_norm(x, (64,), w, 1e-2), x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2], ids=["same angles in all rows", "their own"])
def test_rotary_embedding(dtype: torch.dtype, rows: int) -> None:
    """Against megatron-core's own on the parts."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from megatron_rocm.model.rotary import rotate_and_divide

    groups, queries, size = 2, 3, 8
    half = torch.randn(5, rows, 1, size // 2)
    angles = torch.cat([half, half], -1)

    def exact(mixed: Tensor) -> tuple[Tensor, ...]:
        query, key, value = mixed.split([queries * size, size, size], -1)
        query, wide = query.reshape(5, 2, groups * queries, size), angles.double()
        return _apply_rotary_pos_emb_bshd(query, wide), _apply_rotary_pos_emb_bshd(key, wide), value

    mixed = torch.randn(5, 2, groups, (queries + 2) * size).to(dtype)
    compare(lambda x: rotate_and_divide(x, angles), exact, mixed)
