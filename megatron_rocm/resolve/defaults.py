"""A request's draft: every value filled in, what follows from others adjusted, every rule checked."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace

from megatron_rocm.config.blend import OWN_PATHS, PATH_VARIABLES
from megatron_rocm.config.presets import PRESETS, default_seq_length
from megatron_rocm.config.request import RunRequest
from megatron_rocm.config.schema import variables
from megatron_rocm.config.variable import BY_RULE
from megatron_rocm.data.facts import DataFacts, parse_split
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.machine import Machine
from megatron_rocm.resolve.rules import RULES, Draft, Test, shown


def draft_of(request: RunRequest, machine: Machine, size: str, facts: DataFacts | None, nnodes: int | None) -> Draft:
    """The draft of a request with every value filled in and every rule checked."""
    preset = PRESETS[request.family, size]
    if request.layers:
        if request.layers > preset.num_layers:
            raise UsageError(f"--layers {request.layers}: {preset.title} has {preset.num_layers} layers; say fewer")
        title = f"{preset.title}, {request.layers} of {preset.num_layers} layers"
        preset = replace(preset, num_layers=request.layers, title=title)
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
    for variable in variables():
        if variable.default is not BY_RULE:
            draft.default(variable.name, variable.default)
    _adjust(draft)
    for rule in RULES:
        rule.check(draft)
    return draft


def _layout_defaults(draft: Draft, family: str) -> None:
    preset, machine = draft.preset, draft.machine
    for name in ("NNODES", "CP", "VPP"):
        draft.default(name, 1)
    draft.default("FSDP", False)
    if draft["FSDP"]:
        draft.adjust("TP", 1, "FSDP=1 shards over all processes")
        draft.adjust("SEQ_PARALLEL", False, "FSDP=1 has no tensor parallel group to split the sequence over")
    draft.default("MEGATRON_FSDP", False)
    fully = draft["FSDP"] or draft["MEGATRON_FSDP"]
    for name, value in preset.defaults.items():
        if name in ("TP", "PP") and fully or name == "PRECISION" and machine.vendor != "cpu":
            continue
        draft.default(name, value, f"preset {preset.title}")
    draft.default("PP", 1)
    if fully:
        draft.default("TP", 1)  # what is sharded over the data parallel processes needs no other cut
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
    draft.default("SEQ_LENGTH", default_seq_length(family, draft["MODEL_SIZE"]))
    draft.default("TOTAL_ITERS", 12)


def _other_defaults(draft: Draft, request: RunRequest) -> None:
    draft.default("PRECISION", "bf16")
    draft.default("TE_FP8", False)
    draft.default("TE_FP8_RECIPE", "delayed")
    draft.default("TE_FP8_FORMAT", "hybrid" if draft["TE_FP8_RECIPE"] in ("delayed", "tensorwise") else "e4m3")
    draft.default("SPIKE_FACTOR", 2.0 if draft["TE_FP8"] else 0.0)
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
    _own_paths(draft)
    draft.set("WANDB", "WANDB_API_KEY" in request.said, "rule")
    parallel = draft.world > draft.model_parallel
    fully = draft["FSDP"] or draft["MEGATRON_FSDP"]
    draft.default("FP8_TRANSPOSE_CACHE", not fully)  # it would keep a whole model on each GPU
    # One rank alone would copy all gradients and parameters in each step, and share nothing.
    asked = any(
        name in draft and draft[name] for name in ("OPTIMIZER_CPU_OFFLOAD", "OVERLAP_PARAM_GATHER", "FP8_PARAM_GATHER")
    )
    shares = draft.world > draft["TP"] * draft["PP"] or asked
    draft.default("USE_DISTRIBUTED_OPTIMIZER", draft["OPTIMIZER"] == "adam" and not fully and shares)
    draft.default("OVERLAP_GRAD_REDUCE", parallel and not fully)
    draft.default(
        "OVERLAP_PARAM_GATHER", parallel and draft["USE_DISTRIBUTED_OPTIMIZER"] and draft["OVERLAP_GRAD_REDUCE"]
    )
    draft.default("RECOMPUTE_NUM_LAYERS", None)
    room = draft["LR_DECAY_ITERS"] - draft["LR_WARMUP_ITERS"]
    if draft.values.get("LR_DECAY_STYLE") == "WSD":
        draft.default("LR_WSD_DECAY_ITERS", max(1, min(draft["LR_DECAY_ITERS"] // 10, room)))


def _own_paths(draft: Draft) -> None:
    """The blends of a file that names the splits, as if each had been said by its own variable."""
    whole = draft.values.get("DATA_PATH")
    if isinstance(whole, Mapping):
        for split, blend in whole.items():
            draft.set(OWN_PATHS[split], blend, draft.origins["DATA_PATH"])
        draft.set("DATA_PATH", None, draft.origins["DATA_PATH"])


# What PyTorch's and Megatron's FSDP each do in their own way.
OWN_WAY = ("USE_DISTRIBUTED_OPTIMIZER", "OVERLAP_GRAD_REDUCE", "OVERLAP_PARAM_GATHER", "GRADIENT_ACCUMULATION_FUSION")


# What is read only where a switch is on: variable → what to type, and whether it is on.
NEEDS: dict[str, tuple[str, Test]] = {
    **dict.fromkeys(("RECOMPUTE_GRANULARITY", "RECOMPUTE_METHOD"), ("RECOMPUTE=1", lambda d: d["RECOMPUTE"])),
    "RECOMPUTE_MODULES": (
        "RECOMPUTE=1 RECOMPUTE_GRANULARITY=selective",
        lambda d: d["RECOMPUTE"] and d["RECOMPUTE_GRANULARITY"] == "selective",
    ),
    "SPIKE_POLICY": ("SPIKE_FACTOR, above which a loss is a spike", lambda d: d["SPIKE_FACTOR"] > 0),
    "HSDP_NUM_REPLICAS": ("ENABLE_HSDP=1", lambda d: d["ENABLE_HSDP"]),
    **dict.fromkeys(
        ("LR_WSD_DECAY_ITERS", "LR_WSD_DECAY_STYLE"), ("LR_DECAY_STYLE=WSD", lambda d: d["LR_DECAY_STYLE"] == "WSD")
    ),
    **dict.fromkeys(
        ("LOSS_SCALE", "INITIAL_LOSS_SCALE", "MIN_LOSS_SCALE", "LOSS_SCALE_WINDOW", "HYSTERESIS"),
        ("PRECISION=fp16", lambda d: d["PRECISION"] == "fp16"),
    ),
    **dict.fromkeys(
        ("TE_FP8_RECIPE", "TE_FP8_FORMAT", "FP8_PARAM_GATHER", "FP8_FIRST_LAST_LAYERS_BF16", "FP8_TRANSPOSE_CACHE"),
        ("TE_FP8=1", lambda d: d["TE_FP8"]),
    ),
    **dict.fromkeys(
        ("FP8_AMAX_HISTORY", "FP8_AMAX_ALGO"),
        ("TE_FP8=1 TE_FP8_RECIPE=delayed", lambda d: d["TE_FP8"] and d["TE_FP8_RECIPE"] == "delayed"),
    ),
    **dict.fromkeys(
        ("FP8_BF16_START", "FP8_BF16_END"),
        ("TE_FP8=1 FP8_FIRST_LAST_LAYERS_BF16=1", lambda d: d["TE_FP8"] and d["FP8_FIRST_LAST_LAYERS_BF16"]),
    ),
    "OPTIMIZER_OFFLOAD_FRACTION": ("OPTIMIZER_CPU_OFFLOAD=1", lambda d: d["OPTIMIZER_CPU_OFFLOAD"]),
    **dict.fromkeys(
        ("RESET_ATTENTION_MASK", "EOD_MASK_LOSS"),
        ("DATA_PATH: mock data has no ends of documents", lambda d: bool(d["DATA_PATH"] or d["TRAIN_DATA_PATH"])),
    ),
    "SPLIT": ("DATA_PATH: each split has paths of its own", lambda d: not d["TRAIN_DATA_PATH"]),
    "BLEND_BY": (
        "a blend of several sources",
        lambda d: any(len(d[name] or ()) > 1 for name in PATH_VARIABLES),
    ),
}


def _adjust(draft: Draft) -> None:
    """What follows from other choices, as in the guide; a said value that changes gets a line."""
    preset = draft.preset
    if draft["TP"] == 1 and draft["SEQ_PARALLEL"]:
        draft.set("SEQ_PARALLEL", False, "rule")  # the guide's default where nothing is split: no line
    if draft["ROPE_SCALING"] and preset.rope_scaling_factor is None:
        draft.adjust("ROPE_SCALING", False, f"{preset.title} has none")
    if draft["PRECISION"] == "fp32" and draft["GRAD_REDUCE_IN_BF16"]:
        draft.adjust("GRAD_REDUCE_IN_BF16", False, "PRECISION=fp32 keeps FP32 gradients")
    if draft["PRECISION"] == "fp16" and draft["GRAD_REDUCE_IN_BF16"]:
        draft.adjust("GRAD_REDUCE_IN_BF16", False, "PRECISION=fp16 would reduce in FP16, which overflows")
    if draft["PRECISION"] == "fp16" and draft["LOSS_SCALE"] is None:
        draft.notes.append(
            "PRECISION=fp16: the first steps are skipped until halving has brought INITIAL_LOSS_SCALE="
            f"{draft['INITIAL_LOSS_SCALE']:g} down far enough; set it to what an earlier run settled at"
        )
    if draft["DETERMINISTIC"]:
        draft.adjust("USE_FLASH_ATTN", False, "DETERMINISTIC=1 leaves the choice of a kernel to Transformer Engine")
    if draft["TE_FP8"]:
        _adjust_to_fp8(draft)
    for fully in ("FSDP", "MEGATRON_FSDP"):
        if draft[fully]:
            for name in OWN_WAY:
                draft.adjust(name, False, f"{fully}=1 has its own way")
    if draft.machine.tier == "torch":
        for name in ("ROPE_FUSION", "FUSED_SINGLE_QKV_ROPE", "GRADIENT_ACCUMULATION_FUSION"):
            draft.adjust(name, False, "a kernel of Transformer Engine's, which is not used here")
        draft.adjust("CROSS_ENTROPY_FUSION_IMPL", "native", "Transformer Engine is not used here")
    else:
        _adjust_to_libraries(draft)
    for holds, why in (
        (draft.machine.vendor == "cpu", "no GPU to fuse kernels on"),
        (draft["PRECISION"] != "bf16", "the fused kernel rounds gradients to BF16"),
        (draft["DETERMINISTIC"], "the fused kernel is not deterministic"),
    ):
        if draft["CROSS_ENTROPY_LOSS_FUSION"] and holds:
            draft.adjust("CROSS_ENTROPY_LOSS_FUSION", False, why)
    if not draft["ROPE_FUSION"]:
        draft.adjust("FUSED_SINGLE_QKV_ROPE", False, "ROPE_FUSION=0")
    if draft["SEQ_LENGTH"] > preset.max_position_embeddings:
        longest = preset.max_position_embeddings
        draft.notes.append(f"SEQ_LENGTH={draft['SEQ_LENGTH']} is longer than {preset.title}'s {longest} positions")
    _adjust_recompute(draft)
    for name, (switch, on) in NEEDS.items():
        if draft.origins[name] not in ("default", "rule") and not on(draft):
            draft.notes.append(f"{name}={shown(draft[name])} has no effect without {switch}")
    if draft["NNODES"] > 1 and draft["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1"):
        draft.notes.append(
            f"MASTER_ADDR={draft['MASTER_ADDR']} reaches this machine only: other hosts need node 0's address"
        )
    if "SAVE_CKPT_PATH" not in draft.origins or not draft["SAVE_CKPT_PATH"]:
        draft.notes.append("SAVE_CKPT_PATH is not set: nothing is saved")


def _adjust_to_fp8(draft: Draft) -> None:
    if draft["FP8_PARAM_GATHER"] and draft["TE_FP8_RECIPE"] == "mxfp8":
        # Gathered ahead, they would be in the gradients' memory when the next step clears it.
        draft.adjust(
            "OVERLAP_PARAM_GATHER", False, "FP8_PARAM_GATHER=1 gathers MXFP8 weights through the gradients' memory"
        )
    fully = next((name for name in ("FSDP", "MEGATRON_FSDP") if draft[name]), None)
    if fully and draft["TE_FP8_RECIPE"] == "delayed" and (draft["SAVE_CKPT_PATH"] or draft["LOAD_CKPT_PATH"]):
        draft.notes.append(
            f"TE_FP8_RECIPE=delayed with {fully}=1: its scales are not in checkpoints, so the first steps after a "
            "resume are rounded coarsely; TE_FP8_RECIPE=tensorwise has none to save"
        )


def _adjust_recompute(draft: Draft) -> None:
    """How many layers are recomputed: what was said, at most those that a chunk has."""
    chunks = draft.layers(draft.layers(False) is None)
    most = max(max(stage) for stage in chunks) if chunks else draft.preset.num_layers
    if not draft["RECOMPUTE"] or draft["RECOMPUTE_GRANULARITY"] == "selective":
        if draft["RECOMPUTE_NUM_LAYERS"]:
            why = "in every layer" if draft["RECOMPUTE"] else "RECOMPUTE=0"
            draft.adjust("RECOMPUTE_NUM_LAYERS", None, why)
    elif draft["RECOMPUTE_NUM_LAYERS"] is None:
        draft.set("RECOMPUTE_NUM_LAYERS", 1 if draft["RECOMPUTE_METHOD"] == "uniform" else most, "default")
    elif draft["RECOMPUTE_NUM_LAYERS"] > most:
        draft.adjust("RECOMPUTE_NUM_LAYERS", most, "the layers a process holds")


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
