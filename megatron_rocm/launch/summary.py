"""NO_TRAINING=1: the summary of a run that is over, from its log."""

from __future__ import annotations

from pathlib import Path

from megatron_rocm.config.request import RunRequest
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.train.summary import summary


def report(request: RunRequest) -> str:
    """The summary lines of the run in LOG_DIR. Raises UsageError where there is no such run or nothing to average."""
    folder = Path(request.text("LOG_DIR"))
    if not request.text("LOG_DIR"):
        raise UsageError("NO_TRAINING=1 summarizes a run's log: name its folder with LOG_DIR=…")
    try:
        run = RunConfig.load(folder / "run.json")
        log = folder / f"output_{request.text('EXP_NAME', run.launch.exp_name)}.log"
        lines = log.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UsageError(f"LOG_DIR={folder}: no run to summarize: {error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else "it holds no run's configuration"
        raise UsageError(f"LOG_DIR={folder}: run.json can't be used: {reason}; name the folder of a run") from None
    rows = summary(lines, run.training.seq_length, run.parallel.world_size)
    if not rows:
        raise UsageError(f"LOG_DIR={folder}: {log.name} holds no line of a training step")
    return "\n".join(rows)
