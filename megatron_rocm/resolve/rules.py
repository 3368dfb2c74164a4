"""What combines with what: one row a rule; the check, the message and the docs' table are made from it."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_rocm.config.changes import unknown_names
from megatron_rocm.config.presets import Preset
from megatron_rocm.errors import UsageError
from megatron_rocm.plan.memory import layers_per_chunk
from megatron_rocm.platform import fp8
from megatron_rocm.platform.machine import Machine


class TooFewProcesses(UsageError):
    """The layout asks for more processes than there are: more nodes would do."""


class Draft:
    """A run while it is resolved: values by variable name, where each came from, and what was adjusted."""

    def __init__(self, preset: Preset, machine: Machine) -> None:
        self.preset = preset
        self.machine = machine
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.notes: list[str] = []

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def set(self, name: str, value: Any, origin: str) -> None:
        self.values[name] = value
        self.origins[name] = origin

    def default(self, name: str, value: Any, origin: str = "default") -> None:
        """Give `name` a value unless it has one."""
        if name not in self.values:
            self.set(name, value, origin)

    def adjust(self, name: str, value: Any, why: str) -> None:
        """Change `name`; where it had been said otherwise, a line tells."""
        if self.values.get(name) != value and self.origins.get(name, "default") not in ("default", "rule"):
            self.notes.append(f"{name}={shown(self.values[name])} becomes {shown(value)}: {why}")
        self.set(name, value, "rule")

    @property
    def model_parallel(self) -> int:
        return self["TP"] * self["PP"] * self["CP"]

    @property
    def world(self) -> int:
        return self["NNODES"] * self["GPUS_PER_NODE"]

    @property
    def dp(self) -> int:
        return self.world // self.model_parallel

    @property
    def micro_batches(self) -> int:
        return self["BS"] // (self["MBS"] * self.dp)

    def layers(self, counted: bool) -> list[list[int]] | None:
        """Layers per [stage][chunk], or None where they don't divide or leave a chunk empty."""
        chunks = layers_per_chunk(self.preset.num_layers, self["PP"], self["VPP"], counted)
        return chunks if chunks and min(min(stage) for stage in chunks) > 0 else None


