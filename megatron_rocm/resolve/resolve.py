"""RunRequest + Machine → RunConfig: defaults, adjustments with their reason, rules, and whether it can fit."""

from __future__ import annotations

import datetime
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_rocm.config import core_fields, schema
from megatron_rocm.config.presets import GUIDE_SIZE, PRESETS, sizes
from megatron_rocm.config.request import RunRequest
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.data.facts import DataFacts, check_size, describe, parse_blend, parse_split
from megatron_rocm.data.hub import is_hub_name
from megatron_rocm.errors import UsageError
from megatron_rocm.plan.memory import GIB, lower_bound
from megatron_rocm.platform.machine import Machine
from megatron_rocm.platform.settings import environment
from megatron_rocm.resolve.rules import RULES, Draft, TooFewProcesses

VOCAB_MULTIPLE = 128  # Megatron-LM's make_vocab_size_divisible_by, times TP
MOST_NODES = 4096


@dataclass(frozen=True)
class Resolution:
    """A resolved run with what a person wants to know about it."""

    config: RunConfig
    origins: dict[str, str]  # variable → where its value comes from
    notes: list[str]  # what was adjusted or assumed, and why
    environment: dict[str, tuple[str, str]]  # variable → (value, why)
    request: RunRequest
    machine: Machine


Describe = Callable[..., DataFacts]


def resolve(
    request: RunRequest,
    machine: Machine,
    said_environment: dict[str, str] | None = None,
    *,
    dry_run: bool = False,
    describe: Describe = describe,
    now: datetime.datetime | None = None,
) -> Resolution:
    """Resolve a request against a machine.

    `said_environment` is the user's own environment, whose library settings win over ours. With `dry_run` nothing
    is fetched. Raises UsageError, with one message, for whatever can't be trained.
    """
    if not machine.is_here and not dry_run:
        raise UsageError(f"TARGET={request.text('TARGET')}: this machine is another one; a plan for it needs DRY_RUN=1")
    facts = _data(request, dry_run, describe)
    size = _size(request, machine, facts)
    try:
        draft = _draft(request, machine, size, facts, None)
    except TooFewProcesses as error:
        nodes = nodes_needed(request, machine, size, facts)
        raise UsageError(f"{error}. {_on_nodes(request, nodes)}" if nodes else str(error)) from None
    config = _config(draft, request, facts, now or datetime.datetime.now())
    _check_fit(config, request, machine, facts)
    if draft["DATA_PATH"]:
        names = ("train", "valid") if draft["EVAL_ITERS"] > 0 else ("train",)
        check_size(parse_blend(draft["DATA_PATH"]), draft["SPLIT"], draft["SEQ_LENGTH"], names)
    elif facts is None and request.text("TOKENIZER_MODEL"):
        draft.notes.append("TOKENIZER_MODEL is looked up when the run starts; here the vocabulary is the published one")
    tuning = request.text("GEMM_TUNING", "1") == "1"
    settings = environment(config, machine, said_environment or {}, request.exports, tuning)
    return Resolution(config, draft.origins, draft.notes, settings, request, machine)


def _data(request: RunRequest, dry_run: bool, describe: Describe) -> DataFacts | None:
    """What the data and the tokenizer are; None for mock data without a tokenizer."""
    path, mock = request.text("DATA_PATH"), request.text("MOCK_DATA")
    if path and mock == "1":
        raise UsageError("MOCK_DATA=1 with DATA_PATH: take one of them away")
    if mock == "0" and not path:
        raise UsageError("MOCK_DATA=0: real data need DATA_PATH; prepare_dataset.sh makes some")
    model = request.text("TOKENIZER_MODEL") or None
    if not path and not model:
        return None
    kind = request.text("TOKENIZER_TYPE", "HuggingFaceTokenizer")
    try:
        return describe(parse_blend(path) if path else (), kind, model, offline=dry_run)
    except UsageError:
        if dry_run and not path and model and is_hub_name(model):
            return None  # a plan needs no network
        raise


