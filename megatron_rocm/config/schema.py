"""The schema: every variable a person can type, and the frozen, hashed RunConfig that workers receive.

A field that people can set carries its variable's name, state and note (`var`); a field without one is
derived by `resolve`. Help texts, the docs' table and the parser are made from these declarations.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_rocm.config.blend import Paths
from megatron_rocm.config.checkpoint import Checkpoint
from megatron_rocm.config.fp8 import Fp8
from megatron_rocm.config.variable import (
    BY_RULE,
    MOST,
    MOST_PROCESSES,
    OURS,
    REPAIRED,
    Section,
    Variable,
    var,
)

Sources = tuple[tuple[float | None, str], ...]  # weight and prefix of each


class Model(Section):
    """The network's shape. Sizes in numbers of elements."""

    family: Literal["llama2", "llama3"]
    size: str = var(
        "MODEL_SIZE", BY_RULE, "size of the model: its billions of parameters, or `tiny`",
        text="70, or the largest that fits the GPUs; tiny without a GPU", state=REPAIRED,
        note="rotary base and RoPE scaling are the published model's; the guide's scripts leave Megatron's 10,000",
    )  # fmt: skip
    title: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int = Field(description="ids the tokenizer knows")
    padded_vocab_size: int = Field(description="rows of the embedding: vocab_size up to a multiple of 128·TP")
    max_position_embeddings: int
    rotary_base: int
    rope_scaling: bool = var(
        "ROPE_SCALING", BY_RULE, "stretch the rotary embedding as Llama 3.1 and 3.2 do",
        text="as the published model", state=OURS,
    )  # fmt: skip
    rope_scaling_factor: float
    tied_embeddings: bool
    norm_eps: float = 1e-5
    init_std: float = 0.02


class Parallel(Section):
    """How the model and the batch are laid out over the processes."""

    nnodes: int = var("NNODES", 1, "number of nodes", ge=1, le=MOST_PROCESSES)
    gpus_per_node: int = var(
        "GPUS_PER_NODE", BY_RULE, "processes per node", text="the GPUs it has; TP·PP·CP on a CPU",
        state=OURS, ge=1, le=MOST_PROCESSES,
    )  # fmt: skip
    world_size: int
    tp: int = var(
        "TP", BY_RULE, "tensor parallel size", text="8, at most the GPUs of a node; 1 on a CPU", ge=1, le=MOST_PROCESSES
    )
    pp: int = var("PP", BY_RULE, "pipeline parallel size", text="1; 8 for 405", ge=1, le=MOST_PROCESSES)
    vpp: int = var(
        "VPP", 1, "model chunks per pipeline stage (interleaved schedule); 1 is off", state=OURS, ge=1, le=MOST_PROCESSES,
    )  # fmt: skip
    cp: int = var("CP", 1, "context parallel size", ge=1, le=MOST_PROCESSES)
    dp: int
    sequence_parallel: bool = var("SEQ_PARALLEL", True, "split the sequence in norms and dropouts too; needs TP > 1")
    distributed_optimizer: bool = var(
        "USE_DISTRIBUTED_OPTIMIZER", BY_RULE, "shard optimizer state over the data parallel ranks",
        text="1 with adam where DP·CP > 1, without FSDP and MEGATRON_FSDP", state=OURS,
    )  # fmt: skip
    fsdp: bool = var(
        "FSDP", False, "PyTorch FSDP-v2 instead of the distributed optimizer; turns TP and SEQ_PARALLEL off",
        state=REPAIRED, note="saves and resumes; the guide's script trips over its own CKPT_FORMAT default",
    )  # fmt: skip
    megatron_fsdp: bool = var(
        "MEGATRON_FSDP",
        False,
        "Megatron-FSDP: parameters, gradients and optimizer state sharded over data parallel ranks",
    )
    hsdp: bool = var(
        "ENABLE_HSDP",
        False,
        "with MEGATRON_FSDP=1: shard within a group of processes, replicate over HSDP_NUM_REPLICAS",
    )
    hsdp_replicas: int = var(
        "HSDP_NUM_REPLICAS", 2, "groups that each hold the whole model, with ENABLE_HSDP=1", ge=2, le=MOST_PROCESSES
    )
    overlap_grad_reduce: bool = var(
        "OVERLAP_GRAD_REDUCE", BY_RULE, "reduce gradients while the backward pass runs", text="1 where DP > 1",
        state=OURS,
    )  # fmt: skip
    overlap_param_gather: bool = var(
        "OVERLAP_PARAM_GATHER", BY_RULE, "gather parameters while the forward pass runs",
        text="1 with the distributed optimizer where DP > 1", state=OURS,
    )  # fmt: skip
    count_embedding_and_loss: bool = Field(
        description="embedding and loss count as a layer each when layers are dealt out to the pipeline stages"
    )


