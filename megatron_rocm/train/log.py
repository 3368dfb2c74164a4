"""What a run tells: log lines in Megatron-LM's format, metrics.jsonl, TensorBoard, Weights & Biases.

Rank 0 alone tells it; on the other ranks a Log does nothing.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
import torch.distributed as dist

from megatron_rocm.checkpoint.state import State
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.plan.flops import flops_per_token
from megatron_rocm.train.ramp import samples_of
from megatron_rocm.train.step import Result
from megatron_rocm.train.summary import summary

METRICS = "metrics.jsonl"


class Sink(Protocol):
    """A place for numbers."""

    def write(self, values: dict[str, float], iteration: int) -> None: ...

    def rewind(self, start: int) -> None:
        """Forget what came after iteration `start`, which is to be trained anew."""

    def close(self) -> None: ...


def require_sinks(run: RunConfig) -> None:
    """Raise UsageError where what the run logs to is not installed."""
    if run.logging.wandb and not importlib.util.find_spec("wandb"):
        raise UsageError(
            "WANDB_API_KEY is set, but Weights & Biases is not installed: "
            "pip install 'megatron-rocm[wandb]', or unset WANDB_API_KEY"
        )


class Log:
    """The run's log, from iteration `start` on."""

    def __init__(self, run: RunConfig, start: int) -> None:
        self.run = run
        self.folder = Path(run.launch.log_dir)
        self.speaks = dist.get_rank() == 0
        self.sinks: list[Sink] = _sinks(run, start) if self.speaks else []
        self.lines: list[str] = []
        self.unlogged: list[tuple[float, Result]] = []  # (seconds, what it came to) of the steps since the last line
        self.samples, self.seconds = 0, 0.0  # measured ones: without the first step, which warms up

    def say(self, *texts: str) -> None:
        """A line of each text; nothing where there is none."""
        for text in texts:
            if self.speaks and text:
                print(text, flush=True)

    def step(self, state: State, result: Result, seconds: float) -> None:
        """A step is done; it took so many seconds."""
        if not self.speaks:
            return
        self.unlogged.append((seconds, result))
        if len(self.lines) or len(self.unlogged) > 1:
            self.samples, self.seconds = self.samples + result.batch_size, self.seconds + seconds
        training = self.run.training
        tokens = result.batch_size * training.seq_length
        values = {
            "consumed_samples": state.consumed_samples,
            "lm_loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "global_batch_size": result.batch_size,
            "loss_scale": result.loss_scale,
            "skipped": float(not result.updated),
            "iteration_ms": seconds * 1000,
            "tflops_per_gpu": self._tflops(result.batch_size, seconds),
            "tokens_per_gpu_per_s": tokens / seconds / self.run.parallel.world_size,
            "mem_usage": memory_usage(),
        }
        self._write(values, state.iteration)
        goes_back = result.fault is not None and result.fault.policy == "rollback"
        if goes_back or state.iteration % self.run.logging.log_interval == 0 or state.iteration == training.train_iters:
            self._line(state, result, values["mem_usage"])

    def rewind(self, state: State) -> None:
        """`state` is back at an earlier iteration: what came after it is forgotten."""
        for sink in self.sinks:
            sink.rewind(state.iteration)

    def evaluation(self, state: State, loss: float) -> None:
        """The validation loss after `state.iteration` steps."""
        # Megatron-LM's bound, so that a first loss can't overflow.
        perplexity = math.exp(min(20.0, loss)) if math.isfinite(loss) else loss
        self.say(
            f" validation loss at iteration {state.iteration} on validation set | lm loss value: {loss:.6E} "
            f"| lm loss PPL: {perplexity:.6E} | "
        )
        if not math.isfinite(loss):
            self.say("warning: the validation loss is not finite; NAN_POLICY looks at training alone")
        if self.speaks:
            self._write({"validation_loss": loss, "validation_perplexity": perplexity}, state.iteration)

    def close(self) -> None:
        """The run is over: its summary, and what the sinks have left to do."""
        if not self.speaks:
            return
        run = self.run
        for line in summary(self.lines, run.training.seq_length, run.parallel.world_size):
            self.say(line)
        self.close_sinks()

    def close_sinks(self) -> None:
        """Have what was logged written."""
        for sink in self.sinks:
            sink.close()

    def _write(self, values: dict[str, float], iteration: int) -> None:
        for sink in self.sinks:
            sink.write(values, iteration)

    def _tflops(self, samples: float, seconds: float) -> float:
        """Per process, without recomputation."""
        operations = flops_per_token(self.run) * samples * self.run.training.seq_length
        return operations / seconds / self.run.parallel.world_size / 1e12

    def _left(self, state: State) -> float:
        """Seconds to the end, by the samples that are still to come."""
        seconds = self.seconds or sum(one for one, _ in self.unlogged)
        samples = self.samples or sum(result.batch_size for _, result in self.unlogged)
        training = self.run.training
        return samples_of(training, state.consumed_samples, training.train_iters - state.iteration) * seconds / samples

    def _line(self, state: State, result: Result, memory: float) -> None:
        """Megatron-LM's line; `mem usages` and where it stands are ROCm/Megatron-LM's, `time left` is ours.

        As there, the loss is the mean over updates, skipped and NaN iterations are those since the last line, and there
        is no grad norm where the update was left out before it was known.
        """
        run = self.run
        results = [one for _, one in self.unlogged]
        seconds = sum(one for one, _ in self.unlogged) / len(results)
        samples = sum(one.batch_size for one in results) / len(results)
        counted = [one.loss for one in results if one.updated] or [one.loss for one in results]
        loss = sum(counted) / len(counted)
        grad_norm = "" if math.isnan(result.grad_norm) else f" grad norm: {result.grad_norm:.3f} |"
        skipped = sum(not one.updated for one in results)
        not_finite = sum(bool(one.fault and one.fault.kind == "nan") for one in results)
        line = (
            f" [{datetime.datetime.now():%Y-%m-%d %H:%M:%S}]"
            f" iteration {state.iteration:8d}/{run.training.train_iters:8d} |"
            f" consumed samples: {state.consumed_samples:12d} |"
            f" elapsed time per iteration (ms): {seconds * 1000:.1f} |"
            f" throughput per GPU (TFLOP/s/GPU): {_shown(self._tflops(samples, seconds))} |"
            f" learning rate: {result.learning_rate:.6E} |"
            f" global batch size: {result.batch_size:5d} |"
            f" lm loss: {loss:.6E} |"
            f" loss scale: {result.loss_scale:.1f} |"
            f"{grad_norm}"
            f" number of skipped iterations: {skipped:3d} |"
            f" number of nan iterations: {not_finite:3d} |"
            f" mem usages: {memory:.4f} |"
            f" time left: {datetime.timedelta(seconds=round(self._left(state)))} |"
        )
        self.unlogged.clear()
        self.lines.append(line)
        self.say(line)


