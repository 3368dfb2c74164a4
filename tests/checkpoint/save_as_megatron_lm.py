"""Train as each run says, and save into its SAVE_CKPT_PATH what Megatron-LM's training/checkpointing.py saves.

The arguments are runs' files; the last part of a run's log_dir says how the optimizer is saved: a sharding type of
megatron-core's distributed optimizer, `plain` or `none`.
"""

from __future__ import annotations

import random
import signal
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.platform import cpu

STEPS = 3


def arguments(run: RunConfig, state: Any) -> Namespace:
    """What of Megatron-LM's arguments says what was trained, and some of another kind."""
    from megatron.core.transformer.enums import AttnBackend

    model, dtype = run.model, run.precision.dtype
    return Namespace(
        num_layers=model.num_layers, hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads, group_query_attention=True,
        num_query_groups=model.num_query_groups, kv_channels=model.kv_channels,
        padded_vocab_size=model.padded_vocab_size, untie_embeddings_and_output_weights=True,
        rotary_base=model.rotary_base, use_rope_scaling=True, norm_epsilon=model.norm_eps, bf16=dtype == "bf16",
        fp16=False, normalization="RMSNorm", swiglu=True, add_bias_linear=False, position_embedding_type="rope",
        num_experts=None, optimizer="adam", lr=run.optimizer.lr, min_lr=run.optimizer.min_lr,
        global_batch_size=run.training.global_batch_size, seq_length=run.training.seq_length, seed=run.training.seed,
        consumed_train_samples=state.consumed_samples, iteration=state.iteration, ckpt_format="torch_dist",
        attention_backend=AttnBackend.auto, exit_signal=signal.SIGTERM, params_dtype=state.model[0].config.params_dtype,
    )  # fmt: skip


def save(run: RunConfig, state: Any, how: str) -> None:
    import numpy
    import torch
    from megatron.core import dist_checkpointing, mpu, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from megatron_rocm.model.llama import core

    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if how not in ("plain", "none"):
        metadata["distrib_optim_sharding_type"] = how
    given = {**metadata, "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    names = ["model"] if len(state.model) == 1 else [f"model{number}" for number in range(len(state.model))]
    weights = {
        name: core(chunk).sharded_state_dict(metadata=given) for name, chunk in zip(names, state.model, strict=True)
    }
    rng = {
        "random_rng_state": random.getstate(), "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(), "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }  # fmt: skip
    sizes = (mpu.get_pipeline_model_parallel_world_size(), mpu.get_tensor_model_parallel_world_size())
    place = (mpu.get_pipeline_model_parallel_rank(), mpu.get_tensor_model_parallel_rank())
    replica = mpu.get_data_parallel_rank(with_context_parallel=True)
    content = {
        "args": arguments(run, state), "checkpoint_version": 3.0, "iteration": state.iteration, **weights,
        "rng_state": ShardedObject("rng_state", [rng], sizes, place, replica_id=replica),
        "num_floating_point_operations_so_far": 0,
    }  # fmt: skip
    if how != "none":
        content["optimizer"] = state.optimizer.sharded_state_dict(weights, metadata=given)
        content["opt_param_scheduler"] = state.scheduler.state_dict()
    folder = Path(run.checkpoint.save or "") / f"iter_{state.iteration:07d}"
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(
        content, str(folder), TorchDistSaveShardedStrategy("torch_dist", 1), content_metadata=metadata
    )
    torch.distributed.barrier()
    (folder.parent / "latest_checkpointed_iteration.txt").write_text(str(state.iteration))


if __name__ == "__main__":
    cpu.install()
    from megatron.core import parallel_state

    from megatron_rocm.train import distributed, loop
    from megatron_rocm.train.step import prepare, train_step

    runs = [RunConfig.load(path) for path in sys.argv[1:]]
    distributed.connect(runs[0])
    for run in runs:
        distributed.form_groups(run)
        state = loop.build(run)
        prepare(run, state)
        batches = loop.open_batches(run, state, loop.open_data(run)[0])
        for _ in range(STEPS):
            train_step(run, state, batches)
        with state.whole_parameters():
            save(run, state, Path(run.launch.log_dir).name)
        parallel_state.destroy_model_parallel()
    distributed.leave()