def shown(value: Any) -> str:
    """A value as a person would type it."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if value is None:
        return "none"
    return str(int(value)) if isinstance(value, bool) else str(value)


Test = Callable[[Draft], bool]


@dataclass(frozen=True)
class Rule:
    """Where `when` holds, `must` has to; else `message` (formatted with the draft's values and `facts`) ends the run."""

    keys: tuple[str, ...]
    when: Test
    must: Test
    message: str
    facts: Callable[[Draft], dict[str, Any]] = lambda draft: {}
    error: type[UsageError] = UsageError

    def check(self, draft: Draft) -> None:
        if self.when(draft) and not self.must(draft):
            raise self.error(self.message.format(**{k: shown(v) for k, v in draft.values.items()}, **self.facts(draft)))


def always(draft: Draft) -> bool:
    return True


def _loads_its_own(save: str | None, load: str | None) -> bool:
    """Whether LOAD_CKPT_PATH is SAVE_CKPT_PATH, or one checkpoint in it."""
    if not save or not load:
        return False
    there = os.path.realpath(load)
    return os.path.realpath(save) in (there, os.path.dirname(there))


def _divisors(number: int, most: int = 64) -> Iterator[int]:
    return (n for n in range(1, min(number, most) + 1) if number % n == 0)


def _tp_choices(draft: Draft) -> dict[str, Any]:
    heads, groups = draft.preset.num_attention_heads, draft.preset.num_query_groups
    return {
        "heads": heads,
        "groups": groups,
        "title": draft.preset.title,
        "choices": ", ".join(str(n) for n in _divisors(groups) if heads % n == 0),
    }


def _pp_choices(draft: Draft) -> dict[str, Any]:
    layers = draft.preset.num_layers
    fits = [pp for pp in range(1, min(layers, 128) + 1) if _deals(layers, pp, draft["VPP"])]
    return {"layers": layers, "title": draft.preset.title, "choices": ", ".join(map(str, fits)) or "none"}


def _deals(layers: int, pp: int, vpp: int) -> bool:
    if pp == 1 and vpp > 1:
        return False
    chunks = [layers_per_chunk(layers, pp, vpp, counted) for counted in (False, True)]
    return any(c and min(min(stage) for stage in c) > 0 for c in chunks)


def _parallel(draft: Draft) -> dict[str, Any]:
    return {"mp": draft.model_parallel, "world": draft.world}


def _batch(draft: Draft) -> dict[str, Any]:
    unit = draft["MBS"] * draft.dp * (draft["PP"] if draft["VPP"] > 1 else 1)
    up = -(-draft["BS"] // unit) * unit
    down = up - unit
    return {
        "unit": unit, "dp": draft.dp, "choices": f"BS={up}" if down < 1 else f"BS={down} or BS={up}",
        "micro": draft.micro_batches,
    }  # fmt: skip


def _ramp(draft: Draft) -> dict[str, Any]:
    first, increment, samples = draft["RAMPUP_BATCH_SIZE"]
    way = draft["BS"] - first
    ends = first > 0 and increment > 0 and samples >= 0 and way >= 0 and way % increment == 0
    unit = _batch(draft)["unit"]
    factors = f"MBS={draft['MBS']} × DP={draft.dp}" + (f" × PP={draft['PP']}" if draft["VPP"] > 1 else "")
    return {
        "factors": factors, "first": first, "increment": increment, "samples": samples, "ends": ends, "unit": unit, "dp": draft.dp,
        "divides": first % unit == 0 and increment % unit == 0,
    }  # fmt: skip


def _units(draft: Draft) -> dict[str, Any]:
    """What the layers of all chunks can be cut into, for uniform recomputation."""
    chunks = draft.layers(False) or draft.layers(True) or [[draft.preset.num_layers]]
    sizes = sorted({layers for stage in chunks for layers in stage})
    return {
        "layers": " or ".join(map(str, sizes)), "choices": ", ".join(map(str, _divisors(math.gcd(*sizes)))),
        "even": all(layers % (draft["RECOMPUTE_NUM_LAYERS"] or 1) == 0 for layers in sizes),
    }  # fmt: skip


def _replicas(draft: Draft) -> list[str]:
    """HSDP's choices: each replica gets as many data parallel processes, and more than one."""
    return list(map(str, list(_divisors(draft.dp * draft["CP"], draft.dp * draft["CP"]))[1:-1]))


def _replica_choices(draft: Draft) -> dict[str, Any]:
    choices = _replicas(draft)
    return {"dp": draft.dp * draft["CP"], "choices": f"one of {', '.join(choices)}, or " if choices else ""}


def _sequence(draft: Draft) -> dict[str, Any]:
    unit = sequence_unit(draft)
    return {"unit": unit, "choice": -(-draft["SEQ_LENGTH"] // unit) * unit}


def sequence_unit(draft: Draft) -> int:
    """What the sequence length must be a multiple of: TP slices of each of CP's two chunks."""
    chunks = 2 * draft["CP"] if draft["CP"] > 1 else 1
    return chunks * (draft["TP"] if draft["SEQ_PARALLEL"] else 1)


def _gpus(draft: Draft) -> dict[str, Any]:
    return {"have": len(draft.machine.gpus), "machine": draft.machine.name}


def _fp8(draft: Draft) -> dict[str, Any]:
    """Who has what of FP8, for the messages."""
    machine, recipe = draft.machine, draft["TE_FP8_RECIPE"]
    return {
        "machine": f"{machine.name} ({machine.arch})", "lacks": fp8.without(machine),
        "why": fp8.RECIPES[recipe].lacking.get(machine.vendor, ""), "choices": " or ".join(fp8.recipes(machine)),
    }  # fmt: skip


def _bf16_layers(draft: Draft) -> dict[str, Any]:
    return {"most": draft.preset.num_layers // draft["PP"], "layers": draft.preset.num_layers}


def _uneven(draft: Draft) -> dict[str, Any]:
    """The first side of a matrix that FP8's products can't take; no name where all are right."""
    preset, tp, recipe = draft.preset, draft["TP"], fp8.RECIPES[draft["TE_FP8_RECIPE"]]
    heads = preset.head_size * preset.num_attention_heads
    sides = (
        (f"the hidden size of {preset.title}", preset.hidden_size, "choose another MODEL_SIZE"),
        (
            f"the QKV projection's rows with TP={tp}",
            (heads + 2 * preset.head_size * preset.num_query_groups) // tp,
            "lower TP",
        ),
        (f"the output projection's columns with TP={tp}", heads // tp, "lower TP"),
        (f"the feed-forward size with TP={tp}", preset.ffn_hidden_size // tp, "lower TP"),
    )
    tokens = draft["MBS"] * draft["SEQ_LENGTH"] // draft["CP"]
    unit = recipe.unit[draft.machine.vendor]
    change = "change SEQ_LENGTH or MBS"
    checks = [*((*side, unit) for side in sides), (f"MBS·SEQ_LENGTH with CP={draft['CP']}", tokens, change, unit)]
    if draft["SEQ_PARALLEL"]:
        what = f"MBS·SEQ_LENGTH with CP={draft['CP']} and SEQ_PARALLEL=1 over TP={tp}"
        checks.append((what, tokens // tp, f"{change}, set SEQ_PARALLEL=0", recipe.gathered))
    wrong = next((check for check in checks if check[1] % check[3]), None)
    return dict(zip(("side", "size", "way_out", "unit"), wrong, strict=True)) if wrong else {}


# In the order they are checked: what a single variable may be comes before what two must agree on.
RULES = (
    Rule(("NODE_RANK", "NNODES"), always, lambda d: d["NODE_RANK"] < d["NNODES"],
         "NODE_RANK={NODE_RANK}: nodes are numbered from 0, so it must be below NNODES={NNODES}"),
    Rule(("GPUS_PER_NODE",), lambda d: d.machine.vendor != "cpu", lambda d: d["GPUS_PER_NODE"] <= len(d.machine.gpus),
         "GPUS_PER_NODE={GPUS_PER_NODE}: this node has {have} GPUs that a process can see ({machine}); "
         "set GPUS_PER_NODE={have} or widen the visible-devices mask", _gpus),
    Rule(("FSDP", "MEGATRON_FSDP"), lambda d: d["FSDP"], lambda d: not d["MEGATRON_FSDP"],
         "FSDP=1 with MEGATRON_FSDP=1: the one is PyTorch's, the other Megatron's; take one of them away"),
    Rule(("ENABLE_HSDP", "MEGATRON_FSDP"), lambda d: d["ENABLE_HSDP"], lambda d: d["MEGATRON_FSDP"],
         "ENABLE_HSDP=1 needs MEGATRON_FSDP=1: PyTorch's FSDP-v2 has no replicas in megatron-core"),
    Rule(("FSDP", "PRECISION"), lambda d: d["FSDP"], lambda d: d["PRECISION"] != "fp16",
         "PRECISION=fp16 with FSDP=1: megatron-core looks for overflows in gradients that FSDP-v2 keeps elsewhere, and would "
         "miss them; set PRECISION=bf16, or FSDP=0"),
    Rule(("MEGATRON_FSDP", "PRECISION"), lambda d: d["MEGATRON_FSDP"], lambda d: d["PRECISION"] != "fp16",
         "PRECISION=fp16 with MEGATRON_FSDP=1: megatron-core divides each gradient by the loss scale, and fails on a rank that "
         "has no part of one; set PRECISION=bf16, or MEGATRON_FSDP=0"),
    Rule(("MEGATRON_FSDP", "OPTIMIZER"), lambda d: d["MEGATRON_FSDP"], lambda d: d["OPTIMIZER"] == "adam",
         "OPTIMIZER={OPTIMIZER} with MEGATRON_FSDP=1: megatron-core shards the state of adam alone; set OPTIMIZER=adam, or "
         "MEGATRON_FSDP=0"),
    Rule(("TE_FP8",), lambda d: d["TE_FP8"], lambda d: not fp8.without(d.machine),
         "TE_FP8=1 on {machine}: {lacks}; set TE_FP8=0 for BF16, or plan for a GPU that has it with TARGET=mi300x, mi355x, h100 "
         "or b200", _fp8),
    Rule(("TE_FP8",), lambda d: d["TE_FP8"], lambda d: d.machine.tier == "te",
         "TE_FP8=1: FP8 is computed by Transformer Engine, which is not installed here, or turned off; take an image that has it or "
         "install it (docs/transformer_engine.md says which), or set TE_FP8=0", _fp8),
    Rule(("TE_FP8_RECIPE",), lambda d: d["TE_FP8"], lambda d: d["TE_FP8_RECIPE"] in fp8.recipes(d.machine),
         "TE_FP8_RECIPE={TE_FP8_RECIPE} on {machine}: {why}; set TE_FP8_RECIPE={choices}, or TE_FP8=0", _fp8),
    Rule(("TE_FP8", "PRECISION"), lambda d: d["TE_FP8"], lambda d: d["PRECISION"] == "bf16",
         "TE_FP8=1 with PRECISION={PRECISION}: what is not computed in FP8 is in BF16; set PRECISION=bf16, or TE_FP8=0"),
    Rule(("FP8_FIRST_LAST_LAYERS_BF16", "TE_FP8_RECIPE"), lambda d: d["TE_FP8"] and d["FP8_FIRST_LAST_LAYERS_BF16"],
         lambda d: d["TE_FP8_RECIPE"] != "delayed",
         "FP8_FIRST_LAST_LAYERS_BF16=1 with TE_FP8_RECIPE=delayed: megatron-core reduces largest values for all layers at once; "
         "set TE_FP8_RECIPE=tensorwise, or FP8_FIRST_LAST_LAYERS_BF16=0"),
    Rule(("FP8_BF16_START", "FP8_BF16_END", "PP"), lambda d: d["TE_FP8"] and d["FP8_FIRST_LAST_LAYERS_BF16"],
         lambda d: max(d["FP8_BF16_START"], d["FP8_BF16_END"]) <= _bf16_layers(d)["most"],
         "FP8_BF16_START={FP8_BF16_START}, FP8_BF16_END={FP8_BF16_END}: megatron-core takes at most the {most} layers of a "
         "pipeline stage ({layers} layers, PP={PP}) for each; set them lower", _bf16_layers),
    Rule(("FP8_PARAM_GATHER", "FSDP", "MEGATRON_FSDP"), lambda d: d["TE_FP8"] and d["FP8_PARAM_GATHER"],
         lambda d: not d["FSDP"] and not d["MEGATRON_FSDP"],
         "FP8_PARAM_GATHER=1 with FSDP={FSDP}, MEGATRON_FSDP={MEGATRON_FSDP}: FSDP-v2 knows no FP8 weights of Transformer Engine 2, "
         "and Megatron-FSDP's are not proven here; set FP8_PARAM_GATHER=0, products are computed in FP8 all the same"),
    Rule(("FP8_PARAM_GATHER", "USE_DISTRIBUTED_OPTIMIZER"), lambda d: d["TE_FP8"] and d["FP8_PARAM_GATHER"],
         lambda d: d["USE_DISTRIBUTED_OPTIMIZER"],
         "FP8_PARAM_GATHER=1 with USE_DISTRIBUTED_OPTIMIZER=0, OPTIMIZER={OPTIMIZER}: megatron-core gathers FP8 weights from the "
         "distributed optimizer's adam alone; set USE_DISTRIBUTED_OPTIMIZER=1 OPTIMIZER=adam, or FP8_PARAM_GATHER=0"),
    Rule(("FP8_PARAM_GATHER", "OPTIMIZER_CPU_OFFLOAD", "TE_FP8_RECIPE"),
         lambda d: d["TE_FP8"] and d["FP8_PARAM_GATHER"] and d["OPTIMIZER_CPU_OFFLOAD"], lambda d: d["TE_FP8_RECIPE"] == "delayed",
         "FP8_PARAM_GATHER=1 and OPTIMIZER_CPU_OFFLOAD=1 with TE_FP8_RECIPE={TE_FP8_RECIPE}: megatron-core offloads FP8 weights of "
         "the delayed recipe alone; set TE_FP8_RECIPE=delayed, FP8_PARAM_GATHER=0 or OPTIMIZER_CPU_OFFLOAD=0"),
    Rule(("FSDP", "PP"), lambda d: d["FSDP"], lambda d: d["PP"] == 1,
         "PP={PP} with FSDP=1: FSDP shards over the whole node group what PP has already cut; set PP=1 or FSDP=0"),
    Rule(("TP", "MODEL_SIZE"), always,
         lambda d: d.preset.num_attention_heads % d["TP"] == 0 and d.preset.num_query_groups % d["TP"] == 0,
         "TP={TP} does not divide the {heads} attention heads and {groups} key-value heads of {title}: "
         "set TP to one of {choices}", _tp_choices),
    Rule(("VPP", "PP"), lambda d: d["VPP"] > 1, lambda d: d["PP"] > 1,
         "VPP={VPP} with PP={PP}: model chunks interleave over pipeline stages; set PP to 2 or more, or VPP=1"),
    Rule(("PP", "VPP", "MODEL_SIZE"), always, lambda d: d.layers(False) is not None or d.layers(True) is not None,
         "PP={PP} with VPP={VPP} leaves a stage without layers or an uneven rest: {title} has {layers} layers, dealt out "
         "evenly with or without embedding and loss counted as one each; with VPP={VPP}, PP can be {choices}", _pp_choices),
    Rule(("NNODES", "GPUS_PER_NODE", "TP", "PP", "CP"), always, lambda d: d.world >= d.model_parallel,
         "TP={TP}·PP={PP}·CP={CP} = {mp} processes, but NNODES={NNODES} × GPUS_PER_NODE={GPUS_PER_NODE} are {world}",
         _parallel, TooFewProcesses),
    Rule(("NNODES", "GPUS_PER_NODE", "TP", "PP", "CP"), always, lambda d: d.world % d.model_parallel == 0,
         "TP={TP}·PP={PP}·CP={CP} = {mp} does not divide the {world} processes of NNODES={NNODES} × "
         "GPUS_PER_NODE={GPUS_PER_NODE}: change TP, PP or CP, or the number of processes", _parallel),
    Rule(("MEGATRON_FSDP", "TP", "PP", "GPUS_PER_NODE"), lambda d: d["MEGATRON_FSDP"], lambda d: d.dp * d["CP"] > 1,
         "MEGATRON_FSDP=1 with DP·CP=1 has nothing to shard over, and megatron-core then doubles gradients in every micro batch: "
         "set a smaller TP or PP, more GPUS_PER_NODE, or MEGATRON_FSDP=0"),
    Rule(("HSDP_NUM_REPLICAS", "ENABLE_HSDP"), lambda d: d["ENABLE_HSDP"], lambda d: str(d["HSDP_NUM_REPLICAS"]) in _replicas(d),
         "HSDP_NUM_REPLICAS={HSDP_NUM_REPLICAS} does not divide the {dp} data parallel processes, or leaves none to "
         "shard over; set {choices}ENABLE_HSDP=0", _replica_choices),
    Rule(("BS", "MBS"), always, lambda d: d["BS"] % (d["MBS"] * d.dp) == 0,
         "BS={BS} is not a multiple of MBS={MBS} × DP={dp} = {unit}: set {choices}", _batch),
    Rule(("BS", "VPP", "PP"), lambda d: d["VPP"] > 1, lambda d: d.micro_batches % d["PP"] == 0,
         "BS={BS} gives {micro} micro batches, and with VPP={VPP} their number must be a multiple of PP={PP}: set {choices}",
         _batch),
    Rule(("SEQ_LENGTH", "TP", "CP"), always, lambda d: d["SEQ_LENGTH"] % sequence_unit(d) == 0,
         "SEQ_LENGTH={SEQ_LENGTH} can't be cut by TP={TP} (SEQ_PARALLEL={SEQ_PARALLEL}) and CP={CP}: "
         "set a multiple of {unit}, such as {choice}", _sequence),
    Rule(("TE_FP8", "TE_FP8_RECIPE", "TP", "SEQ_LENGTH", "MBS"), lambda d: d["TE_FP8"], lambda d: not _uneven(d),
         "TE_FP8=1: {side} is {size}, and with TE_FP8_RECIPE={TE_FP8_RECIPE} must be a multiple of {unit}: {way_out}, or set TE_FP8=0",
         _uneven),
    Rule(("USE_DISTRIBUTED_OPTIMIZER", "OPTIMIZER"), lambda d: d["USE_DISTRIBUTED_OPTIMIZER"], lambda d: d["OPTIMIZER"] == "adam",
         "USE_DISTRIBUTED_OPTIMIZER=1 with OPTIMIZER={OPTIMIZER}: megatron-core shards the state of adam alone; "
         "set USE_DISTRIBUTED_OPTIMIZER=0"),
    Rule(("OVERLAP_PARAM_GATHER",), lambda d: d["OVERLAP_PARAM_GATHER"],
         lambda d: d["USE_DISTRIBUTED_OPTIMIZER"] and d["OVERLAP_GRAD_REDUCE"],
         "OVERLAP_PARAM_GATHER=1 with OPTIMIZER={OPTIMIZER}, DP={dp}, USE_DISTRIBUTED_OPTIMIZER={USE_DISTRIBUTED_OPTIMIZER}, "
         "OVERLAP_GRAD_REDUCE={OVERLAP_GRAD_REDUCE}: it overlaps what the distributed optimizer (adam) gathers over DP > 1, and "
         "needs both switches; set OVERLAP_PARAM_GATHER=0", lambda d: {"dp": d.dp}),
    Rule(("RAMPUP_BATCH_SIZE", "BS"), lambda d: d["RAMPUP_BATCH_SIZE"], lambda d: _ramp(d)["ends"],
         "RAMPUP_BATCH_SIZE={RAMPUP_BATCH_SIZE}: from {first} by steps of {increment} no batch becomes BS={BS} over {samples} "
         "samples; start and increment must be above 0, BS - start a multiple of increment and samples 0 or more", lambda d: _ramp(d)),
    Rule(("RAMPUP_BATCH_SIZE", "MBS"), lambda d: d["RAMPUP_BATCH_SIZE"], lambda d: _ramp(d)["divides"],
         "RAMPUP_BATCH_SIZE={RAMPUP_BATCH_SIZE}: every batch on the way, from {first} by steps of {increment}, must be a "
         "multiple of {factors} = {unit}", lambda d: _ramp(d)),
    Rule(("NAN_POLICY", "SPIKE_POLICY", "SAVE_CKPT_PATH"), lambda d: d["NAN_POLICY"] == "rollback" or d["SPIKE_POLICY"] == "rollback" and d["SPIKE_FACTOR"] > 0,
         lambda d: bool(d["SAVE_CKPT_PATH"]),
         "NAN_POLICY={NAN_POLICY}, SPIKE_POLICY={SPIKE_POLICY}: a rollback goes to this run's last checkpoint; set SAVE_CKPT_PATH"),
    Rule(("SAVE_KEEP_LAST", "SAVE_KEEP_EVERY"), lambda d: d["SAVE_KEEP_EVERY"], lambda d: bool(d["SAVE_KEEP_LAST"]),
         "SAVE_KEEP_EVERY={SAVE_KEEP_EVERY} is what stays besides the last SAVE_KEEP_LAST checkpoints, and without that all do; set it"),
    Rule(("FINETUNE", "LOAD_CKPT_PATH"), lambda d: d["FINETUNE"], lambda d: bool(d["LOAD_CKPT_PATH"]),
         "FINETUNE=1: weights to begin with are read from LOAD_CKPT_PATH; set it"),
    Rule(("NO_LOAD_OPTIM", "LOAD_CKPT_PATH"), lambda d: d["NO_LOAD_OPTIM"], lambda d: bool(d["LOAD_CKPT_PATH"]),
         "NO_LOAD_OPTIM=1 is about what is read from LOAD_CKPT_PATH; set it, or leave NO_LOAD_OPTIM out"),
    Rule(("FINETUNE", "NO_LOAD_OPTIM", "SAVE_CKPT_PATH", "LOAD_CKPT_PATH"), lambda d: d["FINETUNE"] or d["NO_LOAD_OPTIM"],
         lambda d: not _loads_its_own(d["SAVE_CKPT_PATH"], d["LOAD_CKPT_PATH"]),
         "FINETUNE={FINETUNE}, NO_LOAD_OPTIM={NO_LOAD_OPTIM} with LOAD_CKPT_PATH in SAVE_CKPT_PATH: the run would "
         "resume what it finds there; give it a SAVE_CKPT_PATH of its own"),
    Rule(("ALLOW_CHANGE",), lambda d: bool(d["ALLOW_CHANGE"]), lambda d: not unknown_names(d["ALLOW_CHANGE"]),
         "ALLOW_CHANGE: {fault}", lambda d: {"fault": unknown_names(d["ALLOW_CHANGE"])}),
    Rule(("MIN_LOSS_SCALE", "INITIAL_LOSS_SCALE"), lambda d: d["PRECISION"] == "fp16" and d["LOSS_SCALE"] is None,
         lambda d: d["MIN_LOSS_SCALE"] <= d["INITIAL_LOSS_SCALE"],
         "MIN_LOSS_SCALE={MIN_LOSS_SCALE} is above INITIAL_LOSS_SCALE={INITIAL_LOSS_SCALE}, where the scale begins: set it lower"),
    Rule(("SPIKE_FACTOR",), lambda d: d["SPIKE_FACTOR"] > 0, lambda d: d["SPIKE_FACTOR"] > 1,
         "SPIKE_FACTOR={SPIKE_FACTOR}: a spike is a loss above so many times the recent median; give more than 1, or 0 for off"),
    Rule(("RESET_POSITION_IDS", "RESET_ATTENTION_MASK"), lambda d: d["RESET_POSITION_IDS"], lambda d: d["RESET_ATTENTION_MASK"],
         "RESET_POSITION_IDS=1 needs RESET_ATTENTION_MASK=1: attention across documents whose positions start anew would take "
         "tokens of one for those of the other"),
    Rule(("RESET_ATTENTION_MASK", "CP"), lambda d: d["RESET_ATTENTION_MASK"] and d.machine.tier == "te",
         lambda d: d["CP"] == 1,
         "RESET_ATTENTION_MASK=1 with CP={CP}: Transformer Engine cuts each document over the context parallel ranks, and "
         "would need every length to be a multiple of 2·CP; set CP=1, or RESET_ATTENTION_MASK=0"),
    Rule(("RESET_ATTENTION_MASK", "PRECISION"), lambda d: d["RESET_ATTENTION_MASK"] and d.machine.tier == "te",
         lambda d: d["PRECISION"] != "fp32",
         "RESET_ATTENTION_MASK=1 with PRECISION=fp32: Transformer Engine's kernels for documents are for 16 bits; "
         "set PRECISION=bf16, or RESET_ATTENTION_MASK=0"),
    Rule(("RECOMPUTE_METHOD", "RECOMPUTE_NUM_LAYERS"),
         lambda d: d["RECOMPUTE"] and d["RECOMPUTE_GRANULARITY"] == "full" and d["RECOMPUTE_METHOD"] == "uniform",
         lambda d: _units(d)["even"],
         "RECOMPUTE_NUM_LAYERS={RECOMPUTE_NUM_LAYERS} with RECOMPUTE_METHOD=uniform: the stages and chunks have {layers} layers, "
         "and each must be so many units; set one of {choices}, or RECOMPUTE_METHOD=block", lambda d: _units(d)),
    Rule(("OPTIMIZER_CPU_OFFLOAD",), lambda d: d["OPTIMIZER_CPU_OFFLOAD"], lambda d: d.machine.vendor != "cpu",
         "OPTIMIZER_CPU_OFFLOAD=1: optimizer state is in host memory already on a CPU; set OPTIMIZER_CPU_OFFLOAD=0"),
    Rule(("OPTIMIZER_CPU_OFFLOAD",), lambda d: d["OPTIMIZER_CPU_OFFLOAD"], lambda d: d.machine.tier == "te",
         "OPTIMIZER_CPU_OFFLOAD=1: megatron-core's hybrid optimizer asks for Transformer Engine's version, which is not used "
         "here; set OPTIMIZER_CPU_OFFLOAD=0, USE_DISTRIBUTED_OPTIMIZER=1 saves memory too"),
    Rule(("OPTIMIZER_CPU_OFFLOAD", "USE_DISTRIBUTED_OPTIMIZER", "OPTIMIZER"), lambda d: d["OPTIMIZER_CPU_OFFLOAD"],
         lambda d: d["USE_DISTRIBUTED_OPTIMIZER"] and d["OPTIMIZER"] == "adam",
         "OPTIMIZER_CPU_OFFLOAD=1 with OPTIMIZER={OPTIMIZER} and USE_DISTRIBUTED_OPTIMIZER={USE_DISTRIBUTED_OPTIMIZER}: "
         "megatron-core offloads the distributed optimizer's adam alone; set OPTIMIZER_CPU_OFFLOAD=0"),
    Rule(("OPTIMIZER_CPU_OFFLOAD", "PRECISION"), lambda d: d["OPTIMIZER_CPU_OFFLOAD"], lambda d: d["PRECISION"] != "fp32",
         "OPTIMIZER_CPU_OFFLOAD=1 with PRECISION=fp32: a run that resumes looks for FP32 copies of its parameters, which "
         "megatron-core does not make of FP32 ones; set PRECISION=bf16, or OPTIMIZER_CPU_OFFLOAD=0"),
    Rule(("CPU_OFFLOADING_NUM_LAYERS",), lambda d: d["CPU_OFFLOADING_NUM_LAYERS"], lambda d: d.machine.tier == "te",
         "CPU_OFFLOADING_NUM_LAYERS={CPU_OFFLOADING_NUM_LAYERS}: activations are offloaded by Transformer Engine, which is not "
         "used here; set CPU_OFFLOADING_NUM_LAYERS=0, RECOMPUTE=1 saves memory too"),
    Rule(("CPU_OFFLOADING_NUM_LAYERS", "PP", "RECOMPUTE"), lambda d: d["CPU_OFFLOADING_NUM_LAYERS"],
         lambda d: d["PP"] == 1 and not d["RECOMPUTE"],
         "CPU_OFFLOADING_NUM_LAYERS={CPU_OFFLOADING_NUM_LAYERS} with PP={PP} and RECOMPUTE={RECOMPUTE}: megatron-core offloads "
         "activations with neither pipeline stages nor recomputation; set PP=1 and RECOMPUTE=0, or CPU_OFFLOADING_NUM_LAYERS=0"),
    Rule(("CPU_OFFLOADING_NUM_LAYERS", "FSDP", "MEGATRON_FSDP"), lambda d: d["CPU_OFFLOADING_NUM_LAYERS"],
         lambda d: not d["FSDP"] and not d["MEGATRON_FSDP"],
         "CPU_OFFLOADING_NUM_LAYERS={CPU_OFFLOADING_NUM_LAYERS} with FSDP={FSDP}, MEGATRON_FSDP={MEGATRON_FSDP}: Transformer "
         "Engine offloads within layers that FSDP gathers and frees, which is not proven; set CPU_OFFLOADING_NUM_LAYERS=0"),
    Rule(("CPU_OFFLOADING_NUM_LAYERS", "MODEL_SIZE"), lambda d: d["CPU_OFFLOADING_NUM_LAYERS"],
         lambda d: d["CPU_OFFLOADING_NUM_LAYERS"] < d.preset.num_layers,
         "CPU_OFFLOADING_NUM_LAYERS={CPU_OFFLOADING_NUM_LAYERS}: must be below the model's {layers} layers",
         lambda d: {"layers": d.preset.num_layers}),
    Rule(("LR_WARMUP_ITERS", "LR_DECAY_ITERS"), always, lambda d: d["LR_WARMUP_ITERS"] < d["LR_DECAY_ITERS"],
         "LR_WARMUP_ITERS={LR_WARMUP_ITERS} must be below LR_DECAY_ITERS={LR_DECAY_ITERS}"),
    Rule(("LR_WSD_DECAY_ITERS", "LR_DECAY_ITERS"), lambda d: d["LR_DECAY_STYLE"] == "WSD",
         lambda d: d["LR_WSD_DECAY_ITERS"] <= d["LR_DECAY_ITERS"] - d["LR_WARMUP_ITERS"],
         "LR_WSD_DECAY_ITERS={LR_WSD_DECAY_ITERS} do not fit between LR_WARMUP_ITERS={LR_WARMUP_ITERS} and "
         "LR_DECAY_ITERS={LR_DECAY_ITERS}: set at most {room}", lambda d: {"room": d["LR_DECAY_ITERS"] - d["LR_WARMUP_ITERS"]}),
    Rule(("MIN_LR", "LR"), always, lambda d: d["MIN_LR"] <= d["LR"],
         "MIN_LR={MIN_LR} is above LR={LR}: the learning rate decays from LR to MIN_LR"),
    Rule(("EVAL_ITERS", "VALID_DATA_PATH"), lambda d: d["EVAL_ITERS"] > 0 and d["TRAIN_DATA_PATH"], lambda d: bool(d["VALID_DATA_PATH"]),
         "EVAL_ITERS={EVAL_ITERS} with TRAIN_DATA_PATH: there is nothing to evaluate; give VALID_DATA_PATH, or set EVAL_ITERS=0"),
    Rule(("EVAL_ITERS", "SPLIT"), lambda d: d["EVAL_ITERS"] > 0 and not d["TRAIN_DATA_PATH"], lambda d: d["SPLIT_SHARES"][1] > 0,
         "EVAL_ITERS={EVAL_ITERS} with SPLIT={SPLIT}: nothing is set aside for validation; give SPLIT a second share, "
         "such as 99,1,0"),
    Rule(("WANDB_API_KEY",), lambda d: d["WANDB"], lambda d: importlib.util.find_spec("wandb") is not None,
         "WANDB_API_KEY is set, but the package wandb is missing: pip install 'megatron-rocm[wandb]', or unset it"),
)  # fmt: skip
