"""The story of a run: build, resume, train, evaluate, save."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.utils.data import Dataset

from megatron_rocm.checkpoint.load import resume
from megatron_rocm.checkpoint.save import prepare as prepare_folder
from megatron_rocm.checkpoint.save import save
from megatron_rocm.checkpoint.state import State
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.data import datasets
from megatron_rocm.errors import UsageError
from megatron_rocm.model.build import build_model, optimizer_config
from megatron_rocm.train.batches import micro_batches
from megatron_rocm.train.curve import draw
from megatron_rocm.train.evaluate import validation_loss
from megatron_rocm.train.log import METRICS, Log, require_sinks
from megatron_rocm.train.step import Result, prepare, train_step

CURVE = "loss.png"


class Diverged(Exception):
    """The loss or the gradient is not a number any more; the message says where."""


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
    state = build(run)
    prepare(run, state)
    if run.checkpoint.save:
        prepare_folder(run)
    checkpoint = resume(run, state)
    start, last = state.iteration, run.training.train_iters
    log = Log(run, start)
    log.say(f"going on after iteration {start} from {checkpoint}" if checkpoint else "starting from initial weights")
    if start >= last:
        log.say(f"nothing to do: {start} of {last} iterations are trained. Set TOTAL_ITERS higher to go on")
        return Outcome("finished", start, checkpoint)

    stop = False
    evaluated = saved = start
    if valid_data and start == 0:
        stop = evaluate(run, state, valid_data, log)
    batches = [micro_batches(run, train_data, state.consumed_samples, chunk) for chunk in state.model]
    gc.disable()  # collected between steps: a rank that collects within one keeps all others waiting
    while state.iteration < last and not stop:
        began = time.perf_counter()
        result = train_step(run, state, batches)
        must_be_finite(state, result)
        log.step(state, result, time.perf_counter() - began)
        stop = result.stop
        if valid_data and not stop and state.iteration % run.logging.eval_interval == 0:
            evaluated = state.iteration
            stop = evaluate(run, state, valid_data, log)
        if run.checkpoint.save and state.iteration % run.checkpoint.save_interval == 0:
            saved, checkpoint = state.iteration, save(run, state)
            log.say(f"saved {checkpoint}")
        if state.iteration % 100 == 0:
            gc.collect()

    gc.enable()
    if run.checkpoint.save and saved != state.iteration:
        checkpoint = save(run, state)
        log.say(f"saved {checkpoint}")
    if valid_data and not stop and evaluated != state.iteration:
        evaluate(run, state, valid_data, log)
    log.close()
    if log.speaks and state.iteration > start:
        draw(log.folder / METRICS, log.folder / CURVE, run.model.title)
    if state.iteration < last:
        log.say(how_to_go_on(run, state))
        return Outcome("stopped", state.iteration, checkpoint)
    return Outcome("finished", state.iteration, checkpoint)


def open_data(run: RunConfig) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """The training set, and the validation set where the run evaluates."""
    data, evaluates = run.data, run.logging.eval_iters > 0
    train_data, valid_data, _ = datasets.build(
        data.blend,
        data.split,
        run.training.seq_length,
        run.training.seed,
        data.cache_path,
        data.eod,
        run.model.vocab_size,
        names=("train", "valid") if evaluates else ("train",),
    )
    if train_data is None or (evaluates and valid_data is None):
        use = "train on" if train_data is None else "evaluate"
        raise UsageError(f"SPLIT={data.split} leaves no documents to {use}")
    return train_data, valid_data  # type: ignore[return-value]  # map-style: torch asks for __getitem__ alone


def build(run: RunConfig) -> State:
    """Model, optimizer and schedule before the first step."""
    model = build_model(run)
    optimizer = get_megatron_optimizer(optimizer_config(run), model, use_gloo_process_groups=False)
    batch = run.training.global_batch_size
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=run.optimizer.lr,
        min_lr=run.optimizer.min_lr,
        lr_warmup_steps=run.optimizer.lr_warmup_iters * batch,  # counted in samples, as in Megatron-LM's checkpoints
        lr_decay_steps=run.optimizer.lr_decay_iters * batch,
        lr_decay_style="cosine",
        start_wd=run.optimizer.weight_decay,
        end_wd=run.optimizer.weight_decay,
        wd_incr_steps=run.optimizer.lr_decay_iters * batch,
        wd_incr_style="constant",
        # On resume the position is the checkpoint's, the shape of the curve this run's.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return State(model, optimizer, scheduler)


def evaluate(run: RunConfig, state: State, dataset: Dataset[Any], log: Log) -> bool:
    """Log the validation loss. Whether a rank was asked to stop."""
    loss, stop = validation_loss(run, state, dataset)
    if not stop:
        log.evaluation(state, loss)
    return stop


def must_be_finite(state: State, result: Result) -> None:
    for name, value in (("lm loss", result.loss), ("grad norm", result.grad_norm)):
        if not math.isfinite(value):
            raise Diverged(
                f"iteration {state.iteration}: the {name} is {value}, so training ends and nothing more is saved. "
                "A lower LR, more LR_WARMUP_ITERS or PRECISION=fp32 may help; the last checkpoint is untouched"
            )


def how_to_go_on(run: RunConfig, state: State) -> str:
    stopped = f"stopped as asked after iteration {state.iteration} of {run.training.train_iters}"
    if run.checkpoint.save and state.iteration:
        return f"{stopped}. To go on, start the same command again: it resumes from {run.checkpoint.save}"
    return f"{stopped}. Nothing is saved" + ("" if run.checkpoint.save else ": SAVE_CKPT_PATH was not set")
