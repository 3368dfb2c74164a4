"""What megatron-core 0.16.1 computes wrongly without saying so: each fault beside the right value, in two processes.

    torchrun --nproc-per-node=2 tests/upstream/faults.py            # every fault
    torchrun --nproc-per-node=2 tests/upstream/faults.py NAME …     # those named

Rank 0 prints one line of JSON a fault: its name, what was computed, what is right. docs/upstream.md has the story.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import tiny_run

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.platform import cpu

cpu.install()

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import TorchFullyShardedDataParallel, TorchFullyShardedDataParallelConfig
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.utils import local_multi_tensor_l2_norm

from megatron_rocm.checkpoint.state import State
from megatron_rocm.model import build as building
from megatron_rocm.model.init import fill
from megatron_rocm.model.llama import core
from megatron_rocm.train import distributed, loop
from megatron_rocm.train.batches import micro_batches
from megatron_rocm.train.step import forward_backward, gradient_norm, prepare, train_step

Fault = Callable[[], tuple[float, float]]  # → (what megatron-core computes, what is right)
FAULTS: dict[str, Fault] = {}


def fault(function: Fault) -> Fault:
    FAULTS[function.__name__] = function
    return function


@contextlib.contextmanager
def groups(run: RunConfig) -> Iterator[None]:
    distributed.form_groups(run)
    yield
    parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def transformer(**fields: Any) -> Iterator[None]:
    """megatron-core's configuration as a user may write it: with these fields instead of ours."""
    ours = building.transformer_config
    with mock.patch.object(building, "transformer_config", lambda run: replace(ours(run), **fields)):
        yield


def trained(run: RunConfig, steps: int = 5) -> float:
    """The loss of the last of some steps."""
    with groups(run):
        state = loop.build(run)
        prepare(run, state)
        batches = batches_of(run, state)
        return [train_step(run, state, batches).loss for _ in range(steps)][-1]


def batches_of(run: RunConfig, state: State) -> list[Any]:
    data, _ = loop.open_data(run)
    return [micro_batches(run, data, 0, chunk) for chunk in state.model]


def norm(run: RunConfig, change: Callable[[State], None] = lambda state: None) -> float:
    """The gradient's norm in the first step, before clipping."""
    with groups(run):
        state = loop.build(run)
        prepare(run, state)
        change(state)
        forward_backward(run, state, batches_of(run, state))
        return gradient_norm(state.optimizer)[0]


@fault
def interleaved_stages_with_batched_p2p() -> tuple[float, float]:
    """Loss after five steps of PP=2, VPP=2."""
    run = tiny_run(pp=2, vpp=2)
    with transformer(overlap_p2p_comm=False, batch_p2p_comm=True):
        wrong = trained(run)
    return wrong, trained(run)


@fault
def outputs_freed_while_gloo_sends_them() -> tuple[float, float]:
    """Loss after five steps of PP=2, VPP=2, with deallocate_pipeline_outputs over gloo."""
    run = tiny_run(pp=2, vpp=2)
    with transformer(deallocate_pipeline_outputs=True):
        wrong = trained(run)
    return wrong, trained(run)


@fault
def padded_vocabulary_in_the_softmax() -> tuple[float, float]:
    """First loss of 300 tokens whose table is padded to 512 rows; the right one is of a table without padding."""
    padded, bare = tiny_run(dp=2), tiny_run(dp=2, padded_vocab_size=300)
    with mock.patch.object(building.Llama, "compute_language_model_loss", GPTModel.compute_language_model_loss):
        return trained(padded, 1), trained(bare, 1)


@fault
def per_token_loss_said_after_wrapping() -> tuple[float, float]:
    """Gradient norm of DP=2, with calculate_per_token_loss set once DistributedDataParallel is there."""

    def late(state: State) -> None:
        state.model[0].config.calculate_per_token_loss = True

    run = tiny_run(dp=2)
    with transformer(calculate_per_token_loss=False):
        wrong = norm(run, late)
    return wrong, norm(run)


@fault
def torch_fsdp_does_not_divide_by_tokens() -> tuple[float, float]:
    """Gradient norm of DP=2 with the wrapper's own scale_gradients, which does nothing."""
    run = tiny_run(dp=2, fsdp=True)
    own = TorchFullyShardedDataParallel.scale_gradients
    with mock.patch.object(building.fsdp.FullySharded, "scale_gradients", own):
        wrong = norm(run)
    return wrong, norm(tiny_run(dp=2))