def _size(request: RunRequest, machine: Machine, facts: DataFacts | None) -> str:
    family, said = request.family, request.text("MODEL_SIZE").lower().removesuffix("b")
    if said:
        if (family, said) not in PRESETS:
            elsewhere = [of for of, size in PRESETS if size == said]
            hint = f"; train_{elsewhere[0]}.sh has it" if elsewhere else ""
            raise UsageError(
                f"MODEL_SIZE={request.text('MODEL_SIZE')}: train_{family}.sh trains {', '.join(sizes(family))}{hint}"
            )
        return said
    if machine.vendor == "cpu":
        return "tiny"
    published = [size for size in sizes(family) if size.isdigit() and int(size) <= int(GUIDE_SIZE)]
    for size in sorted(published, key=int, reverse=True):
        try:
            draft = _draft(request, machine, size, facts, None)
        except UsageError:
            continue
        if _fits(_config(draft, request, facts, datetime.datetime.now()), machine):
            return size
    return sorted(published, key=int)[-1]  # whose message says what stands in the way


def _draft(request: RunRequest, machine: Machine, size: str, facts: DataFacts | None, nnodes: int | None) -> Draft:
    """The draft of a request with every value filled in and every rule checked."""
    preset = PRESETS[request.family, size]
    draft = Draft(preset, machine)
    for name, said in request.said.items():
        draft.set(name, said.value, said.origin)
    if nnodes:
        draft.set("NNODES", nnodes, "rule")
        draft.set("NODE_RANK", 0, "rule")
    draft.set("MODEL_SIZE", size, draft.origins.get("MODEL_SIZE", "default"))
    if draft.origins["MODEL_SIZE"] == "default":
        what = "no GPU here" if machine.vendor == "cpu" else f"{len(machine.gpus)} × {machine.name}"
        draft.notes.append(f"MODEL_SIZE is not set: {preset.title} is trained ({what})")
    _layout_defaults(draft, request.family)
    _batch_defaults(draft, request.family)
    _other_defaults(draft, request)
    for variable in schema.variables():
        if variable.default is not schema.BY_RULE:
            draft.default(variable.name, variable.default)
    _adjust(draft)
    for rule in RULES:
        rule.check(draft)
    return draft


def _layout_defaults(draft: Draft, family: str) -> None:
    preset, machine = draft.preset, draft.machine
    for name in ("FSDP", "NNODES", "CP", "VPP"):
        draft.default(name, {"FSDP": False}.get(name, 1))
    if draft["FSDP"]:
        draft.adjust("TP", 1, "FSDP=1 shards over all processes")
        draft.adjust("SEQ_PARALLEL", False, "FSDP=1 has no tensor parallel group to split the sequence over")
    for name, value in preset.defaults.items():
        if name == "PP" and draft["FSDP"] or name == "PRECISION" and machine.vendor != "cpu":
            continue
        draft.default(name, value, f"preset {preset.title}")
    draft.default("PP", 1)
    if machine.vendor == "cpu":
        draft.default("TP", 1)
        draft.default("GPUS_PER_NODE", draft.model_parallel)
    draft.default("GPUS_PER_NODE", max(1, len(machine.gpus)))
    draft.default("TP", _largest_tp(draft))


def _largest_tp(draft: Draft) -> int:
    """The guide's 8, or less where the GPUs of a node or the model's heads are fewer."""
    heads, groups, gpus = draft.preset.num_attention_heads, draft.preset.num_query_groups, draft["GPUS_PER_NODE"]
    for tp in (8, 4, 2):
        whole = draft.world % (tp * draft["PP"] * draft["CP"]) == 0
        if gpus % tp == 0 and heads % tp == 0 and groups % tp == 0 and whole:
            return tp
    return 1


