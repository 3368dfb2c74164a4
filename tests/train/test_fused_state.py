"""Optimizers that keep their state as Transformer Engine's and Apex's do, and FSDP's checkpoint of them.

Run as a script, this file goes on from a saved state, and prints what it found as JSON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_fsdp_goes_on_exactly_with_an_adam_that_counts_in_its_group(found):
    moved, apart = found["adam"]
    assert moved > 0 and apart == 0


def test_an_adam_without_moments_is_refused(found):
    assert found["no moments"] == "FusedAdam has no moments to load"


def test_sgd_that_is_not_torchs_goes_on_exactly(found):
    moved, apart = found["sgd"]
    assert moved > 0 and apart == 0


def test_fsdp_starts_without_values_and_reduces_in_fp32(found):
    assert found["layers on meta"]
    # dtype: what is kept, computed in, reduced in
    assert found["types"] == ["torch.float32", "torch.bfloat16", "torch.float32"]
    assert found["asked for bf16"] == "torch.bfloat16"
    assert found["attributes kept"]


def fused():
    """Stand-ins: `step` in the group, state only from the first step on."""
    import torch

    class FusedAdam(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.95)})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                first, second = group["betas"]
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                    state["exp_avg"].lerp_(p.grad, 1 - first)
                    state["exp_avg_sq"].lerp_(p.grad.square(), 1 - second)
                    mean = state["exp_avg"] / (1 - first ** group["step"])
                    square = state["exp_avg_sq"] / (1 - second ** group["step"])
                    p.sub_(group["lr"] * mean / (square.sqrt() + 1e-8))

    class FusedSGD(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1, "momentum": 0.9})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    p.sub_(group["lr"] * buffer.mul_(group["momentum"]).add_(p.grad))

    return FusedAdam, FusedSGD


def core_init(inner, config=None):
    """megatron-core's own initializer of Adam's state."""
    import torch

    for group in inner.param_groups:
        for p in group["params"]:
            if not inner.state[p]:
                inner.state[p]["exp_avg"], inner.state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)


def chained(inner, init=None):
    part = SimpleNamespace(is_stub_optimizer=False, optimizer=inner, init_state_fn=init, config=None)
    return SimpleNamespace(chained_optimizers=[part])


def train(inner, model, steps):
    import torch

    for step in steps:
        inner.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        model(x).float().pow(2).mean().backward()
        inner.step()


def weights(model):
    return [p.to_local().detach().clone() if hasattr(p, "to_local") else p.detach().clone() for p in model.parameters()]


def distance(some, others):
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def linear(seed):
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from torch.distributed.fsdp import fully_shard

    from megatron_rocm.model.fsdp import FullySharded

    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
    wrapper = FullySharded.__new__(FullySharded)
    torch.nn.Module.__init__(wrapper)
    wrapper.parts = {
        name: (ShardedTensor.from_rank_offsets(name, parameter.data, replica_id=(0, 0, 0)).without_data(),)
        for name, parameter in module.named_parameters()
    }
    fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    wrapper.module = module
    return wrapper


def adam():
    from megatron_rocm.checkpoint import shards
    from megatron_rocm.train import adam_state

    def boxes(model, optimizer):
        adam_state.initialize(optimizer)
        return {box.key: box.data for box in shards.sharded(shards.held([model], optimizer, {})).values()}

    first, second = linear(1), linear(2)
    inner, other = (fused()[0](model.module.parameters()) for model in (first, second))
    train(inner, first.module, range(3))
    saved = {key: value.clone() for key, value in boxes(first, chained(inner, core_init)).items()}
    step, at_save = adam_state.steps(chained(inner)), weights(first.module)
    train(inner, first.module, range(3, 6))

    optimizer = chained(other, core_init)
    for key, value in boxes(second, optimizer).items():
        value.copy_(saved[key])
    adam_state.set_steps(optimizer, step)
    train(other, second.module, range(3, 6))

    third = linear(3)
    try:
        adam_state.set_steps(chained(fused()[0](third.module.parameters())), step)
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    final = weights(first.module)
    return [distance(final, at_save), distance(final, weights(second.module))], refusal


def sgd():
    """Through megatron-core's own FP32 optimizer, whose SGD has no initializer."""
    import megatron.core.optimizer as core
    from test_adam_state import go_on

    core.SGD = lambda params, lr, weight_decay, momentum: fused()[1](params)
    return go_on(({"optimizer": "sgd"}, False, 3))


def model():
    from support import tiny_run

    from megatron_rocm.model import build, llama

    run = tiny_run(fsdp=True, dtype="bf16")
    config = build.transformer_config(run)
    layers = llama.core(build.build_chunks(run, config)[0]).decoder.layers
    [sharded] = build.build_model(run)
    layer = sharded.module.module.decoder.layers[0]
    policy = layer._get_fsdp_state()._mp_policy
    asked = build.build_model(tiny_run(fsdp=True, dtype="bf16", grad_reduce_in_bf16=True))[0]
    return {
        "layers on meta": all(p.is_meta for p in layers.parameters()),
        "types": [str(next(layer.parameters()).dtype), str(policy.param_dtype), str(policy.reduce_dtype)],
        "asked for bf16": str(asked.module._get_fsdp_state()._mp_policy.reduce_dtype),
        "attributes kept": all(
            p.tensor_model_parallel for name, p in layer.named_parameters() if name.endswith("linear_fc1.weight")
        ),
    }


def main():
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_rocm.platform import cpu

    cpu.install()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    moved, refusal = adam()
    print(json.dumps({"adam": moved, "no moments": refusal, "sgd": sgd(), **model()}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
