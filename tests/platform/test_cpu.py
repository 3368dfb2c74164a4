"""Each piece of the CPU platform is needed: a call of megatron-core works with it and fails without it.

Run as a script, this file imports torch and megatron-core once, tries each check in forked children, with all pieces
and with all but one, and prints what went wrong as JSON: {piece: {"with": null, "without": "AssertionError: …"}}.
"""

import json
import os
import queue
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def rotary_embedding():
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    assert RotaryEmbedding(8, 1.0).inv_freq.device.type == "cpu"


def timer():
    from megatron.core.timers import Timers

    Timers(log_level=2, log_option="minmax")("step", log_level=0).start()


def persistent_checkpoint_worker():
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    orders = queue.Queue()
    orders.put("DONE")
    PersistentAsyncCaller.async_loop(3, orders, queue.Queue(), queue.Queue())


def tracker():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("seven", 7)
    tracker.add("eight", 8)
    return tracker


def rng_tracker():
    import torch

    torch.manual_seed(1)
    outer = torch.rand(2)
    torch.manual_seed(1)
    states = tracker()
    with states.fork("seven"):
        seven = torch.rand(3)
    with states.fork("eight"):
        eight = torch.rand(3)
    assert torch.equal(seven, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(eight, torch.rand(3, generator=torch.Generator().manual_seed(8)))
    assert torch.equal(torch.rand(2), outer)


def rng_tracker_is_quiet():
    import logging

    import torch

    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("megatron.core.tensor_parallel.random").addHandler(handler)
    with tracker().fork("seven"):
        torch.rand(1)
    assert not said, said[0].getMessage()


def loss_scale():
    from megatron.core.optimizer.grad_scaler import ConstantGradScaler

    assert ConstantGradScaler(2.0).scale.item() == 2.0


def rotary_under_context_parallelism():
    import torch
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    class SecondOfTwo:
        def size(self):
            return 2

        def rank(self):
            return 1

    assert get_pos_emb_on_this_cp_rank(torch.arange(8), 0, SecondOfTwo()).tolist() == [2, 3, 4, 5]


def clip_gradients():
    import torch
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    clip_grad_by_total_norm_fp32([weight], max_norm=1.0, total_norm=5.0)
    assert torch.allclose(weight.grad, torch.tensor([0.6, 0.8]))


def gradient_norm():
    import torch
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    gradients = [torch.randn(size, generator=torch.Generator().manual_seed(1)) for size in (3, 4096, 2**20 + 1)]
    expected = torch.linalg.vector_norm(torch.cat(gradients), dtype=torch.float64).item()
    found = get_grad_norm_fp32(gradients, grad_stats_parallel_group=torch.distributed.group.WORLD)
    assert abs(found - expected) < 1e-6 * expected


def half_precision_master_weights():
    import torch
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    config = OptimizerConfig(optimizer="adam", lr=1.0, bf16=True)
    Float16OptimizerWithFloat16Params(torch.optim.AdamW([weight]), config, None, lambda *_: None)
    assert weight.main_param.dtype == torch.float32
    clip_gradients()


def causal_mask():
    from megatron.core.transformer.utils import get_default_causal_mask

    assert get_default_causal_mask(2).tolist() == [[False, True], [False, False]]


def exchanged_tensor():
    import torch
    from megatron.core.dist_checkpointing.exchange_utils import _get_empty_tensor_for_exchange
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    needed = {"shard": ShardedTensor.from_rank_offsets("weight", torch.zeros(2)).without_data()}
    tensor, _ = _get_empty_tensor_for_exchange("shard", needed, {}, {})
    assert tensor.shape == (2,)


def torch_fsdp():
    import torch
    from megatron.core.distributed import TorchFullyShardedDataParallel, TorchFullyShardedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, transformer_impl="local")
    TorchFullyShardedDataParallel(
        config,
        TorchFullyShardedDataParallelConfig(),
        torch.nn.Linear(2, 2),
        process_group=torch.distributed.group.WORLD,
    )


