"""What may change between a checkpoint and the run that goes on from it: one row for fields that behave alike."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_rocm.config.schema import RunConfig, variables
from megatron_rocm.errors import UsageError

FREE = "free"  # the same training
WARN = "warns"  # other training from here on, and it is plain that this was meant
ASK = "needs ALLOW_CHANGE"  # likely a mistake
NEVER = "refused"  # the checkpoint is of no use to such a run


@dataclass(frozen=True)
class Row:
    """Fields of one section of RunConfig, their names separated by spaces, and what becomes of a change."""

    section: str
    fields: str
    verdict: str
    why: str

    @property
    def names(self) -> list[str]:
        """As people name the fields, in ALLOW_CHANGE too."""
        return [name_of(self.section, field) for field in self.fields.split()]


def name_of(section: str, field: str) -> str:
    """The variable that sets a field; a derived one's own name in capitals, and core's as it begins."""
    if section == "core":
        return f"core.{field}"
    kind: Any = RunConfig.model_fields[section].annotation
    meta = kind.model_fields[field].json_schema_extra
    return str(meta["var"]) if isinstance(meta, dict) and "var" in meta else field.upper()


ROWS = (
    Row("model", "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size tied_embeddings",
        NEVER, "weights of this shape are another model's"),
    Row("model", "rotary_base rope_scaling rope_scaling_factor norm_eps",
        ASK, "the weights fit, but were trained to be used otherwise"),
    Row("model", "family size title padded_vocab_size max_position_embeddings init_std",
        FREE, "a name, a limit, or how weights begin"),
    Row("parallel", "nnodes gpus_per_node world_size tp pp vpp cp dp sequence_parallel distributed_optimizer fsdp megatron_fsdp hsdp "
        "hsdp_replicas overlap_grad_reduce overlap_param_gather count_embedding_and_loss",
        FREE, "the same samples in the same order; sums are rounded in another order"),
    Row("precision", "dtype", ASK, "the loss goes on with other rounding; FP32 master weights are taken over"),
    Row("precision", "grad_reduce_in_bf16 loss_scale min_loss_scale loss_scale_window hysteresis",
        WARN, "gradients are rounded or scaled otherwise from here on"),
    Row("precision", "gradient_accumulation_fusion rope_fusion fused_single_qkv_rope cross_entropy_loss_fusion cross_entropy_fusion_impl "
        "flash_attention initial_loss_scale", FREE, "other kernels for the same sums, or a beginning that is past"),
    Row("fp8", "enabled recipe format amax_history amax_algo first_last_bf16 bf16_start bf16_end param_gather", WARN,
        "the layers' products are rounded otherwise from here on"),
    Row("fp8", "transpose_cache", FREE, "the same FP8 copies, made more or less often"),
    Row("training", "seq_length", ASK, "samples are cut anew: the position in the data is another, so texts come twice or never"),
    Row("training", "seed", ASK, "the data are shuffled anew: samples come twice or never"),
    Row("training", "global_batch_size rampup", WARN,
        "the same samples in the same order, in other steps; the learning rate goes on at the same step"),
    Row("training", "micro_batch_size num_micro_batches train_iters recompute recompute_granularity recompute_method recompute_num_layers "
        "recompute_modules cpu_offloading_num_layers nan_policy spike_policy spike_factor deterministic",
        FREE, "how long, with what memory and care"),
    Row("optimizer", "name", NEVER, "it does not know the other one's state; NO_LOAD_OPTIM=1 begins it anew"),
    Row("optimizer", "lr min_lr lr_warmup_iters lr_decay_iters lr_decay_style wsd_decay_style wsd_decay_iters",
        WARN, "the position is the checkpoint's, the course this run's"),
    Row("optimizer", "weight_decay adam_beta1 adam_beta2 adam_eps clip_grad", WARN, "updates are other ones from here on"),
    Row("optimizer", "cpu_offload offload_fraction", FREE, "where the same state lies"),
    Row("data", "blend train_blend split blend_by", ASK,
        "the position counts samples of the data before; allow it where the same data have moved"),
    Row("data", "fingerprint", NEVER, "the data are of another tokenizer: the same ids are other words"),
    Row("data", "eod reset_attention_mask reset_position_ids eod_mask_loss valid_blend", WARN,
        "what the model sees or is judged by is another from here on"),
    Row("data", "test_blend blend_max_epochs cache_path tokenizer_type tokenizer_model", FREE, "not what is trained on"),
    Row("checkpoint", " ".join(RunConfig.model_fields["checkpoint"].annotation.model_fields), FREE, "where and when is saved"),  # type: ignore[union-attr]
    Row("logging", "log_interval eval_interval eval_iters tensorboard wandb wandb_project", FREE, "what is told"),
    Row("hardware", "vendor arch gpu_memory tier threads", FREE, "another machine, to rounding"),
    Row("core", "transformer optimizer ddp", WARN, "megatron-core's own fields, set by name"),
)  # fmt: skip

SET = {variable.name for variable in variables()}  # what people set; the rest follows from it
VERDICTS = {name: row.verdict for row in ROWS for name in row.names}
ALLOWABLE = tuple(sorted(name for row in ROWS if row.verdict == ASK for name in row.names))


class Changed(NamedTuple):
    """A field that differs: before it was the checkpoint's value, now it is the run's."""

    name: str
    before: Any
    now: Any
    row: Row

    def __str__(self) -> str:
        return f"{self.name} {_shown(self.before)} → {_shown(self.now)}"


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Changed]:
    """What differs between a checkpoint's configuration and a run's, both as JSON has them, in the table's order.

    Fields that one of them lacks, as other versions and programs have written them, are no difference.
    """
    for row in ROWS:
        there, here = saved.get(row.section), now.get(row.section)
        for field in row.fields.split():
            if not (there and here and field in there and field in here):
                continue
            before, after = there[field], here[field]
            if before == after or str(before) == str(after):
                continue
            if field != "fingerprint":
                yield Changed(name_of(row.section, field), before, after, row)
            elif before and after:  # one of them is not known of mock data, and of what an older version has saved
                yield Changed("TOKENIZER_MODEL", there.get("tokenizer_model"), here.get("tokenizer_model"), row)


def check(
    run: RunConfig, saved: Mapping[str, Any], path: Path, position: bool = True, optimizer: bool = True
) -> list[str]:
    """Lines on what has changed since `run`, whose configuration was `saved`, wrote the checkpoint `path`.

    Where `position` is not taken, only what the weights depend on counts. Raises UsageError for a change that is
    refused, or needs a word that ALLOW_CHANGE does not give.
    """
    found = list(changes(saved, run.model_dump(mode="json")))
    if not position:
        found = [change for change in found if change.row.section == "model" or change.row.fields == "fingerprint"]
    by: dict[str, list[Changed]] = {verdict: [] for verdict in (NEVER, ASK, WARN, FREE)}
    for change in found:
        harmless = (
            change.row.section == "optimizer" and not optimizer or change.row.fields == "fingerprint" and not position
        )
        by[WARN if harmless and change.row.verdict == NEVER else change.row.verdict].append(change)
    if by[NEVER]:
        raise UsageError(
            f"{path} is of another run: {_listed(by[NEVER])}. "
            "Use the settings it was made with, or another SAVE_CKPT_PATH and LOAD_CKPT_PATH"
        )
    allowed = run.checkpoint.allow_change
    if asks := [change for change in by[ASK] if change.name not in allowed]:
        names = ",".join([*allowed, *(change.name for change in asks)])
        raise UsageError(
            f"since {path} was saved, {_listed(asks)}. Where that is meant, say so with ALLOW_CHANGE={names}; "
            "else use the settings it was saved with"
        )
    notes = [f"changed since the checkpoint, as allowed: {_listed([change])}" for change in by[ASK]]
    notes += [f"warning: changed since the checkpoint: {_listed([change])}" for change in by[WARN]]
    if free := [str(change) for change in by[FREE] if change.name in SET and change.row.section != "checkpoint"]:
        notes.append(f"changed since the checkpoint: {', '.join(free)}")
    return notes


def _listed(found: list[Changed]) -> str:
    return "; ".join(f"{change} ({change.row.why})" for change in found)


def unknown_names(allowed: Collection[str]) -> str:
    """What is wrong with the names given to ALLOW_CHANGE; empty where nothing is."""
    for name in allowed:
        if name in VERDICTS and name not in ALLOWABLE:
            return f"a change of {name} " + ("is refused" if VERDICTS[name] == NEVER else "needs no word")
        if name not in ALLOWABLE:
            close = difflib.get_close_matches(name.upper(), ALLOWABLE, n=1, cutoff=0.5)
            nearest = f"did you mean {close[0]}?" if close else f"it takes {', '.join(ALLOWABLE)}"
            return f"{name} is none of the changes that need a word; {nearest}"
    return ""


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    text = str(int(value)) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