@fault
def torch_fsdp_saves_gate_and_up_mixed() -> tuple[float, float]:
    """Largest difference of linear_fc1 between what torch-FSDP2 of two ranks saved and what it was; right is none."""
    run = tiny_run(dp=2)
    with groups(run), tempfile.TemporaryDirectory() as mine:
        shared = [mine]
        dist.broadcast_object_list(shared)
        config = building.transformer_config(run)
        whole, cut = (building.build_chunks(run, config)[0] for _ in range(2))
        for model in (whole, cut):
            fill(core(model), run)
        wrapped = TorchFullyShardedDataParallel(config, TorchFullyShardedDataParallelConfig(), cut)
        dist_checkpointing.save(wrapped.module.sharded_state_dict(), shared[0])
        expected = {name: value.clone() for name, value in whole.state_dict().items() if torch.is_tensor(value)}
        whole.load_state_dict(dist_checkpointing.load(whole.sharded_state_dict(), shared[0]))
        dist.barrier()
        key = "decoder.layers.0.mlp.linear_fc1.weight"
        return float((whole.state_dict()[key] - expected[key]).abs().max()), 0.0


@fault
def resumed_adam_shares_its_step() -> tuple[float, float]:
    """What one resumed step makes of a count of 0 where torch's Adam is sharded: 1 for each parameter that counts."""
    run = tiny_run(dp=2, distributed_optimizer=True)
    with groups(run):
        optimizer = get_megatron_optimizer(
            building.optimizer_config(run), building.build_model(run), use_gloo_process_groups=False
        )
        part = optimizer.chained_optimizers[0] if hasattr(optimizer, "chained_optimizers") else optimizer
        inner = part.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[parameter] = {"step": torch.zeros(()), **moments}
        part.load_state_dict(part.state_dict())  # what a resume does before it reads the moments
        for group in inner.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        inner.step()
        return float(max(state["step"] for state in inner.state.values())), 1.0


