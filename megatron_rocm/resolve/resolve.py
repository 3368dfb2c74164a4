"""RunRequest + Machine → RunConfig: defaults, adjustments with their reason, rules, and whether it can fit."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_rocm.config import core_fields, schema
from megatron_rocm.config.blend import PATH_VARIABLES, Paths, chosen
from megatron_rocm.config.presets import GUIDE_SIZE, PRESETS, sizes
from megatron_rocm.config.request import RunRequest
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.data.facts import DataFacts, check_size, describe
from megatron_rocm.data.hub import is_hub_name
from megatron_rocm.errors import UsageError
from megatron_rocm.plan.memory import GIB, lower_bound
from megatron_rocm.platform import network
from megatron_rocm.platform.machine import Machine
from megatron_rocm.platform.route import way_to
from megatron_rocm.platform.settings import environment
from megatron_rocm.resolve.defaults import draft_of
from megatron_rocm.resolve.rules import Draft, TooFewProcesses
from megatron_rocm.tune import tuned

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
        draft = draft_of(request, machine, size, facts, None)
    except TooFewProcesses as error:
        nodes = nodes_needed(request, machine, size, facts)
        raise UsageError(f"{error}. {_on_nodes(request, nodes)}" if nodes else str(error)) from None
    config = _config(draft, request, facts, now or datetime.datetime.now())
    _check_fit(config, request, machine, facts)
    if config.data.paths:
        names = ("train", "valid") if draft["EVAL_ITERS"] > 0 else ("train",)
        check_size(config.data.paths, draft["SPLIT"], draft["SEQ_LENGTH"], names)
    elif facts is None and request.text("TOKENIZER_MODEL"):
        draft.notes.append("TOKENIZER_MODEL is looked up when the run starts; here the vocabulary is the published one")
    tuned.check(config, machine, {**(said_environment or {}), **request.exports})
    settings = environment(config, machine, said_environment or {}, request.exports)
    settings |= _network(config, machine, {**(said_environment or {}), **request.exports}, dry_run)
    return Resolution(config, draft.origins, draft.notes, settings, request, machine)


def _network(config: RunConfig, machine: Machine, said: dict[str, str], dry_run: bool) -> dict[str, tuple[str, str]]:
    """What the nodes talk over. A run waits for MASTER_ADDR to get an address, a plan does not."""
    patience = 0 if dry_run else config.launch.rdzv_timeout
    return network.choose(config, machine, said, route=partial(way_to, patience=patience), plan=dry_run)


def _data(request: RunRequest, dry_run: bool, describe: Describe) -> DataFacts | None:
    """What the data and the tokenizer are; None for mock data without a tokenizer."""
    paths, mock = paths_of(request), request.text("MOCK_DATA")
    if paths and mock == "1":
        named = next(name for name in PATH_VARIABLES if name in request.said)
        raise UsageError(f"MOCK_DATA=1 with {named}: take one of them away")
    if mock == "0" and not paths:
        raise UsageError("MOCK_DATA=0: real data need DATA_PATH; prepare_dataset.sh makes some")
    model = request.text("TOKENIZER_MODEL") or None
    if not paths and not model:
        return None
    kind = request.text("TOKENIZER_TYPE", "HuggingFaceTokenizer")
    try:
        return describe(paths, kind, model, offline=dry_run)
    except UsageError:
        if dry_run and not paths and model and is_hub_name(model):
            return None  # a plan needs no network
        raise


def paths_of(request: RunRequest) -> Paths:
    """What a request's run draws from; empty for mock data."""
    return chosen({name: request.said[name].value for name in PATH_VARIABLES if name in request.said})


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
            draft = draft_of(request, machine, size, facts, None)
        except UsageError:
            continue
        if _fits(_config(draft, request, facts, datetime.datetime.now()), machine):
            return size
    return sorted(published, key=int)[-1]  # whose message says what stands in the way


def _config(draft: Draft, request: RunRequest, facts: DataFacts | None, now: datetime.datetime) -> RunConfig:
    """The frozen configuration of a checked draft."""
    preset, machine, family = draft.preset, draft.machine, request.family
    vocab = facts.vocab_size if facts else preset.vocab_size
    unit = VOCAB_MULTIPLE * draft["TP"]
    first = next(iter(draft["TRAIN_DATA_PATH"] or draft["DATA_PATH"] or ()), None)
    cache = draft.values.get("DATA_CACHE_PATH") or (first and f"{os.path.dirname(first[1]) or '.'}/cache")
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
            "count_embedding_and_loss": draft.layers(False) is None,
        },
        "training": {"num_micro_batches": draft.micro_batches},
        "data": {
            "cache_path": cache,
            "tokenizer_model": facts.tokenizer_model if facts else None,
            "eod": facts.eod if facts else preset.eod,
            "fingerprint": facts.fingerprint if facts else None,
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
    precision = "fp8" if draft["TE_FP8"] else draft["PRECISION"]
    what = (
        f"{draft['NNODES']}nodes_rank{draft['NODE_RANK']}_train_{draft['MODEL_SIZE']}B_mbs{draft['MBS']}_bs{draft['BS']}"
        f"_tp{draft['TP']}_pp{draft['PP']}_cp{draft['CP']}_iter{draft['TOTAL_ITERS']}"
    )
    return f"experiment/{what}/{precision}/{now:%Y-%m-%d_%H-%M-%S}"


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
            draft = draft_of(request, machine, size, facts, nodes)
        except UsageError:
            nodes += 1 if nodes < 64 else 64
            continue
        if _fits(_config(draft, request, facts, datetime.datetime.now()), machine):
            return nodes
        nodes += 1 if nodes < 64 else 64
    return None
