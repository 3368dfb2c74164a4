"""Parameters per process, and the memory that weights, gradients and optimizer state take: an exact lower bound."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rocm.config.schema import Model, RunConfig

GIB = 2**30


def count_parameters(model: Model, *, padded: bool = False) -> int:
    """Parameters of the whole model; `padded` counts the embedding rows that only pad the vocabulary."""
    rows = model.padded_vocab_size if padded else model.vocab_size
    tables = 1 if model.tied_embeddings else 2
    return tables * rows * model.hidden_size + model.num_layers * sum(_layer(model)) + model.hidden_size


def _layer(model: Model) -> tuple[int, int]:
    """(parameters that TP divides, parameters that every TP rank holds) of one transformer layer."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    qkv = hidden * model.kv_channels * (heads + 2 * model.num_query_groups)
    out = heads * model.kv_channels * hidden
    return qkv + out + 3 * hidden * model.ffn_hidden_size, 2 * hidden


def layers_per_chunk(num_layers: int, pp: int, vpp: int, count_embedding_and_loss: bool) -> list[list[int]] | None:
    """Layers of each [stage][chunk], as megatron-core 0.16 deals them out, or None where they don't divide.

    Source: get_num_layers_to_build in megatron/core/transformer/transformer_block.py. Embedding and loss, where
    counted, take one layer's place in the first chunk of the first stage and the last chunk of the last one.
    """
    places = num_layers + (2 if count_embedding_and_loss else 0)
    if places % (pp * vpp):
        return None
    chunks = [[places // (pp * vpp)] * vpp for _ in range(pp)]
    if count_embedding_and_loss:
        chunks[0][0] -= 1
        chunks[-1][-1] -= 1
    return chunks


def parameters_per_process(run: RunConfig) -> int:
    """Parameters held by a process of the fullest pipeline stage; on a CPU, where memory is shared, by the mean one."""
    model, parallel = run.model, run.parallel
    chunks = layers_per_chunk(model.num_layers, parallel.pp, parallel.vpp, parallel.count_embedding_and_loss)
    assert chunks is not None, "resolve checks the division before it asks for memory"
    divided, whole = _layer(model)
    table = model.padded_vocab_size * model.hidden_size // parallel.tp
    held = []
    for stage, layers in enumerate(chunks):
        first, last = stage == 0, stage == parallel.pp - 1
        tables = first + last
        if model.tied_embeddings and first and last:
            tables = 1
        held.append(sum(layers) * (divided // parallel.tp + whole) + tables * table + last * model.hidden_size)
    return max(held) if run.hardware.vendor != "cpu" else -(-sum(held) // len(held))


@dataclass(frozen=True)
class Bound:
    """Bytes that the fullest process needs whatever the activations are."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def lower_bound(run: RunConfig) -> Bound:
    """Weights, gradients and optimizer state of the fullest process, in bytes.

    BF16 keeps an FP32 master copy beside Adam's two moments (12 bytes a parameter) or SGD's momentum (8), FP32
    has no copy; gradients are kept in the type they are reduced in. FP8_PARAM_GATHER's weights count as one byte. The
    distributed optimizer divides its state by DP·CP. FSDP keeps all in FP32, without a copy, and divides all of it.
    Megatron-FSDP divides all of it too, over the processes of one replica. What OPTIMIZER_CPU_OFFLOAD moves to the host
    is not counted.
    """
    held = parameters_per_process(run)
    share = held / (run.parallel.dp * run.parallel.cp)
    moments: float = 8 if run.optimizer.name == "adam" else 4
    if run.parallel.fsdp:
        return Bound(held, int(4 * share), int(4 * share), int(moments * share))
    kept: float = held
    if run.parallel.megatron_fsdp:
        share *= run.parallel.hsdp_replicas if run.parallel.hsdp else 1
        kept = share
    full = run.precision.dtype == "fp32"
    weight = 4 if full else 1 if run.fp8.enabled and run.fp8.param_gather else 2
    gradient = 2 if run.precision.grad_reduce_in_bf16 else 4
    state = moments if full else moments + 4
    if run.optimizer.cpu_offload:
        state *= 1 - run.optimizer.offload_fraction
    divided = run.parallel.distributed_optimizer or run.parallel.megatron_fsdp
    return Bound(held, int(weight * kept), int(gradient * kept), int(state * (share if divided else held)))