class Precision(Section):
    dtype: Literal["bf16", "fp32", "fp16"] = var(
        "PRECISION", BY_RULE, "bf16 or fp16 (both with FP32 master weights), or fp32",
        text="bf16; fp32 for tiny on a CPU",
        state=OURS,
    )  # fmt: skip
    grad_reduce_in_bf16: bool = var(
        "GRAD_REDUCE_IN_BF16", False, "reduce gradients in BF16 instead of FP32",
        note="off unless asked for: FP32 is what converges; the guide's Llama 3 script has 1",
    )  # fmt: skip
    gradient_accumulation_fusion: bool = var(
        "GRADIENT_ACCUMULATION_FUSION", True, "fuse weight gradients into their accumulation",
        note="where Transformer Engine is used",
    )  # fmt: skip
    rope_fusion: bool = var("ROPE_FUSION", True, "fused rotary embedding", note="where Transformer Engine is used")
    fused_single_qkv_rope: bool = var(
        "FUSED_SINGLE_QKV_ROPE", True, "rotary embedding on the undivided QKV", note="where Transformer Engine is used"
    )
    cross_entropy_loss_fusion: bool = var(
        "CROSS_ENTROPY_LOSS_FUSION", True, "fused cross entropy",
        note="on a GPU, in bf16: in fp32 megatron-core's fused kernel rounds gradients to BF16",
    )  # fmt: skip
    cross_entropy_fusion_impl: Literal["te", "native"] = var(
        "CROSS_ENTROPY_FUSION_IMPL", "te", "whose fused cross entropy", note="native where Transformer Engine is missing",
    )  # fmt: skip
    flash_attention: bool = var(
        "USE_FLASH_ATTN", BY_RULE, "flash attention instead of Transformer Engine's fused one",
        text="1 for Llama 2, 0 for Llama 3", note="without Transformer Engine always torch's own flash kernel",
    )  # fmt: skip
    loss_scale: float | None = var(
        "LOSS_SCALE", None, "with PRECISION=fp16: a fixed scale of the loss", text="dynamic", state=OURS, ge=1, le=2.0**100,
    )  # fmt: skip
    initial_loss_scale: float = var(
        "INITIAL_LOSS_SCALE", 2.0**32, "the dynamic loss scale's first value", text="2^32", state=OURS, ge=1, le=2.0**100,
    )  # fmt: skip
    min_loss_scale: float = var(
        "MIN_LOSS_SCALE", 1.0, "the dynamic loss scale's least value", state=OURS, gt=0, le=2.0**100
    )
    loss_scale_window: int = var(
        "LOSS_SCALE_WINDOW", 1000, "steps without overflow after which the loss scale doubles", state=OURS, ge=1, le=MOST,
    )  # fmt: skip
    hysteresis: int = var("HYSTERESIS", 2, "overflows after which the loss scale halves", state=OURS, ge=1, le=MOST)


