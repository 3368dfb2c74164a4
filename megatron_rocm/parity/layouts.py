"""The layouts that are compared, as a table, and which of them a request and a machine allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm

from megatron_rocm.config.request import RunRequest, read
from megatron_rocm.errors import UsageError
from megatron_rocm.parity.worker import ALONE
from megatron_rocm.plan.memory import GIB, lower_bound
from megatron_rocm.platform.machine import Machine
from megatron_rocm.resolve import Resolution, resolve

ASKED = "as-asked"  # the layout that the request's own variables make
# Adam's first updates are the gradient's signs, so that at the full rate what is left of rounding is all that is seen.
WARMUP = "10"
OF_THE_RATE = ("LR_WARMUP_ITERS", "LR_DECAY_ITERS", "LR_WSD_DECAY_ITERS")
FIXED_SCALE = "16"  # of an FP16 loss, which is a sum over tokens: to find the largest takes more steps than these
ON_A_CPU = 2  # processes at most, unless asked for more: each one computes on the same cores
FEWER = "compare with fewer layers, --layers 2"


@dataclass(frozen=True)
class Layout:
    """A way to spread a run over `processes`, as variables on top of PLAIN."""

    name: str
    processes: int
    what: str
    variables: Mapping[str, str]


# One process, nothing sharded, overlapped or recomputed.
PLAIN = {
    "TP": "1", "PP": "1", "VPP": "1", "CP": "1", "SEQ_PARALLEL": "0", "USE_DISTRIBUTED_OPTIMIZER": "0", "FSDP": "0",
    "MEGATRON_FSDP": "0", "ENABLE_HSDP": "0", "OVERLAP_GRAD_REDUCE": "0", "OVERLAP_PARAM_GATHER": "0", "RECOMPUTE": "0",
    "CPU_OFFLOADING_NUM_LAYERS": "0", "OPTIMIZER_CPU_OFFLOAD": "0",
}  # fmt: skip
# What makes a layout beside these: taken out of a request where a layout of the table takes its place.
OF_A_LAYOUT = (
    *PLAIN, "GPUS_PER_NODE", "HSDP_NUM_REPLICAS", "RECOMPUTE_GRANULARITY", "RECOMPUTE_METHOD", "RECOMPUTE_NUM_LAYERS",
    "RECOMPUTE_MODULES", "OPTIMIZER_OFFLOAD_FRACTION",
)  # fmt: skip
# What is no part of a comparison of a few steps on this machine.
ASIDE = (
    "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "SAVE_CKPT_PATH", "LOAD_CKPT_PATH", "EVAL_ITERS", "LOG_DIR",
    "WANDB_API_KEY", "RAMPUP_BATCH_SIZE", "NAN_POLICY", "SPIKE_POLICY", "SPIKE_FACTOR", "NO_TRAINING", "DRY_RUN",
)  # fmt: skip

_SHARDED = {"USE_DISTRIBUTED_OPTIMIZER": "1"}
_OVERLAP = {**_SHARDED, "OVERLAP_GRAD_REDUCE": "1", "OVERLAP_PARAM_GATHER": "1"}
_SELECTIVE = {"RECOMPUTE": "1", "RECOMPUTE_GRANULARITY": "selective"}
_TP_SP = {"TP": "2", "SEQ_PARALLEL": "1"}
_HSDP = {"MEGATRON_FSDP": "1", "ENABLE_HSDP": "1", "HSDP_NUM_REPLICAS": "2"}
LAYOUTS = (
    Layout(ALONE, 1, "one process, what all others are compared to", {}),
    Layout("recompute", 1, "activations of whole layers recomputed", {"RECOMPUTE": "1"}),
    Layout("recompute-selective", 1, "attention alone recomputed", _SELECTIVE),
    Layout("dp2", 2, "data parallel, gradients all-reduced", {}),
    Layout("dp2-sharded", 2, "data parallel with the distributed optimizer", _SHARDED),
    Layout("dp2-overlap", 2, "the same, gradient reduce and parameter gather overlapped", _OVERLAP),
    Layout("tp2", 2, "tensor parallel", {"TP": "2"}),
    Layout("tp2-sp", 2, "tensor and sequence parallel", _TP_SP),
    Layout("pp2", 2, "pipeline stages", {"PP": "2"}),
    Layout("vpp2", 2, "interleaved pipeline stages, two chunks each", {"PP": "2", "VPP": "2"}),
    Layout("cp2", 2, "context parallel", {"CP": "2"}),
    Layout("fsdp2", 2, "PyTorch FSDP-v2 over two processes", {"FSDP": "1"}),
    Layout("megatron-fsdp2", 2, "Megatron-FSDP over two processes", {"MEGATRON_FSDP": "1"}),
    Layout("tp2-pp2", 4, "tensor parallel pipeline stages", {"TP": "2", "PP": "2"}),
    Layout("tp2-cp2", 4, "tensor, sequence and context parallel", {**_TP_SP, "CP": "2"}),
    Layout("tp2-dp2", 4, "tensor, sequence and data parallel, distributed optimizer", {**_TP_SP, **_OVERLAP}),
    Layout("hsdp", 4, "Megatron-FSDP over two processes, twice", _HSDP),
    Layout("tp2-pp2-dp2", 8, "tensor parallel, pipeline stages, data parallel", {**_TP_SP, "PP": "2", **_OVERLAP}),
    Layout("tp2-pp2-cp2", 8, "tensor parallel, pipeline stages, context parallel", {**_TP_SP, "PP": "2", "CP": "2"}),
    Layout("tp8-sp", 8, "tensor and sequence parallel over eight", {**_TP_SP, "TP": "8"}),
    Layout("fsdp8", 8, "PyTorch FSDP-v2 over eight processes", {"FSDP": "1"}),
)


@dataclass(frozen=True)
class Planned:
    """A layout and what it resolved to, or why it is not run."""

    layout: Layout
    resolution: Resolution | None
    refused: str = ""


def plan(
    request: RunRequest,
    machine: Machine,
    environment: Mapping[str, str],
    names: Sequence[str] = (),
    processes: int | None = None,
) -> list[Planned]:
    """The layouts in `names`, or all, in the table's order; one process always comes first.

    At most `processes` each; by default as many as there are GPUs, or ON_A_CPU. Raises UsageError for a request that
    not even one process can run.
    """
    known = [layout.name for layout in LAYOUTS] + [ASKED]
    for name in names:
        if name not in known:
            raise UsageError(f"--layouts {name}: no such layout; there are {', '.join(known)}")
    most = processes or len(machine.gpus) or ON_A_CPU
    layouts = [LAYOUTS[0], *_candidates(request)]
    if ASKED in names and layouts[-1].name != ASKED:
        raise UsageError(f"--layouts {ASKED}: no layout was asked for: say TP=2, PP=2, FSDP=1 or the like beside it")
    wanted = [layout for layout in layouts if layout.name in names or not names]
    asked = int(request.text("GPUS_PER_NODE", str(len(machine.gpus) or 1)))
    request = _common(request, [layout.processes or asked for layout in wanted if names or layout.processes <= most])
    alone = _resolved(LAYOUTS[0], request, machine, environment)
    assert alone.resolution
    _must_fit(alone.resolution, machine)
    planned = [alone]
    for layout in wanted:
        if layout.name == ALONE:
            continue
        if layout.processes > most and not names:
            planned.append(Planned(layout, None, f"more than {most} processes, see --processes"))
        else:
            planned.append(_resolved(layout, request, machine, environment))
    return planned


def _candidates(request: RunRequest) -> Iterator[Layout]:
    """All but one process, and the request's own."""
    yield from LAYOUTS[1:]
    own = {name: said.text for name, said in request.said.items() if name in OF_A_LAYOUT}
    if own:
        yield Layout(ASKED, 0, " ".join(f"{name}={value}" for name, value in own.items()), own)


