"""Compare megatron_rocm.model.gradients.DataParallel with megatron-core's own, bit for bit; two processes."""

from __future__ import annotations

import itertools

import torch

from megatron_rocm.platform import cpu


class Net(torch.nn.Module):
    """Shared weights, a block's worth of weights and more, and weights that get no gradient in step 3."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        shapes = {"table": (300, 1024), "wide": (1024, 300), "bias": (300,), "late": (7,)}
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator).to(dtype)
            setattr(self, name, torch.nn.Parameter(values))

    def forward(self, ids: torch.Tensor, late: bool) -> torch.Tensor:
        hidden = torch.nn.functional.embedding(ids, self.table)
        out = ((hidden @ self.wide + self.bias).tanh() @ self.table).float().square().mean()
        return out + (self.late.float().sum() if late else 0)


def buffers(wrapper: type, dtype: torch.dtype, overlap: bool, tied: bool) -> list[torch.Tensor]:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, calculate_per_token_loss=True)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    net = Net(dtype)
    if tied:
        net.table.zero_out_wgrad = True
    model, found = wrapper(config, ddp, net), []
    rank, batch = torch.distributed.get_rank(), itertools.count()
    for step in range(5):
        model.zero_grad_buffer()
        for micro in range(3):
            ids = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(100 * rank + next(batch)))
            late = overlap or step != 3
            if micro < 2:
                with model.no_sync():
                    model(ids, late).backward()
            else:
                model(ids, late).backward()
        model.finish_grad_sync()
        found += [parameter.main_grad.clone() for parameter in net.parameters()]
        assert all(parameter.grad is None for parameter in net.parameters())
    return found


if __name__ == "__main__":
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel

    from megatron_rocm.model.gradients import DataParallel

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    for dtype, overlap, tied in itertools.product((torch.float32, torch.bfloat16), (False, True), (False, True)):
        theirs, ours = (buffers(wrapper, dtype, overlap, tied) for wrapper in (DistributedDataParallel, DataParallel))
        if all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True)):
            print("the same buffers, 5 steps", flush=True)
        else:
            print("different", dtype, overlap, tied, flush=True)
