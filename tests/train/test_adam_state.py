"""A run that loads torch's optimizer state goes on bit for bit as the one that saved it.

Run as a script, this file trains each case twice on gloo in one process, the second time from the first one's state,
and prints how far apart they end as JSON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# case: fields of OptimizerConfig; whether the optimizer is distributed; steps before saving
CASES = {
    "adam": ({}, False, 3),
    "adam in bf16": ({"bf16": True}, False, 3),
    "adam saved before the first step": ({}, False, 0),
    "distributed adam": ({}, True, 3),
    "distributed adam in bf16": ({"bf16": True}, True, 3),
    "distributed adam saved before the first step": ({}, True, 0),
    "sgd": ({"optimizer": "sgd", "sgd_momentum": 0.9}, False, 3),
    "sgd without momentum": ({"optimizer": "sgd", "sgd_momentum": 0.0}, False, 3),
}


@pytest.fixture(scope="module")
def outcomes():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_goes_on_exactly(outcomes, case):
    moved, apart = outcomes[case]
    assert moved > 0
    assert apart == 0


def test_initialize_changes_nothing_that_is_there(outcomes):
    assert outcomes["initialize"] == [0.0, 0.0]


class Run:
    """A small model with its optimizer; how it ends depends on its seed and on the optimizer's state."""

    def __init__(self, seed, case):
        import torch
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.module import MegatronModule

        class Model(MegatronModule):
            def __init__(self, config):
                super().__init__(config)
                self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

            def forward(self, x):
                return self.down(self.up(x).tanh())

        fields, distributed, _ = case
        self.bf16 = fields.get("bf16", False)
        self.dtype = torch.bfloat16 if self.bf16 else torch.float32
        torch.manual_seed(seed)
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=self.bf16)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(config, ddp, Model(config).to(self.dtype))
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(**{"optimizer": "adam", "lr": 0.1, "weight_decay": 0.1, "clip_grad": 1.0, **fields},
                            params_dtype=self.dtype, use_distributed_optimizer=distributed),
            [self.model],
            use_gloo_process_groups=False,
        )  # fmt: skip

    def train(self, steps):
        import torch

        for step in steps:
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(self.dtype)
            self.model(x).float().pow(2).mean().backward()
            self.model.finish_grad_sync()
            self.optimizer.step()

    def shards(self):
        """The bare tensors of the optimizer, by key and place in a checkpoint."""
        from megatron.core import parallel_state

        from megatron_rocm.checkpoint import shards

        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        weights = {"model": self.model.module.sharded_state_dict(metadata={"dp_cp_group": group})}
        boxes = shards.sharded(shards.held([self.model], self.optimizer, weights)).values()
        return {(box.key, box.global_offset): box.data for box in boxes}

    def weights(self):
        return [weight.detach().clone() for weight in self.model.parameters()]


def distance(some, others):
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def go_on(case):
    """How far the weights moved after saving, and how far apart the saved and the loaded run end."""
    from megatron_rocm.train import adam_state

    first, second = Run(1, case), Run(2, case)
    save_at = case[2]
    first.train(range(save_at))
    adam_state.initialize(first.optimizer)
    checkpoint = {key: value.clone() for key, value in first.shards().items()}
    steps, weights = adam_state.steps(first.optimizer), first.weights()
    first.train(range(save_at, save_at + 3))

    adam_state.initialize(second.optimizer)
    for mine, theirs in zip(second.model.parameters(), weights, strict=True):
        mine.data.copy_(theirs)
    for key, mine in second.shards().items():
        mine.copy_(checkpoint.pop(key))
    assert not checkpoint
    adam_state.set_steps(second.optimizer, steps)
    second.train(range(save_at, save_at + 3))
    return [distance(first.weights(), weights), distance(first.weights(), second.weights())]


def initialize_only(case):
    """How much the weights change by preparing before the first step, and the state by preparing after some."""
    from megatron_rocm.train import adam_state

    run = Run(1, case)
    before = run.weights()
    adam_state.initialize(run.optimizer)
    weights = distance(run.weights(), before)
    run.train(range(2))

    def state():
        return [t.clone() for s in run.optimizer.chained_optimizers[0].optimizer.state.values() for t in s.values()]

    before = state()
    adam_state.initialize(run.optimizer)
    return [weights, distance(state(), before)]


def main():
    import torch
    from megatron.core import parallel_state

    from megatron_rocm.platform import cpu

    cpu.install()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    found = {name: go_on(case) for name, case in CASES.items()}
    print(json.dumps({**found, "initialize": initialize_only(CASES["distributed adam"])}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