class Training(Section):
    micro_batch_size: int = var("MBS", 1, "sequences per process and micro batch", ge=1, le=MOST)
    global_batch_size: int = var(
        "BS", BY_RULE, "sequences per step over all processes",
        text="8, or the next multiple of MBS·DP·PP", ge=1, le=MOST,
    )  # fmt: skip
    num_micro_batches: int
    seq_length: int = var(
        "SEQ_LENGTH", BY_RULE, "tokens per sequence", text="2048; 4096 for Llama 2; 256 for tiny", ge=1, le=MOST
    )
    train_iters: int = var("TOTAL_ITERS", 12, "steps to train, counted from the very first", ge=1, le=MOST)
    seed: int = var("SEED", 1234, "seed of weights, data order and dropout", state=OURS, ge=0, lt=2**31)
    rampup: tuple[int, int, int] | None = var(
        "RAMPUP_BATCH_SIZE", None, "`start increment samples`: the batch grows from start to BS by increments, evenly over so "
        "many samples", text="BS from the first step", values="three whole numbers: start increment samples", state=OURS,
    )  # fmt: skip
    recompute: bool = var("RECOMPUTE", False, "recompute activations in the backward pass")
    recompute_granularity: Literal["full", "selective"] = var(
        "RECOMPUTE_GRANULARITY",
        "full",
        "with RECOMPUTE=1: full (whole layers) or selective (RECOMPUTE_MODULES)",
        state=OURS,
    )
    recompute_method: Literal["block", "uniform"] = var(
        "RECOMPUTE_METHOD", "block", "block: the first RECOMPUTE_NUM_LAYERS layers of each stage and chunk; uniform: all, "
        "in units of so many", state=OURS,
    )  # fmt: skip
    recompute_num_layers: int | None = var(
        "RECOMPUTE_NUM_LAYERS", BY_RULE, "layers per pipeline stage and chunk to recompute, with RECOMPUTE=1",
        text="all of them; 1 with RECOMPUTE_METHOD=uniform", state=REPAIRED,
        note="honoured: the guide's training scripts never read it", ge=1, le=MOST,
    )  # fmt: skip
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = var(
        "RECOMPUTE_MODULES", ("core_attn",), "what RECOMPUTE_GRANULARITY=selective recomputes in every layer",
        text="core_attn", values="core_attn, mlp, or both", state=OURS, min_length=1,
    )  # fmt: skip
    cpu_offloading_num_layers: int = var(
        "CPU_OFFLOADING_NUM_LAYERS", 0, "layers whose activations wait in host memory for the backward pass; 0 is off",
        state=OURS, note="with Transformer Engine", ge=0, le=MOST,
    )  # fmt: skip
    nan_policy: Literal["warn", "skip", "stop", "rollback"] = var(
        "NAN_POLICY", "stop", "on a loss or gradient that is not finite: warn, skip the update, stop, or rollback to the last "
        "checkpoint and go on past the batch", state=OURS,
    )  # fmt: skip
    spike_policy: Literal["warn", "skip", "stop", "rollback"] = var(
        "SPIKE_POLICY", "warn", "on a loss above SPIKE_FACTOR: the same choices", state=OURS
    )
    spike_factor: float = var(
        "SPIKE_FACTOR", 0.0, "a loss above so many times the recent median is a spike; 0 is off",
        text="0; 2 with TE_FP8=1", state=OURS, ge=0, le=MOST,
    )  # fmt: skip
    deterministic: bool = var(
        "DETERMINISTIC", False, "the same bits in every repetition, at some speed: deterministic kernels alone", state=OURS,
    )  # fmt: skip


class Optimizer(Section):
    name: Literal["adam", "sgd"] = var("OPTIMIZER", "adam", "adam (AdamW) or sgd (momentum 0.9)")
    lr: float = var("LR", BY_RULE, "peak learning rate", text="1e-4; 3e-3 for tiny", state=OURS, gt=0, lt=10)
    min_lr: float = var("MIN_LR", BY_RULE, "learning rate where the decay ends", text="LR / 10", state=OURS, ge=0)
    lr_warmup_iters: int = var(
        "LR_WARMUP_ITERS", BY_RULE, "steps of linear warmup", text="0", state=OURS, ge=0, le=MOST
    )
    lr_decay_iters: int = var(
        "LR_DECAY_ITERS", BY_RULE, "step where the decay ends", text="TOTAL_ITERS", state=OURS, ge=1, le=MOST
    )
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = var(
        "LR_DECAY_STYLE", "cosine", "course of the learning rate after the warmup: cosine, linear, constant, or WSD (stable, "
        "then decaying)", state=OURS,
    )  # fmt: skip
    wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = var(
        "LR_WSD_DECAY_STYLE", "exponential", "course of WSD's decay", state=OURS
    )
    wsd_decay_iters: int | None = var(
        "LR_WSD_DECAY_ITERS", None, "steps of WSD's decay, the last ones before LR_DECAY_ITERS",
        text="a tenth of LR_DECAY_ITERS", state=OURS, ge=1, le=MOST,
    )  # fmt: skip
    weight_decay: float = var("WEIGHT_DECAY", 0.1, "decoupled weight decay", state=OURS, ge=0, le=1)
    adam_beta1: float = var("ADAM_BETA1", 0.9, "Adam's first moment decay", state=OURS, ge=0, lt=1)
    adam_beta2: float = var("ADAM_BETA2", 0.95, "Adam's second moment decay", state=OURS, ge=0, lt=1)
    adam_eps: float = var("ADAM_EPS", 1e-8, "Adam's epsilon", state=OURS, gt=0, lt=1)
    clip_grad: float = var("CLIP_GRAD", 1.0, "clip the gradient's norm to this; 0 is off", state=OURS, ge=0)
    cpu_offload: bool = var(
        "OPTIMIZER_CPU_OFFLOAD", False, "keep optimizer state in host memory and update there", state=OURS
    )
    offload_fraction: float = var(
        "OPTIMIZER_OFFLOAD_FRACTION", 1.0, "share of the optimizer state that OPTIMIZER_CPU_OFFLOAD=1 moves", state=OURS,
        gt=0, le=1,
    )  # fmt: skip


