"""The story of a run: build, resume, train, evaluate, save."""

from __future__ import annotations

import gc
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.core.optimizer import get_megatron_optimizer
from torch.utils.data import Dataset

from megatron_rocm.checkpoint.load import resume
from megatron_rocm.checkpoint.remote import resume as remote
from megatron_rocm.checkpoint.save import SaveFailed, Saver, saving
from megatron_rocm.checkpoint.save import prepare as prepare_folder
from megatron_rocm.checkpoint.state import State
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.data import datasets
from megatron_rocm.errors import EndsAllRanks, UsageError
from megatron_rocm.model.build import build_model, optimizer_config
from megatron_rocm.platform import startup
from megatron_rocm.train import signals
from megatron_rocm.train.batches import micro_batches
from megatron_rocm.train.curve import draw
from megatron_rocm.train.evaluate import validation_loss
from megatron_rocm.train.faults import Fault
from megatron_rocm.train.fused import fuse
from megatron_rocm.train.log import METRICS, Log, require_sinks
from megatron_rocm.train.schedule import scheduler
from megatron_rocm.train.step import Batches, prepare, train_step

CURVE = "loss.png"


MOST_ROLLBACKS = 3  # to one checkpoint


class Diverged(EndsAllRanks):
    """A fault of a step ends the run; the message says which and where."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and the checkpoint that holds its end."""

    outcome: Literal["finished", "stopped"]
    iteration: int
    checkpoint: Path | None


def train(run: RunConfig) -> Outcome:
    """Train until TOTAL_ITERS, or until asked to stop. Needs the process groups; every rank gets the same outcome.

    Raises UsageError for what the data or a checkpoint have wrong, Diverged for a loss or gradient that is not finite.
    """
    require_sinks(run)
    train_data, valid_data = open_data(run)
    startup.done("data")
    state = build(run)
    prepare(run, state)
    startup.done("model and optimizer")
    shared = prepare_folder(run) if run.checkpoint.save else True
    remote.bring(run, shared)
    begun = resume(run, state)
    checkpoint = begun.path
    start, last = state.iteration, run.training.train_iters
    log = Log(run, start)
    startup.done("checkpoint and log")
    log.say(*begun.notes)
    if start >= last:
        log.say(f"nothing to do: {start} of {last} iterations are trained. Set TOTAL_ITERS higher to go on")
        with remote.sending(run, shared):  # what an earlier run could not send
            pass
        return Outcome("finished", start, checkpoint)

    if log.speaks:  # one clock decides for all
        signals.watch(run.checkpoint, startup.run_born())
    with remote.sending(run, shared) as after, saving(run, shared=shared, after=after) as saver:
        _steps(run, state, train_data, valid_data, log, saver, shared)
    if saver:
        log.say(*saver.news())
        checkpoint = saver.newest or checkpoint
    log.close()
    if log.speaks and state.iteration > start:
        draw(log.folder / METRICS, log.folder / CURVE, run.model.title)
    if state.iteration < last:
        log.say(how_to_go_on(run, state))
        return Outcome("stopped", state.iteration, checkpoint)
    return Outcome("finished", state.iteration, checkpoint)


def _steps(
    run: RunConfig,
    state: State,
    train_data: Dataset[Any],
    valid_data: Dataset[Any] | None,
    log: Log,
    saver: Saver | None,
    shared: bool,
) -> None:
    """Train to the last step, or until asked to stop, and save that; the last save may still be under way then.

    `shared`: whether all nodes see the same folder of checkpoints.
    """
    stop = False
    evaluated = saved = state.iteration
    if valid_data and state.iteration == 0:
        stop = evaluate(run, state, valid_data, log)
        startup.done("evaluation")
    batches = open_batches(run, state, train_data)
    rollbacks = 0
    gc.disable()  # collected between steps: a rank that collects within one keeps all others waiting
    while state.iteration < run.training.train_iters and not stop:
        began = time.perf_counter()
        result = train_step(run, state, batches)
        log.step(state, result, time.perf_counter() - began)
        startup.done("first step")
        log.say(startup.told(), *(saver.news() if saver else ()))
        stop = result.asked.stop
        if result.fault:
            try:
                log.say(told(state, result.fault, result.updated))
                if result.fault.policy == "rollback":
                    rollbacks += 1
                    if saver:
                        saver.wait()
                    if not shared:  # a node's folder has its own part of what was saved, and not the others'
                        remote.bring(run, shared)
                    saved = evaluated = roll_back(run, state, result.fault, rollbacks)
                    log.rewind(state)
                    batches = open_batches(run, state, train_data)
                    continue
            except Diverged:
                if saver:  # the last good state, which may still be on its way to disk
                    with suppress(SaveFailed):
                        saver.wait()
                    log.say(*saver.news())
                log.close_sinks()
                raise
        if valid_data and not stop and state.iteration % run.logging.eval_interval == 0:
            evaluated = state.iteration
            stop = evaluate(run, state, valid_data, log)
        if saver and saver.is_due(state, result.asked):
            signals.saving()
            saver.save(state)
            saved, rollbacks = state.iteration, 0
        if state.iteration % 100 == 0:
            gc.collect()

    gc.enable()
    if saver and saved != state.iteration:
        saver.save(state)
    if valid_data and not stop and evaluated != state.iteration:
        evaluate(run, state, valid_data, log)