def megatron_fsdp():
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.fsdp.src.megatron_fsdp import FSDPDistributedIndex, MegatronFSDP

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1, 1), mesh_dim_names=("shards", "tp"))
    wrapped = MegatronFSDP(
        torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False)),
        FSDPDistributedIndex(mesh, dp_shard_dim="shards", tp_dim="tp"),
        DistributedDataParallelConfig(data_parallel_sharding_strategy="optim_grads_params"),
        fsdp_unit_modules=[torch.nn.Linear],
        device=torch.device(torch.cuda.current_device()),
        calculate_per_token_loss=True,
    )
    wrapped(torch.ones(1, 2)).sum().backward()
    wrapped.finish_grad_sync()
    assert next(wrapped.module.parameters()).grad.to_local().abs().sum() > 0


def megatron_fsdp_is_quiet():
    import logging

    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("megatron.core.distributed.fsdp").addHandler(handler)
    megatron_fsdp()
    assert not said, said[0].getMessage()


NEEDED_BY = {
    "torch.cuda.current_device": rotary_embedding,
    "torch.cuda.synchronize": timer,
    "torch.cuda.Stream": megatron_fsdp,
    "torch.cuda.current_stream": megatron_fsdp,
    "Megatron-FSDP is quiet": megatron_fsdp_is_quiet,
    "torch.cuda.device_count": persistent_checkpoint_worker,
    "torch.cuda.set_device": persistent_checkpoint_worker,
    "torch.cuda.get_rng_state": rng_tracker,
    "torch.cuda.manual_seed": rng_tracker,
    "rng tracker reads": rng_tracker,
    "rng tracker writes": rng_tracker,
    "rng tracker is quiet": rng_tracker_is_quiet,
    "torch.tensor": loss_scale,
    "torch.tensor is not pinned": rotary_under_context_parallelism,
    "torch.zeros": clip_gradients,
    "torch.ones": causal_mask,
    "ShardedTensor.init_data": exchanged_tensor,
    "torch.empty_like": exchanged_tensor,
    "Tensor.cuda": rotary_under_context_parallelism,
    "Tensor.type": half_precision_master_weights,
    "gradient norm": gradient_norm,
    "DeviceMesh.from_group": torch_fsdp,
}


def leaves_a_gpu_alone():
    import torch

    from megatron_rocm.platform import cpu

    before = (torch.tensor, torch.Tensor.cuda, torch.cuda.current_device)
    torch.cuda.is_available = lambda: True
    assert cpu.install() is False
    assert before == (torch.tensor, torch.Tensor.cuda, torch.cuda.current_device)


def keeps_other_devices():
    import torch

    from megatron_rocm.platform import cpu

    cpu.install()
    with torch.device("meta"):
        made = torch.ones(2), torch.zeros(2), torch.tensor([1]), torch.empty(2)
    assert all(tensor.device.type == "meta" for tensor in made)


def installs_once():
    import torch

    from megatron_rocm.platform import cpu

    assert cpu.install() is True
    once = torch.tensor
    assert cpu.install() is True
    assert torch.tensor is once


@pytest.fixture(scope="module")
def outcomes():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_piece_has_its_check(outcomes):
    assert sorted(NEEDED_BY) == sorted(outcomes["pieces"])


@pytest.mark.parametrize("piece", NEEDED_BY)
def test_piece_is_needed_and_enough(outcomes, piece):
    assert outcomes[piece]["with"] is None
    assert outcomes[piece]["without"] is not None, f"{NEEDED_BY[piece].__name__} works without {piece}"


@pytest.mark.parametrize("behaviour", ["leaves_a_gpu_alone", "installs_once", "keeps_other_devices"])
def test_install(outcomes, behaviour):
    assert outcomes[behaviour] is None


def _in_child(check, *install):
    """What went wrong in a forked child that ran check, None if nothing did; `install` are the pieces to leave out."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        message = ""
        try:
            for skip in install:
                from megatron_rocm.platform import cpu

                assert cpu.install(_skip=skip)
            check()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"[:2000]
        os.write(writer, message.encode())
        os._exit(0 if not message else 1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    return message or (f"ended with status {status}" if status else None)


def _try_everything():
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401 - imported once here, for all children

    from megatron_rocm.platform import cpu

    found = {
        name: {"with": _in_child(check, ()), "without": _in_child(check, (name,))} for name, check in NEEDED_BY.items()
    }
    found |= {check.__name__: _in_child(check) for check in (leaves_a_gpu_alone, installs_once, keeps_other_devices)}
    print(json.dumps({**found, "pieces": [piece.name for piece in cpu.PIECES]}))


if __name__ == "__main__":
    _try_everything()