@fault
def parameters_saved_before_they_are_gathered() -> tuple[float, float]:
    """Largest difference of a weight in the state dict of two ranks after a step, with overlap_param_gather."""
    run = tiny_run(dp=2, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
    with groups(run):
        state = loop.build(run)
        prepare(run, state)
        train_step(run, state, batches_of(run, state))
        return _disagreement(state), _gathered(state)


def _gathered(state: State) -> float:
    with state.whole_parameters():
        return _disagreement(state)


def _disagreement(state: State) -> float:
    weights = torch.cat([value.detach().flatten() for value in state.model[0].parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    return float((both[0] - both[1]).abs().max())


@fault
def position_ids_are_not_read() -> tuple[float, float]:
    """Change of a loss when positions begin anew in mid-sequence, as --reset-position-ids makes them."""
    run = tiny_run(dp=2)
    with groups(run), torch.no_grad():
        model = core(building.build_chunks(run, building.transformer_config(run))[0])
        fill(model, run)
        tokens = torch.arange(32)[None]
        anew = torch.arange(32)[None] % 16
        before, after = (model(tokens, ids, None, labels=tokens) for ids in (torch.arange(32)[None], anew))
        rope = model.rotary_pos_emb.forward
        with mock.patch.object(model.rotary_pos_emb, "forward", lambda *args, **named: rope(*args, **named)[anew[0]]):
            right = model(tokens, anew, None, labels=tokens)
        return float((before - after).abs().max()), float((before - right).abs().max())


@fault
def fused_cross_entropy_rounds_to_bf16() -> tuple[float, float]:
    """A gradient of FP32 logits, a third less one, that the fused cross entropy has passed through BF16."""
    with groups(tiny_run(dp=2)):
        logits = torch.zeros(1, 1, 3, requires_grad=True)
        group = parallel_state.get_tensor_model_parallel_group()
        fused_vocab_parallel_cross_entropy(logits, torch.zeros(1, 1, dtype=torch.long), group).sum().backward()
        return float(logits.grad[0, 0, 0]), 1 / 3 - 1


@fault
def norm_added_up_one_after_the_other() -> tuple[float, float]:
    """Norm of 10^7 numbers on a CPU."""
    numbers = torch.rand(10**7, generator=torch.Generator().manual_seed(0))
    norm, _ = local_multi_tensor_l2_norm(0, None, [[numbers]], False)
    return float(norm), float(numbers.double().norm())


@fault
def initial_weights_depend_on_the_layout() -> tuple[float, float]:
    """Norm of the gradient at the first step of PP=2 from megatron-core's own initial weights, and of one stage."""

    def own(run: RunConfig) -> float:
        with mock.patch.object(building, "fill", lambda model, run: None):
            return norm(run)

    return own(tiny_run(pp=2)), own(tiny_run(dp=2))


@fault
def megatron_fsdp_adds_gradients_again() -> tuple[float, float]:
    """Gradient norm of Megatron-FSDP over a bare GPTModel, as it is in FP32, that changes its logits in place."""

    def in_place(self: Any, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return own(self, labels, logits.mul_(1.0))

    run, wrapper = tiny_run(dp=2, megatron_fsdp=True), building.megatron_fsdp
    own, ours = building.Llama.compute_language_model_loss, wrapper.settings
    with mock.patch.object(building.Llama, "compute_language_model_loss", in_place):
        right = norm(run)
        with (
            mock.patch.object(wrapper, "Called", lambda model: model),
            mock.patch.object(
                wrapper, "settings", lambda run: {**ours(run), "suggested_communication_unit_size": 10**9}
            ),
        ):
            return norm(run), right


@fault
def megatron_fsdp_alone_doubles_gradients() -> tuple[float, float]:
    """Gradient norm of Megatron-FSDP where each shard group is one process, of one micro batch."""
    return norm(tiny_run(tp=2, global_batch_size=1, megatron_fsdp=True)), norm(tiny_run(tp=2, global_batch_size=1))


@fault
def hsdp_leaves_replicas_apart() -> tuple[float, float]:
    """Norm of the difference of two replicas' gradients, where no no_sync_func names the last micro batch."""

    def unnamed(state: State) -> None:
        state.model[0].config.no_sync_func = None

    run = tiny_run(dp=2, megatron_fsdp=True, hsdp=True)
    return apart(run, unnamed), apart(run)


@fault
def megatron_fsdp_loses_sums_in_bf16() -> tuple[float, float]:
    """Norm of the difference of two tensor parallel ranks' gradients of norms, under sequence parallelism."""
    run = tiny_run(tp=2, sequence_parallel=True, megatron_fsdp=True, dtype="bf16", grad_reduce_in_bf16=True)
    own = building.megatron_fsdp.adapter.MegatronFSDP.scale_gradients
    with mock.patch.object(
        building.megatron_fsdp.MegatronFullySharded, "scale_gradients", lambda self, by: own(self.module, by)
    ):
        wrong = apart(run)
    return wrong, apart(run)


def apart(run: RunConfig, change: Callable[[State], None] = lambda state: None) -> float:
    """Norm of the difference of two ranks' first gradients of what is not cut by tensor parallelism."""
    with groups(run):
        state = loop.build(run)
        prepare(run, state)
        change(state)
        forward_backward(run, state, batches_of(run, state))
        gradients = building.megatron_fsdp.whole_gradients(state.model[0])
        mine = torch.cat([gradient for gradient in gradients.values() if gradient.dim() == 1])
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        return float((both[0] - both[1]).norm())


@fault
def megatron_fsdp_drops_attributes_on_meta() -> tuple[float, float]:
    """Parameters marked as cut by tensor parallelism, once a model on meta is wrapped: without it norms are wrong."""
    run = tiny_run(tp=2, megatron_fsdp=True)

    def marked() -> float:
        with groups(run):
            parameters = core(loop.build(run).model[0]).parameters()
            return float(sum(getattr(parameter, "tensor_model_parallel", False) for parameter in parameters))

    with mock.patch.object(building.megatron_fsdp, "_attributes_again", lambda module: lambda: None):
        wrong = marked()
    return wrong, marked()


@fault
def megatron_fsdp_makes_generators_equal() -> tuple[float, float]:
    """Different states of the generator that tensor parallel ranks keep for themselves, after wrapping."""
    run = tiny_run(tp=2, megatron_fsdp=True)

    def states() -> float:
        with groups(run):
            loop.build(run)
            mine = tensor_parallel.get_cuda_rng_tracker().get_states()["model-parallel-rng"]
            both = [torch.empty_like(mine) for _ in range(2)]
            dist.all_gather(both, mine)
            return 1.0 if torch.equal(*both) else 2.0

    name = "sync_rng_states_across_tp_group"
    own = getattr(building.megatron_fsdp.adapter.FullyShardedDataParallel, name)
    with mock.patch.object(building.megatron_fsdp.MegatronFullySharded, name, own):
        wrong = states()
    return wrong, states()


if __name__ == "__main__":
    distributed.connect(tiny_run(dp=2))
    for name in sys.argv[1:] or FAULTS:
        computed, right = FAULTS[name]()
        if dist.get_rank() == 0:
            print(json.dumps({"fault": name, "computed": computed, "right": right}), flush=True)
    distributed.leave()
