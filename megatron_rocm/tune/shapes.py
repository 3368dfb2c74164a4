"""The matrix products of a training step: what one GPU multiplies, how, and how often. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.plan.memory import layers_per_chunk

Phase = Literal["forward", "dgrad", "wgrad"]
Layout = Literal["TN", "NN", "NT"]
Dtype = Literal["bf16", "fp16", "fp32"]
Caller = Literal["torch", "te", "apex"]

# In column-major words, as hipBLASLt and cuBLASLt take them: the transposition of A and of B. A layer keeps its weight
# as [out, in] and its activations as [tokens, in], both row-major. Source: the `layout` of Transformer Engine's
# general_gemm calls (transformer_engine/pytorch/module/linear.py); torch's `x @ weight.t()` and its gradients agree.
LAYOUTS: dict[Phase, Layout] = {"forward": "TN", "dgrad": "NN", "wgrad": "NT"}


@dataclass(frozen=True)
class Gemm:
    """One product D = op(A)·op(B) (+ D where `accumulates`), column-major: D is m × n, the sum is over k.

    `layout` is the transposition of A and B (T or N each), `dtype` that of A and B, `out` that of D. `count` is how
    often a step does it on one GPU, of the pipeline stage that does it most often. `by` is who calls the library:
    torch, Transformer Engine, or the fused weight gradient that megatron-core takes from Apex.
    """

    name: str
    phase: Phase
    m: int
    n: int
    k: int
    layout: Layout
    dtype: Dtype
    out: Dtype
    accumulates: bool
    count: int
    by: Caller = "torch"

    @property
    def flops(self) -> int:
        """Operations of one such product."""
        return 2 * self.m * self.n * self.k

    @property
    def key(self) -> str:
        """What a kernel is chosen by: shape, layout and types, as text."""
        plus = "+" if self.accumulates else ""
        return f"{self.layout} {self.m}x{self.n}x{self.k} {self.dtype}>{plus}{self.out}"


@dataclass(frozen=True)
class Linear:
    """A layer y = x·Wᵀ on one GPU. `forwards` and `backwards` are its passes a micro batch, over its stage's layers."""

    name: str
    outputs: int
    inputs: int
    forwards: int
    backwards: int


def gemms(run: RunConfig) -> tuple[Gemm, ...]:
    """The products of each linear layer (qkv, proj, fc1, fc2, head), its forward pass and both gradients.

    With TP, CP, PP, MBS and recomputation as configured. Attention's own products are not among them: its kernels are
    fused and choose for themselves. Raises UsageError for a run in FP8.
    """
    if run.fp8.enabled:
        raise UsageError(
            "TE_FP8=1: products of FP8 are neither listed nor tuned: torch can't multiply them as Transformer Engine "
            "does, so that a kernel could be judged. Set TE_FP8=0 here, and GEMM_TUNING=1 or 0 for training in FP8"
        )
    tokens = run.training.micro_batch_size * run.training.seq_length // run.parallel.cp
    return tuple(gemm for layer in linears(run) for gemm in _passes(run, layer, tokens))


def linears(run: RunConfig) -> tuple[Linear, ...]:
    """The linear layers of one GPU, each with its part of the weight under tensor parallelism."""
    model, tp = run.model, run.parallel.tp
    layers = _layers(run)
    heads, groups = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    again = {name: layers + _recomputed(run, name, layers) for name in ("qkv", "proj", "fc1", "fc2")}
    return (
        Linear("qkv", (heads + 2 * groups) // tp, model.hidden_size, again["qkv"], layers),
        Linear("proj", model.hidden_size, heads // tp, again["proj"], layers),
        Linear("fc1", 2 * model.ffn_hidden_size // tp, model.hidden_size, again["fc1"], layers),
        Linear("fc2", model.hidden_size, model.ffn_hidden_size // tp, again["fc2"], layers),
        Linear("head", model.padded_vocab_size // tp, model.hidden_size, 1, 1),
    )


def _passes(run: RunConfig, layer: Linear, tokens: int) -> tuple[Gemm, ...]:
    dtype, micro_batches = run.precision.dtype, run.training.num_micro_batches
    fused = _accumulates(run)
    main = dtype if run.precision.grad_reduce_in_bf16 else "fp32"
    shapes: tuple[tuple[Phase, int, int, int, int], ...] = (
        ("forward", layer.outputs, tokens, layer.inputs, layer.forwards),
        ("dgrad", layer.inputs, tokens, layer.outputs, layer.backwards),
        ("wgrad", layer.inputs, layer.outputs, tokens, layer.backwards),
    )
    return tuple(
        Gemm(
            layer.name, phase, m, n, k, LAYOUTS[phase], dtype,
            out=main if fused and phase == "wgrad" else dtype,
            accumulates=fused and phase == "wgrad",
            count=times * micro_batches,
            by=_caller(run, layer, fused and phase == "wgrad"),
        )
        for phase, m, n, k, times in shapes
    )  # fmt: skip


def _caller(run: RunConfig, layer: Linear, accumulates: bool) -> Caller:
    """With Transformer Engine the output layer is still megatron-core's own (ColumnParallelLinear)."""
    if run.hardware.tier == "te" and layer.name != "head":
        return "te"
    return "apex" if accumulates else "torch"


def _accumulates(run: RunConfig) -> bool:
    """Whether weight gradients are added straight to the gradient buffer, as model.build has it."""
    return run.hardware.tier == "te" and not run.parallel.fsdp and run.precision.gradient_accumulation_fusion


def _layers(run: RunConfig) -> int:
    """Transformer layers of the fullest pipeline stage."""
    parallel = run.parallel
    chunks = layers_per_chunk(run.model.num_layers, parallel.pp, parallel.vpp, parallel.count_embedding_and_loss)
    assert chunks is not None, "resolve checks the division"
    return max(sum(stage) for stage in chunks)


def _recomputed(run: RunConfig, name: str, layers: int) -> int:
    """Layers whose product is done a second time in the backward pass."""
    training = run.training
    if not training.recompute:
        return 0
    if training.recompute_granularity == "selective":
        return layers if name in ("fc1", "fc2") and "mlp" in training.recompute_modules else 0
    if training.recompute_method == "uniform" or training.recompute_num_layers is None:
        return layers
    return min(layers, training.recompute_num_layers * run.parallel.vpp)
