"""Writes checkpoints as the trainer does, of models with random weights: python save_models.py FOLDER

For each FOLDER/<name>/run.json writes FOLDER/<name>/iter_0000003, and the model's own logits beside it.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.strategies import torch as torch_dist

from megatron_rocm.checkpoint.folder import set_latest
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.model.build import build_chunks, transformer_config
from megatron_rocm.model.llama import core
from megatron_rocm.platform import cpu
from megatron_rocm.train.distributed import form_groups


class InProcess(torch_dist.TorchDistSaveShardedStrategy):
    """megatron-core's own format, without the processes that it starts for writing."""

    def __init__(self):
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict, checkpoint_dir):
        flat, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        dcp.save(
            torch_dist.mcore_to_pyt_state_dict(flat, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir),
            planner=torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


@torch.no_grad()
def save(folder: Path) -> None:
    run = RunConfig.load(folder / "run.json")
    model = core(build_chunks(run, transformer_config(run))[0]).eval()
    generator = torch.Generator().manual_seed(7)
    for weight in model.parameters():  # norms of 1 and padding of 0 would hide a wrong mapping
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1 + (weight.dim() == 1))
    ids = torch.randint(run.model.vocab_size, (1, 64), generator=generator)
    torch.save((ids, model(ids, torch.arange(64).unsqueeze(0), None)), folder / "logits.pt")

    iteration = folder / "iter_0000003"
    iteration.mkdir()
    state = model.sharded_state_dict(metadata={"singleton_local_shards": folder.name == "layers_apart"})
    content = {"model": state, "iteration": 3, "run": run.model_dump(mode="json", exclude={"launch"})}
    dist_checkpointing.save(content, str(iteration), InProcess())
    set_latest(folder, 3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    cpu.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for path in sorted(Path(sys.argv[1]).iterdir()):
        form_groups(RunConfig.load(path / "run.json"))
        save(path)
        mpu.destroy_model_parallel()
    dist.destroy_process_group()
