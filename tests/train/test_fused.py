"""AdamW's fused kernel with the clipping in it does what clipping and then AdamW do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rocm.platform import cpu

cpu.install()


def stepped(*, fused: bool, most: float, scale: float) -> list[torch.Tensor]:
    """Parameters after three steps, with a bias correction that differs in each."""
    from megatron_rocm.train.fused import clipped, fuse

    torch.manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((40, 30), (7,))]
    inner = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1, weight_decay=0.1)
    config = SimpleNamespace(clip_grad=most, use_precision_aware_optimizer_no_fp8_or_ds_fp8=False)
    part: Any = SimpleNamespace(
        optimizer=inner, config=config, is_stub_optimizer=False, get_parameters=lambda: parameters
    )
    if fused:
        assert fuse(part) is part
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape) * scale
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])).item()
        with clipped(part, norm):
            assert (getattr(inner, "grad_scale", None) is not None) == (fused and 0 < most < norm)
            inner.step()
        assert not hasattr(inner, "grad_scale")
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("most", [0.0, 1e-7, 1e6], ids=["off", "clips", "has nothing to clip"])
@pytest.mark.parametrize("scale", [1.0, 1e-7], ids=["large", "as small as Adam's epsilon"])
def test_a_fused_step_is_a_step(most: float, scale: float) -> None:
    for ours, plain in zip(*(stepped(fused=fused, most=most, scale=scale) for fused in (True, False)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-6, atol=2e-6)


def test_clipping_shows_where_epsilon_counts() -> None:
    """Adam hides a scale unless gradients are near its epsilon: the test above can fail."""
    kept, clipped_ = (stepped(fused=True, most=most, scale=1e-7)[0] for most in (0.0, 1e-7))
    assert (kept - clipped_).abs().max() > 1e-3