def _batch_defaults(draft: Draft, family: str) -> None:
    draft.default("MBS", 1)
    if "BS" not in draft:
        unit = draft["MBS"] * max(1, draft.dp) * draft["PP"]
        batch = -(-8 // unit) * unit
        draft.set("BS", batch, "default" if batch == 8 else f"rule: a multiple of MBS·DP·PP = {unit}")
    draft.default("SEQ_LENGTH", 4096 if family == "llama2" else 2048)
    draft.default("TOTAL_ITERS", 12)


def _other_defaults(draft: Draft, request: RunRequest) -> None:
    draft.default("SEQ_PARALLEL", True)
    draft.default("PRECISION", "bf16")
    draft.default("ROPE_SCALING", draft.preset.rope_scaling_factor is not None)
    draft.default("USE_FLASH_ATTN", request.family == "llama2")
    draft.default("LR", 1e-4)
    draft.default("MIN_LR", draft["LR"] / 10)
    draft.default("LR_WARMUP_ITERS", 0)
    draft.default("LR_DECAY_ITERS", max(draft["TOTAL_ITERS"], draft["LR_WARMUP_ITERS"] + 1))
    draft.default("OPTIMIZER", "adam")
    draft.default("MASTER_PORT", 6020 if request.family == "llama2" else 6000)
    draft.default("SPLIT", "99,1,0")
    draft.set("SPLIT_SHARES", parse_split(draft["SPLIT"]), "rule")
    draft.set("WANDB", "WANDB_API_KEY" in request.said, "rule")
    parallel = draft.world > draft.model_parallel
    sharded = draft["OPTIMIZER"] == "adam" and not draft["FSDP"]
    draft.default("OVERLAP_GRAD_REDUCE", parallel and not draft["FSDP"])
    draft.default("OVERLAP_PARAM_GATHER", parallel and sharded and draft["OVERLAP_GRAD_REDUCE"])
    draft.default("RECOMPUTE", False)
    draft.default("RECOMPUTE_NUM_LAYERS", None)


def _adjust(draft: Draft) -> None:
    """What follows from other choices, as in the guide; a said value that changes gets a line."""
    preset = draft.preset
    if draft["TP"] == 1 and draft["SEQ_PARALLEL"]:
        draft.set("SEQ_PARALLEL", False, "rule")  # the guide's default where nothing is split: no line
    if draft["ROPE_SCALING"] and preset.rope_scaling_factor is None:
        draft.adjust("ROPE_SCALING", False, f"{preset.title} has none")
    if draft["PRECISION"] == "fp32" and draft["GRAD_REDUCE_IN_BF16"]:
        draft.adjust("GRAD_REDUCE_IN_BF16", False, "PRECISION=fp32 keeps FP32 gradients")
    if draft["FSDP"]:
        for name in ("OVERLAP_GRAD_REDUCE", "OVERLAP_PARAM_GATHER", "GRADIENT_ACCUMULATION_FUSION"):
            draft.adjust(name, False, "FSDP=1 has its own way")
    if draft.machine.tier == "torch":
        for name in ("ROPE_FUSION", "FUSED_SINGLE_QKV_ROPE", "GRADIENT_ACCUMULATION_FUSION"):
            draft.adjust(name, False, "a kernel of Transformer Engine's, which is not used here")
        draft.adjust("CROSS_ENTROPY_FUSION_IMPL", "native", "Transformer Engine is not used here")
    else:
        _adjust_to_libraries(draft)
    if draft["CROSS_ENTROPY_LOSS_FUSION"] and (draft.machine.vendor == "cpu" or draft["PRECISION"] == "fp32"):
        why = (
            "no GPU to fuse kernels on"
            if draft.machine.vendor == "cpu"
            else "the fused kernel rounds gradients to BF16"
        )
        draft.adjust("CROSS_ENTROPY_LOSS_FUSION", False, why)
    if not draft["ROPE_FUSION"]:
        draft.adjust("FUSED_SINGLE_QKV_ROPE", False, "ROPE_FUSION=0")
    if draft["SEQ_LENGTH"] > preset.max_position_embeddings:
        longest = preset.max_position_embeddings
        draft.notes.append(f"SEQ_LENGTH={draft['SEQ_LENGTH']} is longer than {preset.title}'s {longest} positions")
    chunks = draft.layers(draft.layers(False) is None)
    most = max(max(stage) for stage in chunks) if chunks else preset.num_layers
    if not draft["RECOMPUTE"]:
        if draft["RECOMPUTE_NUM_LAYERS"]:
            draft.adjust("RECOMPUTE_NUM_LAYERS", None, "RECOMPUTE=0")
    elif draft["RECOMPUTE_NUM_LAYERS"] is None:
        draft.set("RECOMPUTE_NUM_LAYERS", most, "default")
    elif draft["RECOMPUTE_NUM_LAYERS"] > most:
        draft.adjust("RECOMPUTE_NUM_LAYERS", most, "the layers a process holds")
    if draft["NNODES"] > 1 and draft["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1"):
        draft.notes.append(
            f"MASTER_ADDR={draft['MASTER_ADDR']} reaches this machine only: other hosts need node 0's address"
        )
    if "SAVE_CKPT_PATH" not in draft.origins or not draft["SAVE_CKPT_PATH"]:
        draft.notes.append("SAVE_CKPT_PATH is not set: nothing is saved")


# A switch that Transformer Engine's tier has by default → the package it needs besides.
LIBRARIES = {"GRADIENT_ACCUMULATION_FUSION": "fused_weight_gradient_mlp_cuda", "USE_FLASH_ATTN": "flash_attn"}


def _adjust_to_libraries(draft: Draft) -> None:
    """Turn off what this machine lacks a package for; asked for by name, it is an error."""
    if draft["PRECISION"] == "fp32":
        draft.adjust("USE_FLASH_ATTN", False, "flash attention's kernels are for 16 bits")
    for name, package in LIBRARIES.items():
        if not draft[name] or not draft.machine.is_here or importlib.util.find_spec(package):
            continue
        if draft.origins[name] not in ("default", "rule"):
            raise UsageError(f"{name}=1 needs the Python package {package}, which is not installed: set {name}=0")
        draft.set(name, False, "rule")
        draft.notes.append(f"{name} is off: the Python package {package} is not installed")


def _config(draft: Draft, request: RunRequest, facts: DataFacts | None, now: datetime.datetime) -> RunConfig:
    """The frozen configuration of a checked draft."""
    preset, machine, family = draft.preset, draft.machine, request.family
    sharded = draft["OPTIMIZER"] == "adam" and not draft["FSDP"]
    vocab = facts.vocab_size if facts else preset.vocab_size
    unit = VOCAB_MULTIPLE * draft["TP"]
    blend = parse_blend(draft["DATA_PATH"]) if draft["DATA_PATH"] else None
    cache = draft.values.get("DATA_CACHE_PATH") or (blend and f"{os.path.dirname(blend[0][1]) or '.'}/cache")
    derived: dict[str, dict[str, Any]] = {
        "model": {
            **{name: getattr(preset, name) for name in _SHAPE},
            "family": family,
            "kv_channels": preset.head_size,
            "vocab_size": vocab,
            "padded_vocab_size": -(-vocab // unit) * unit,
            "max_position_embeddings": max(preset.max_position_embeddings, draft["SEQ_LENGTH"]),
            "rope_scaling_factor": preset.rope_scaling_factor or 1.0,
        },
        "parallel": {
            "world_size": draft.world,
            "dp": draft.dp,
            "distributed_optimizer": sharded,
            "count_embedding_and_loss": draft.layers(False) is None,
        },
        "training": {"num_micro_batches": draft.micro_batches},
        "data": {
            "blend": blend and tuple((1.0 if weight is None else weight, prefix) for weight, prefix in blend),
            "cache_path": cache,
            "tokenizer_model": facts.tokenizer_model if facts else None,
            "eod": facts.eod if facts else preset.eod,
        },
        "logging": {"wandb": draft["WANDB"]},
        "hardware": {
            "vendor": machine.vendor,
            "arch": machine.arch,
            "gpu_memory": machine.gpu_memory,
            "tier": machine.tier,
            "threads": max(1, machine.cores // draft["GPUS_PER_NODE"]),
        },
        "launch": {"log_dir": draft.values.get("LOG_DIR") or _log_dir(draft, now)},
    }  # fmt: skip
    sections: dict[str, Any] = {name: {} for name in RunConfig.model_fields}
    for variable in schema.variables():
        field = next(name for name, info in _fields(variable.section) if info is variable.info)
        if variable.name in draft:
            sections[variable.section][field] = draft[variable.name]
    for section, values in derived.items():
        sections[section].update(values)
    for name in draft.values:
        if name.startswith(core_fields.PREFIX):
            kind, core_field = core_fields.split(name)
            sections["core"].setdefault(kind, {})[core_field] = draft[name]
    return RunConfig.model_validate(sections)


_SHAPE = (
    "title", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "rotary_base",
    "tied_embeddings",
)  # fmt: skip


def _fields(section: str) -> list[tuple[str, Any]]:
    kind: Any = RunConfig.model_fields[section].annotation
    return list(kind.model_fields.items())


def _log_dir(draft: Draft, now: datetime.datetime) -> str:
    """The guide's naming: what runs where, then precision, then the time."""
    what = (
        f"{draft['NNODES']}nodes_rank{draft['NODE_RANK']}_train_{draft['MODEL_SIZE']}B_mbs{draft['MBS']}_bs{draft['BS']}"
        f"_tp{draft['TP']}_pp{draft['PP']}_cp{draft['CP']}_iter{draft['TOTAL_ITERS']}"
    )
    return f"experiment/{what}/{draft['PRECISION']}/{now:%Y-%m-%d_%H-%M-%S}"


def _check_fit(config: RunConfig, request: RunRequest, machine: Machine, facts: DataFacts | None) -> None:
    """Refuse what weights, gradients and optimizer state alone overflow, and say what it takes."""
    if _fits(config, machine):
        return
    bound, room = lower_bound(config), _room(config, machine)
    sizes = {"weights": bound.weights, "gradients": bound.gradients, "optimizer": bound.optimizer}
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items())
    raise UsageError(
        f"MODEL_SIZE={config.model.size} ({config.model.title}) can't fit: a process of TP={config.parallel.tp}, "
        f"PP={config.parallel.pp}, DP={config.parallel.dp} needs at least {bound.total / GIB:.1f} GiB before any "
        f"activation ({parts}), and {machine.name} has {room / GIB:.1f} GiB for it"
        f"{_way_out(config, request, machine, facts)}"
    )


def _room(config: RunConfig, machine: Machine) -> float:
    """Bytes that one process may use."""
    return machine.gpu_memory / config.parallel.gpus_per_node if machine.vendor == "cpu" else machine.gpu_memory


def _fits(config: RunConfig, machine: Machine) -> bool:
    return lower_bound(config).total <= _room(config, machine)


def _way_out(config: RunConfig, request: RunRequest, machine: Machine, facts: DataFacts | None) -> str:
    nodes = nodes_needed(request, machine, config.model.size, facts)
    if nodes is None and machine.vendor == "cpu":
        return "; choose a smaller MODEL_SIZE, or plan it for GPUs with TARGET=mi300x DRY_RUN=1"
    if nodes is None:
        return "; raise TP or PP, or choose a smaller MODEL_SIZE"
    return f". {_on_nodes(request, nodes)}"


def _on_nodes(request: RunRequest, nodes: int) -> str:
    line = (
        request.command(NNODES=nodes, NODE_RANK="$i", MASTER_ADDR="$HEAD")
        .replace("'$i'", "$i")
        .replace("'$HEAD'", "$HEAD")
    )
    return f"It takes {nodes} such nodes: on node i (0 to {nodes - 1}), HEAD being the address of node 0, run\n  {line}"


def nodes_needed(request: RunRequest, machine: Machine, size: str, facts: DataFacts | None) -> int | None:
    """The fewest nodes like `machine` on which the request passes the rules and the lower bound fits, or None."""
    nodes = 1
    while nodes <= MOST_NODES:
        try:
            draft = _draft(request, machine, size, facts, nodes)
        except UsageError:
            nodes += 1 if nodes < 64 else 64
            continue
        if _fits(_config(draft, request, facts, datetime.datetime.now()), machine):
            return nodes
        nodes += 1 if nodes < 64 else 64
    return None