def open_data(run: RunConfig) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """The training set, and the validation set where the run evaluates."""
    data, evaluates = run.data, run.logging.eval_iters > 0
    train_data, valid_data, _ = datasets.build(
        data.paths,
        data.split,
        run.training.seq_length,
        run.training.seed,
        data.cache_path,
        data.eod,
        run.model.vocab_size,
        names=("train", "valid") if evaluates else ("train",),
        reset_position_ids=data.reset_position_ids,
        eod_mask_loss=data.eod_mask_loss,
        blend_by=data.blend_by,
    )
    if train_data is None or (evaluates and valid_data is None):
        use = "train on" if train_data is None else "evaluate"
        raise UsageError(f"SPLIT={data.split} leaves no documents to {use}")
    return train_data, valid_data  # type: ignore[return-value]  # map-style: torch asks for __getitem__ alone


def build(run: RunConfig) -> State:
    """Model, optimizer and schedule before the first step."""
    model = build_model(run)
    optimizer = fuse(get_megatron_optimizer(optimizer_config(run), model, use_gloo_process_groups=False))
    return State(model, optimizer, scheduler(run, optimizer))


def evaluate(run: RunConfig, state: State, dataset: Dataset[Any], log: Log) -> bool:
    """Log the validation loss. Whether a rank was asked to stop."""
    loss, stop = validation_loss(run, state, dataset)
    if not stop:
        log.evaluation(state, loss)
    return stop


def open_batches(run: RunConfig, state: State, train_data: Dataset[Any]) -> Batches:
    """This rank's micro batches from where `state` is on, for each model chunk."""
    return [micro_batches(run, train_data, state.consumed_samples, chunk) for chunk in state.model]


def told(state: State, fault: Fault, updated: bool) -> str:
    """What became of the last step's fault, in one line. Raises Diverged where it is to end the run."""
    said, policy = f"iteration {state.iteration}: {fault.what}", f"{fault.variable}={fault.policy}"
    if fault.policy == "warn":
        became = "The update is made all the same" if updated else "FP16 leaves out the update, as of every overflow"
        return f"warning: {said}. {became} ({policy})"
    if fault.policy == "skip":
        return f"warning: {said}. The update is left out ({policy})"
    if fault.policy == "rollback":
        return f"warning: {said}. Going back to the last checkpoint ({policy})"
    raise Diverged(
        f"{said}. Training ends and nothing more is saved ({policy}); the last checkpoint is untouched. "
        f"A lower LR or more LR_WARMUP_ITERS may help; {fault.variable}=skip or rollback leaves the batch out"
    )


def roll_back(run: RunConfig, state: State, fault: Fault, times: int) -> int:
    """Bring `state` back to the last checkpoint, but past the data of the step just done. The checkpoint's iteration.

    `times` says how often that has been done since the last save. Raises Diverged where there is no checkpoint, or
    where going back to it does not help.
    """
    past, policy = state.consumed_samples, f"{fault.variable}=rollback"
    if times > MOST_ROLLBACKS:
        raise Diverged(
            f"iteration {state.iteration}: {fault.what}. {MOST_ROLLBACKS} times in a row training went back to the "
            f"last checkpoint and came no further ({policy}), so it ends; the checkpoint is untouched. Try a lower LR"
        )
    with state.whole_parameters():
        checkpoint = resume(run, state).path
    if not checkpoint:
        raise Diverged(
            f"iteration {state.iteration}: {fault.what}. There is no checkpoint yet to go back to ({policy}), so "
            "training ends. A lower SAVE_INTERVAL saves earlier"
        )
    state.consumed_samples = past
    return state.iteration


def how_to_go_on(run: RunConfig, state: State) -> str:
    stopped = f"stopped as asked after iteration {state.iteration} of {run.training.train_iters}"
    if run.checkpoint.save and state.iteration:
        return f"{stopped}. To go on, start the same command again: it resumes from {run.checkpoint.save}"
    return f"{stopped}. Nothing is saved" + ("" if run.checkpoint.save else ": SAVE_CKPT_PATH was not set")