def _common(request: RunRequest, processes: Sequence[int]) -> RunRequest:
    """What all layouts have in common beside what was said: a model, a warmup, a batch that they can all divide.

    `processes` are those of the layouts.
    """
    said = {name: value for name, value in request.said.items() if name not in ASIDE}
    changes = {} if "MODEL_SIZE" in said else {"MODEL_SIZE": "tiny"}
    if "BS" not in said:
        unit = int(request.text("MBS", "1")) * lcm(*processes)
        changes["BS"] = str(-(-8 // unit) * unit)
    if not any(name in said for name in OF_THE_RATE):
        changes["LR_WARMUP_ITERS"] = WARMUP
    if request.text("PRECISION") == "fp16" and "LOSS_SCALE" not in said:
        changes["LOSS_SCALE"] = FIXED_SCALE
    return replace(request, said={**said, **read(request.family, _pairs(changes), {}).said})


def _resolved(layout: Layout, request: RunRequest, machine: Machine, environment: Mapping[str, str]) -> Planned:
    """The request in another layout. Raises UsageError where one process is refused."""
    said = dict(request.said)
    if layout.name != ASKED:
        variables = {"GPUS_PER_NODE": str(layout.processes), **PLAIN, **layout.variables}
        said = {name: value for name, value in said.items() if name not in OF_A_LAYOUT}
        said |= read(request.family, _pairs(variables), {}).said
    try:
        resolution = resolve(replace(request, said=said), machine, dict(environment))
    except UsageError as error:
        if layout.name == ALONE:
            way_out = f". The reference is one process: {FEWER}" if "can't fit" in str(error) else ""
            raise UsageError(f"{error}{way_out}") from None
        return Planned(layout, None, str(error).split(". It takes")[0])
    return Planned(replace(layout, processes=resolution.config.parallel.world_size), resolution)


def _must_fit(resolution: Resolution, machine: Machine) -> None:
    """Raise UsageError where one process can't hold our state, or transformers', beside a copy of the weights."""
    run = resolution.config
    bound = lower_bound(run)
    theirs = (16 if run.optimizer.name == "adam" else 12) * bound.parameters  # FP32: weights, gradients, moments
    need = max(bound.total, theirs) + (4 * bound.parameters if machine.vendor == "cpu" else 0)
    if need > machine.gpu_memory:
        raise UsageError(
            f"{run.model.title} needs {need / GIB:.1f} GiB in one process, with which every layout is compared, and "
            f"{machine.name} has {machine.gpu_memory / GIB:.1f}: {FEWER}"
        )


def _pairs(variables: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in variables.items()]
