"""megatron-core's loading of torch_dist checkpoints, with every pickle read by an allow-list.

megatron-core 0.16.1 reads `.metadata` by a plain unpickler, and objects such as the random generators' state by
torch.load(weights_only=False) of torch's planner: a checkpoint from elsewhere could run code.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict  # the public one gathers all keys first

from megatron_rocm.checkpoint.unpickle import read_metadata, read_saved


def load(wanted: dict[str, Any], path: Path, common: dict[str, Any]) -> dict[str, Any]:
    """megatron-core's `dist_checkpointing.load`; `common` is what `unpickle.read_common` has read of the folder."""
    return dist_checkpointing.load(wanted, str(path), _Sharded(), _Common(common))


class _Common(TorchCommonLoadStrategy):
    def __init__(self, common: dict[str, Any]) -> None:
        self.common = common

    def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
        return dict(self.common)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found = read_metadata(str(self.path))
        found.storage_meta = getattr(found, "storage_meta", None) or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Planner(torch_dist.MCoreLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        self.original_state_dict[key] = read_saved(value, key)


class _Sharded(torch_dist.TorchDistLoadShardedStrategy):
    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> dict[str, Any]:
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        flat, mapping, renamed = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = torch_dist.mcore_to_pyt_state_dict(flat, True)
        planner = _Planner(
            shapes_validation_sharded_tensors=[tensor for tensor in tensors if not tensor.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={
                tensor.key: tensor for tensor in tensors if tensor.allow_shape_mismatch
            },
        )
        _load_state_dict(state, _Reader(checkpoint_dir), planner=planner)
        unwrapped = {key: torch_dist._unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        loaded = torch_dist._replace_sharded_keys_with_state_dict_keys(unwrapped, mapping, renamed)
        torch_dist._restore_dict_types(loaded, sharded_state_dict)
        return loaded
