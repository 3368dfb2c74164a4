"""Keys of the optimizer's tensors in a checkpoint; `shards.py` tells the whole of it."""

from __future__ import annotations

STATE = "optimizer.state."
MASTER = STATE + "param."
# Where a master copy may lie, best first: megatron-core's optimizer that is not distributed calls it fp32_param, and
# FSDP, like every layout in FP32, has no other than the weight.
MASTERS = (MASTER, STATE + "fp32_param.", "")