def _shown(tflops: float) -> str:
    """Megatron-LM shows one digit after the point; a CPU's thousandths would all be 0.0."""
    return f"{tflops:.1f}" if tflops >= 1 else f"{tflops:.4f}"


def memory_usage() -> float:
    """The share of the GPU's memory in use, by anybody; on a CPU the share of the machine's that this process has."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / total
    return psutil.Process().memory_info().rss / psutil.virtual_memory().total


def _sinks(run: RunConfig, start: int) -> list[Sink]:
    folder = Path(run.launch.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = [JsonLines(folder / METRICS, start)]
    if run.logging.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", start))
    if run.logging.wandb:
        sinks.append(WeightsAndBiases(run))
    return sinks


class JsonLines:
    """One object per line with every digit; `Infinity` and `NaN` as Python's json writes them.

    What a run wrote after the checkpoint that it now goes on from is cut off, so that each iteration is there once.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self._open(start)

    def rewind(self, start: int) -> None:
        self.file.close()
        self._open(start)

    def _open(self, start: int) -> None:
        path = self.path
        kept = [line for line in _whole_lines(path) if json.loads(line)["iteration"] <= start] if start else []
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(kept))
        temporary.replace(path)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115  # open until close()

    def write(self, values: dict[str, float], iteration: int) -> None:
        self.file.write(json.dumps({"iteration": iteration, **values}) + "\n")

    def close(self) -> None:
        self.file.close()


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file whose writer may have been killed within one."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


class TensorBoard:
    """Event files; those of iterations that are trained anew are hidden."""

    def __init__(self, folder: Path, start: int) -> None:
        self.folder = str(folder)
        self._open(start)

    def rewind(self, start: int) -> None:
        self.writer.close()
        self._open(start)

    def _open(self, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.folder, purge_step=start + 1 if start else None)

    def write(self, values: dict[str, float], iteration: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run in WANDB_PROJECT, named EXP_NAME."""

    def __init__(self, run: RunConfig) -> None:
        import wandb

        config: dict[str, Any] = run.model_dump(mode="json")
        self.run = wandb.init(
            project=run.logging.wandb_project, name=run.launch.exp_name, dir=run.launch.log_dir, config=config
        )

    def write(self, values: dict[str, float], iteration: int) -> None:
        self.run.log(values, step=iteration)

    def rewind(self, start: int) -> None:
        """It takes no step twice: what is trained anew shows once training has come past where it was."""

    def close(self) -> None:
        self.run.finish()
