"""Our attention and norm against their formulas, against megatron-core's own, and over context-parallel ranks.

Run as a script, this file compares attention of 2, 3 and 4 context parallel processes with the whole sequence's, and
exits with the verdict.
"""

import contextlib
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SEQUENCE, BATCH, HEADS, HEAD_SIZE = 16, 2, 4, 8
# Of each row's documents: shorter than a chunk of any CP size, over several chunks, of one token, ending with a chunk.
ROWS = {16: ((5, 1, 2, 8), (16,)), 24: ((5, 1, 2, 9, 6, 1), (24,))}


def config(groups, **fields):
    from megatron.core.transformer import TransformerConfig

    shape = dict(num_layers=1, hidden_size=HEADS * HEAD_SIZE, num_attention_heads=HEADS, num_query_groups=groups)
    plain = dict(normalization="RMSNorm", attention_dropout=0.0, masked_softmax_fusion=False, transformer_impl="local")
    return TransformerConfig(**{**shape, **plain, **fields})


class Alone:
    """A process group of one."""

    def size(self):
        return 1

    def rank(self):
        return 0


class Memory:
    """megatron-core's buffer memory, on this device."""

    def get_tensor(self, shape, dtype, name):
        return torch.empty(shape, dtype=dtype)


class Tracker:
    """megatron-core's RNG tracker, which counts its uses and leaves the generator as it is."""

    forks = 0

    def fork(self):
        Tracker.forks += 1
        return contextlib.nullcontext()


def attention(groups, cls=None, cp=None, **fields):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_rocm.model.attention import SdpaCoreAttention

    process_groups = ProcessGroupCollection()
    process_groups.tp = Alone()
    process_groups.cp = cp or Alone()
    cls = cls or SdpaCoreAttention
    return cls(config(groups, **fields), 1, AttnMaskType.causal, "self", pg_collection=process_groups)


def inputs(groups, sequence=SEQUENCE):
    torch.manual_seed(5)
    shapes = [(sequence, BATCH, n, HEAD_SIZE) for n in (HEADS, groups, groups)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def documents(lengths):
    from megatron_rocm.model.documents import Documents

    return Documents(qkv_format="sbhd", lengths=lengths)


def explicit(query, key, value, lengths=None):
    """softmax(q·k / sqrt(d)) · v in FP32, head by head, each position seeing itself and what is before it.

    With the lengths of each row's documents, before it in its own document.
    """
    sequence = query.size(0)
    number = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths or ((sequence,),) * BATCH]
    )
    elsewhere = number[:, :, None] != number[:, None, :]
    share = query.size(2) // key.size(2)
    heads = []
    for head in range(query.size(2)):
        q, k, v = query[:, :, head], key[:, :, head // share], value[:, :, head // share]
        scores = torch.einsum("sbd,tbd->bst", q, k) / math.sqrt(HEAD_SIZE)
        future = torch.ones(scores.shape[1:]).triu(1).bool()
        heads.append(torch.einsum("bst,tbd->sbd", scores.masked_fill(future | elsewhere, -math.inf).softmax(-1), v))
    return torch.cat(heads, dim=-1)


def with_gradients(attend, tensors):
    """The output and the gradients of a weighted sum of it with respect to the tensors."""
    out = attend(*tensors)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


def assert_close(found, wanted):
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [HEADS, 2, 1], ids=["mha", "gqa", "mqa"])
def test_is_the_softmax_formula(groups):
    tensors = inputs(groups)
    assert_close(with_gradients(attention(groups), tensors), with_gradients(explicit, tensors))


@pytest.mark.parametrize("groups", [HEADS, 2, 1], ids=["mha", "gqa", "mqa"])
def test_documents_do_not_see_each_other(groups):
    tensors, attend = inputs(groups), attention(groups)
    within = with_gradients(lambda *qkv: attend(*qkv, packed_seq_params=documents(ROWS[SEQUENCE])), tensors)
    assert_close(within, with_gradients(lambda *qkv: explicit(*qkv, ROWS[SEQUENCE]), tensors))
    assert not torch.allclose(within[0], attend(*tensors))


