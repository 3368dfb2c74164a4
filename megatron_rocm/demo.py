"""`megatron-rocm demo`: from text to a Llama that writes a few lines, on any machine, with the commands people use.

Every stage leaves what it made in runs/demo and goes on from what it finds there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import megatron_rocm
from megatron_rocm.errors import UsageError
from megatron_rocm.launch.preflight import free_port
from megatron_rocm.platform.process import PARENT

FOLDER = Path("runs/demo")
PREFIX = FOLDER / "data" / "data_text_document"
CHECKPOINTS = FOLDER / "checkpoints"
EXPORT = FOLDER / "huggingface"
METRICS = FOLDER / "metrics.jsonl"
DONE = FOLDER / "demo.json"
SCRIPTS = Path(megatron_rocm.__file__).resolve().parents[1] / "examples" / "llama"

PREPARE = {"DATASET": "local", "TOKENIZER_MODEL": "train:4096", "DATA_DIR": str(FOLDER / "data")}
# 819,200 tokens: about four minutes on two cores.
TRAIN = {
    "MODEL_SIZE": "tiny",
    "GPUS_PER_NODE": "1",
    "MBS": "8",
    "BS": "16",
    "TOTAL_ITERS": "200",
    "LR": "2e-3",
    "LR_WARMUP_ITERS": "10",
    "SPLIT": "95,5,0",
    "EVAL_INTERVAL": "50",
    "EVAL_ITERS": "4",
    "SAVE_INTERVAL": "50",
    "LOG_INTERVAL": "10",
    "DATA_PATH": str(PREFIX),
    "SAVE_CKPT_PATH": str(CHECKPOINTS),
    "LOG_DIR": str(FOLDER),
}
PLACES = ("DATA_PATH", "SAVE_CKPT_PATH", "LOG_DIR")
LEARNED = 0.6  # what must at most be left of the first validation loss
HELP = """megatron-rocm demo [KEY=VALUE …]

Makes data of this machine's Python sources, trains MODEL_SIZE=tiny on it, exports the model to Hugging Face, compares
the two models' logits and lets it write a few lines. All of it is in runs/demo; called again, it goes on from there.
KEY=VALUE is handed on to the training: TOTAL_ITERS=2000 learns more."""


def main(arguments: Sequence[str]) -> int:
    """Run the stages that are not done. 0 when all are or when stopped as asked, else the failed one's status."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0
    if wrong := [word for word in arguments if "=" not in word]:
        raise UsageError(f"demo {wrong[0]}: only KEY=VALUE pairs for the training")
    if kept := [word for word in arguments if word.split("=")[0] in PLACES]:
        raise UsageError(f"demo {kept[0]}: the demo keeps to {FOLDER}; for another place use the examples' scripts")
    asked = {**TRAIN, **dict(word.split("=", 1) for word in arguments)}
    done = _json(DONE)
    if done.get("asked") == asked and isinstance(done.get("lines"), list):
        print(_summary(done["lines"]))
        print(f"\nAll of it was done before; to start anew, remove {FOLDER}")
        return 0
    began = time.monotonic()
    _stage(1, "data", "prepare_dataset.sh")
    if status := _script("prepare", "prepare_dataset.sh", PREPARE):
        return status
    _stage(2, "training", "train_llama3.sh")
    if status := _script("train", "train_llama3.sh", {"MASTER_PORT": str(free_port()), **asked}):
        return status
    if _json(FOLDER / "status.json").get("outcome") != "finished":
        print("\nstopped; the demo goes on from here when it is started again")
        return 0
    _stage(3, "export to Hugging Face, and the same tokens through both models", "megatron-rocm convert")
    from megatron_rocm.checkpoint.convert import command

    if status := command.main(["megatron-to-hf", str(CHECKPOINTS), str(EXPORT), "--overwrite", "--verify"]):
        return status
    _stage(4, "writing", "transformers")
    from megatron_rocm.checkpoint.convert.generate import generate

    lines = generate(EXPORT)
    print(_summary(lines))
    print(f"  time            {time.monotonic() - began:.0f} s")
    losses = _validation()
    if asked == TRAIN and losses and losses[-1] >= LEARNED * losses[0]:
        print(f"demo: the validation loss should have fallen below {LEARNED:.0%} of its start", file=sys.stderr)
        return 1
    DONE.write_text(json.dumps({"asked": asked, "lines": lines}, indent=1) + "\n")
    return 0


def _stage(number: int, what: str, how: str) -> None:
    print(f"\n== {number}/4 {what} ({how})", flush=True)


def _script(command: str, script: str, pairs: dict[str, str]) -> int:
    """Run one of the example scripts, or its command where the package is installed without them."""
    path = SCRIPTS / script
    family = ["--family", "llama3"] if command == "train" else []
    words = ["bash", str(path)] if path.is_file() else [sys.executable, "-m", "megatron_rocm.cli", command, *family]
    environment = {**os.environ, PARENT: str(os.getpid())}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    child = subprocess.Popen([*words, *(f"{name}={value}" for name, value in pairs.items())], env=environment)

    def hand_on(number: int, frame: FrameType | None) -> None:
        if child.returncode is None:
            os.kill(child.pid, signal.SIGTERM)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    status = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return 128 - status if status < 0 else status


def _summary(lines: Sequence[str]) -> str:
    losses = _validation()
    validation = f"not in {METRICS}"
    if losses:
        validation = f"{losses[0]:.3f} → {losses[-1]:.3f} ({losses[-1] / losses[0]:.0%} of the start)"
    written = "\n".join(f"  > {line!r}" for line in lines)
    return (
        f"\n{written}\n\n"
        f"  validation loss {validation}\n"
        f"  loss curve      {FOLDER / 'loss.png'}\n"
        f"  log, numbers    {FOLDER / 'output_perf.log'}, {METRICS}\n"
        f"  checkpoints     {CHECKPOINTS}\n"
        f"  Hugging Face    {EXPORT}"
    )


def _validation() -> list[float]:
    """The run's validation losses; empty where there are none, or the file has been removed."""
    if not METRICS.is_file():
        return []
    rows = [json.loads(line) for line in METRICS.read_text().splitlines()]
    return [row["validation_loss"] for row in rows if "validation_loss" in row]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