class Data(Section):
    blend: Sources | None = var(
        "DATA_PATH", None, "prefix of a .bin/.idx pair, `weight prefix weight prefix …`, or a YAML file of such blends",
        text="mock data",
    )  # fmt: skip
    split: str = var("SPLIT", "99,1,0", "shares of training, validation and test documents", state=OURS)
    train_blend: Sources | None = var(
        "TRAIN_DATA_PATH", None, "instead of DATA_PATH: what to train on, in the same forms", text="a share of DATA_PATH",
        state=OURS,
    )  # fmt: skip
    valid_blend: Sources | None = var(
        "VALID_DATA_PATH", None, "with TRAIN_DATA_PATH: what to evaluate", text="none", state=OURS
    )
    test_blend: Sources | None = var(
        "TEST_DATA_PATH", None, "with TRAIN_DATA_PATH: what is set aside for testing; checked, but not read by training",
        text="none", state=OURS,
    )  # fmt: skip
    blend_by: Literal["token", "document"] = var(
        "BLEND_BY", "token", "what a blend's weights count: token (samples, all of one length) or document", state=OURS
    )
    blend_max_epochs: float = var(
        "BLEND_MAX_EPOCHS", 4.0, "warn where a run reads a source more often", state=OURS, gt=0, le=MOST,
        note="repeated up to 4 times, data teach about as much as new ones (Muennighoff et al. 2023, arXiv 2305.16264)",
    )  # fmt: skip
    cache_path: str | None = var(
        "DATA_CACHE_PATH", BY_RULE, "folder for index files, shared by all nodes", text="`cache` beside the first prefix",
    )  # fmt: skip
    tokenizer_type: Literal["HuggingFaceTokenizer", "Llama2Tokenizer"] = var(
        "TOKENIZER_TYPE", "HuggingFaceTokenizer", "HuggingFaceTokenizer or Llama2Tokenizer (a SentencePiece file)"
    )
    tokenizer_model: str | None = var(
        "TOKENIZER_MODEL", BY_RULE, "tokenizer the data was made with: a folder, a file or a hub name",
        text="what the data was made with; without data none is needed",
    )  # fmt: skip
    eod: int = Field(description="id that ends a document")
    fingerprint: str | None = Field(None, description="of the tokenizer that made the data")
    reset_attention_mask: bool = var(
        "RESET_ATTENTION_MASK", False, "attention does not cross the end of a document within a sample", state=OURS
    )
    reset_position_ids: bool = var(
        "RESET_POSITION_IDS", False, "positions start anew after the end of a document", state=OURS
    )
    eod_mask_loss: bool = var(
        "EOD_MASK_LOSS", False, "leave out of the loss what is predicted from a document's end", state=OURS
    )

    @property
    def paths(self) -> Paths:
        """What the run draws from; empty for mock data."""
        own = {"train": self.train_blend, "valid": self.valid_blend, "test": self.test_blend}
        return {name: blend for name, blend in own.items() if blend} if self.train_blend else self.blend or ()


class Logging(Section):
    log_interval: int = var("LOG_INTERVAL", 1, "steps between log lines", ge=1, le=MOST)
    eval_interval: int = var("EVAL_INTERVAL", 5000, "steps between evaluations", ge=1, le=MOST)
    eval_iters: int = var("EVAL_ITERS", -1, "global batches per evaluation; 0 or -1 is none", ge=-1, le=MOST)
    tensorboard: bool = var("TENSORBOARD", True, "write TensorBoard events into the run folder", state=OURS)
    wandb: bool = Field(description="log to Weights & Biases: WANDB_API_KEY is set")
    wandb_project: str = var("WANDB_PROJECT", "megatron-rocm", "Weights & Biases project", state=OURS)


class Core(Section):
    """Fields of megatron-core's own classes, as core.<class>.<field>=."""

    transformer: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    ddp: dict[str, Any] = {}