@pytest.mark.parametrize("groups", [HEADS, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_is_megatron_core_attention(groups, scale, monkeypatch):
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    monkeypatch.setattr(parallel_state, "get_global_memory_buffer", Memory)
    monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", Tracker)
    theirs, ours = attention(groups, DotProductAttention), attention(groups)
    if scale is not None:
        theirs.softmax_scale = ours.softmax_scale = scale
    tensors = inputs(groups)
    future = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool()[None, None]
    assert_close(with_gradients(ours, tensors), with_gradients(lambda *qkv: theirs(*qkv, future), tensors))


def test_drops_out_in_training_only_from_the_tracked_generator(monkeypatch):
    from megatron.core import tensor_parallel

    monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", Tracker)
    monkeypatch.setattr(Tracker, "forks", 0)
    tensors = inputs(HEADS)
    dropping = attention(HEADS, attention_dropout=0.5)
    assert not torch.equal(dropping(*tensors), dropping(*tensors))
    assert Tracker.forks == 2
    dropping.eval()
    torch.testing.assert_close(dropping(*tensors), explicit(*tensors))


@pytest.mark.parametrize("extra", ["attention_mask", "attention_bias", "packed_seq_params"])
def test_refuses_what_it_would_ignore(extra):
    with pytest.raises(ValueError, match=extra):
        attention(HEADS)(*inputs(HEADS), **{extra: torch.zeros(1)})


@pytest.mark.timeout(600)
def test_context_parallel_ranks_are_one(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, str(tmp_path)]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = process.communicate(timeout=500)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
    assert process.returncode == 0, said[-4000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_its_formula(dtype):
    from megatron_rocm.model.norm import RMSNorm

    torch.manual_seed(3)
    norm = RMSNorm(config(HEADS, params_dtype=dtype), hidden_size=32, eps=1e-3)
    assert norm.weight.dtype == dtype
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 32, dtype=dtype)
    wide = x.float()
    wanted = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt() * norm.weight.float()
    torch.testing.assert_close(norm(x).float(), wanted, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_marks_its_weight(sequence_parallel):
    from megatron_rocm.model.norm import RMSNorm

    fields = {"sequence_parallel": True, "tensor_model_parallel_size": 2} if sequence_parallel else {}
    assert RMSNorm(config(HEADS, **fields), hidden_size=32).weight.sequence_parallel is sequence_parallel


def compare_with_whole_sequence(store, rank, ranks):
    """Our part of the output and gradients under context parallelism is that part of the whole's."""
    group_store = torch.distributed.FileStore(store, ranks)
    torch.distributed.init_process_group("gloo", store=group_store, rank=rank, world_size=ranks)
    sequence = 24 if ranks == 3 else SEQUENCE
    size = sequence // (2 * ranks)
    mine = [slice(c * size, (c + 1) * size) for c in (rank, 2 * ranks - 1 - rank)]
    weights = torch.randn(sequence, BATCH, HEADS * HEAD_SIZE, generator=torch.Generator().manual_seed(9))

    def part(whole):
        return torch.cat([whole[piece] for piece in mine])

    for groups in (HEADS, 2, 1):
        for lengths in (None, ROWS[sequence]):
            whole = inputs(groups, sequence)
            wanted = [part(t) for t in with_gradients(lambda *qkv, rows=lengths: explicit(*qkv, rows), whole)]
            parts = [part(t.detach()).requires_grad_() for t in whole]
            attend = attention(groups, cp=torch.distributed.group.WORLD)
            out = attend(*parts, packed_seq_params=documents(lengths) if lengths else None)
            assert_close([out, *torch.autograd.grad((out * part(weights)).sum(), parts)], wanted)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import megatron_rocm.model.attention  # noqa: F401  # once, for all processes
    from megatron_rocm.platform import cpu

    cpu.install()
    torch.set_num_threads(1)
    for number in (2, 3, 4):
        store = os.path.join(sys.argv[1], str(number))
        fork = multiprocessing.get_context("fork").Process
        started = [fork(target=compare_with_whole_sequence, args=(store, rank, number)) for rank in range(number)]
        for one in started:
            one.start()
        for one in started:
            one.join()
        if any(one.exitcode for one in started):
            sys.exit(1)
