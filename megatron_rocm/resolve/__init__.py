"""A request and a machine become a RunConfig: defaults, adjustments and rules of what combines with what, as tables."""

from megatron_rocm.resolve.resolve import Resolution, resolve

__all__ = ["Resolution", "resolve"]