class Launch(Section):
    """How this node's part of the run is started."""

    node_rank: int = var("NODE_RANK", 0, "this node's number, 0 is the master", ge=0, le=MOST_PROCESSES)
    master_addr: str = var(
        "MASTER_ADDR",
        "localhost",
        "host name or address of node 0",
        pattern=r"^[\w.:%\[\]-]+$",
        values="a host name or an address",
    )
    master_port: int = var("MASTER_PORT", BY_RULE, "TCP port on node 0", text="6000; 6020 for Llama 2", ge=1, le=65535)
    rdzv_timeout: int = var("RDZV_TIMEOUT", 600, "seconds to wait for the other nodes", state=OURS, ge=5, le=MOST)
    network_interface: str = var(
        "NETWORK_INTERFACE", "", "interface for connections between nodes, by its whole name",
        text="the one that the route to MASTER_ADDR takes", pattern=r"^[^\s/,=^]{0,15}$",
        values="the name of one network interface", state=REPAIRED,
        note="found by each node: the guide's Slurm script has one name for all; docs/network.md",
    )  # fmt: skip
    exp_name: str = var(
        "EXP_NAME",
        "perf",
        "name of the run: output_<EXP_NAME>.log in the run folder",
        pattern=r"^[\w.+-]+$",
        values="letters, digits and . _ + -",
    )
    log_dir: str = var("LOG_DIR", BY_RULE, "run folder", text="experiment/<what>/<precision>/<time>")
    tee_output: bool = var("TEE_OUTPUT", True, "show the log as well as writing it to the run folder")
    gemm_tuning: str = var(
        "GEMM_TUNING", "1", "kernels of matrix products: 1 Transformer Engine tries some at the first call, 0 the library's "
        "own choice, or a file of `megatron-rocm tune`", values="0, 1 or a file of `megatron-rocm tune`",
        note="on AMD; 1 with Transformer Engine; docs/tuning.md",
    )  # fmt: skip
    no_training: bool = var("NO_TRAINING", False, "train nothing, print the summary of LOG_DIR's log")


class Hardware(Section):
    """What the run was resolved for."""

    vendor: Literal["amd", "nvidia", "cpu"]
    arch: str
    gpu_memory: int = Field(description="bytes per GPU; on a CPU the node's memory")
    tier: Literal["torch", "te"] = Field(description="torch: megatron-core's local layers; te: Transformer Engine's")
    threads: int = Field(description="CPU threads per process")


# What may differ from node to node: fields of a section, or all of it.
NODE_LOCAL: dict[str, set[str] | None] = {"launch": None, "hardware": {"gpu_memory", "threads"}}


def digest(fields: dict[str, dict[str, Any]]) -> str:
    """16 hex digits over a run's fields, as JSON has them, but for the node-local ones.

    Taken of a file's own fields, so that the file of an older version, which has fewer, is as good as a new one.
    """
    common = {
        section: {name: value for name, value in values.items() if name not in (NODE_LOCAL.get(section) or ())}
        for section, values in fields.items()
        if NODE_LOCAL.get(section, ()) is not None
    }
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:16]


class RunConfig(Section):
    """A resolved run. Frozen; equal hashes mean equal runs."""

    model: Model
    parallel: Parallel
    precision: Precision
    training: Training
    optimizer: Optimizer
    data: Data
    checkpoint: Checkpoint
    logging: Logging
    hardware: Hardware
    fp8: Fp8 = Fp8()
    core: Core = Core()
    launch: Launch

    @property
    def hash(self) -> str:
        """16 hex digits over everything that all nodes of a run have in common."""
        return digest(self.model_dump(mode="json"))

    def save(self, path: str | Path) -> None:
        """Write as JSON with its hash; whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"hash": self.hash, **self.model_dump(mode="json")}, indent=1) + "\n")
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read what `save` wrote. Raises ValueError where the text does not have the hash it names."""
        fields = json.loads(Path(path).read_text())
        said = fields.pop("hash")
        found = digest(fields)
        if found != said:
            raise ValueError(f"{path}: the configuration was changed by hand (hash {found}, file says {said})")
        return cls.model_validate(fields)


def variables() -> Iterator[Variable]:
    """Every variable that has a field, in the order of the schema."""
    for section, section_field in RunConfig.model_fields.items():
        kind = section_field.annotation
        assert isinstance(kind, type) and issubclass(kind, Section)
        for info in kind.model_fields.values():
            meta = info.json_schema_extra
            if isinstance(meta, dict) and "var" in meta:
                text = str(meta["text"]) or _shown(info.default)
                yield Variable(
                    str(meta["var"]), section, info.description or "", info.default, text, str(meta["state"]),
                    str(meta["note"]), info,
                )  # fmt: skip


def _shown(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else f"{value}"
