#!/usr/bin/env python3
"""Conversion of a Hugging Face model to a checkpoint and back, against `cp` of the same files on the same disk.

    python benchmarks/convert.py --small     # Llama 3.2 1B's shape, 2.5 GB
    python benchmarks/convert.py             # Llama 3.1 8B's shape, 16 GB; needs four times that on the disk

The model has random weights, made here in BF16. Every timing begins with the files' pages out of the cache and ends
where the command returns: a conversion has everything on disk then, `cp` has not, so that `cp` followed by a sync
of its files is timed too. The order of the commands changes from round to round; the table has the medians. Memory is
the largest anonymous resident memory of the process (RssAnon), sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_rocm.checkpoint.convert.huggingface import llama_config, with_names, write_json
from megatron_rocm.checkpoint.convert.safetensors import header
from megatron_rocm.checkpoint.convert.stream import Stream
from megatron_rocm.checkpoint.convert.table import weights
from megatron_rocm.config.presets import PRESETS
from megatron_rocm.config.schema import Model

FILES = 4  # as the hub has Llama 3.1 8B
POOL = 64 << 20  # random bytes that are written again and again: no compressing disk, no zeros
SAMPLE = 0.02  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="2.5 GB instead of 16")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to use (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each command (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="convert-") as name:
        root = Path(name)
        model = published("1" if args.small else "8")
        size = make(model, root / "hf")
        print(f"{model.title}, BF16, {size / 1e9:.1f} GB in {FILES} files; {os.cpu_count()} cores")
        run(root, args.rounds, size)
    return 0


def published(size: str) -> Model:
    preset = PRESETS["llama3", size]
    names = set(Model.model_fields) - {"family", "size", "title", "padded_vocab_size", "rope_scaling", "kv_channels"}
    shape = {name: getattr(preset, name) for name in names if hasattr(preset, name)}
    return with_names({**shape, "kv_channels": preset.head_size})


def make(model: Model, folder: Path) -> int:
    """A Hugging Face folder with random weights. Its size in bytes."""
    folder.mkdir()
    write_json(folder / "config.json", llama_config(model, dtype="bfloat16", bos=0, eos=1))
    shapes = {name: shape for weight in weights(model) for name, shape in weight.hugging_face_shapes(model).items()}
    pool = torch.randn(POOL // 2, generator=torch.Generator().manual_seed(1)).mul(0.02).bfloat16()
    each, places, total = -(-len(shapes) // FILES), {}, 0
    for number in range(FILES):
        name = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        part = dict(list(shapes.items())[number * each : (number + 1) * each])
        with Stream(folder / name, hashed=False) as file:
            file.write(header({key: (torch.bfloat16, shape) for key, shape in part.items()}))
            for key, shape in part.items():
                left = torch.Size(shape).numel()
                while left:
                    file.write(pool[:left])
                    left -= min(left, len(pool))
                places[key] = name
        total += file.size
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    return total


def run(root: Path, rounds: int, size: int) -> None:
    convert = [sys.executable, "-m", "megatron_rocm.cli", "convert", "--no-verify"]
    hf, megatron, out = root / "hf", root / "megatron", root / "out"
    subprocess.run([*convert, "hf-to-megatron", hf, megatron], check=True, stdout=subprocess.DEVNULL)
    commands: dict[str, tuple[Path, Callable[[], float]]] = {
        "cp --reflink=never": (hf, lambda: timed(["cp", "-r", "--reflink=never", str(hf), str(out)])),
        "cp --reflink=never, then sync": (hf, lambda: copied_and_synced(hf, out)),
        "convert hf-to-megatron": (hf, lambda: timed([*convert, "hf-to-megatron", str(hf), str(out)])),
        "convert megatron-to-hf": (megatron, lambda: timed([*convert, "megatron-to-hf", str(megatron), str(out)])),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, int] = dict.fromkeys(commands, 0)
    for number in range(rounds):
        order = list(commands)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            source, command = commands[name]
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            forget(source)
            seconds[name].append(command())
            peaks[name] = max(peaks[name], timed.peak)  # type: ignore[attr-defined]
    copy = statistics.median(seconds["cp --reflink=never"])
    synced = statistics.median(seconds["cp --reflink=never, then sync"])
    print("\n| command | seconds (median; all) | GB/s | × cp | × cp, then sync | anonymous memory |")
    print("|---|---|---|---|---|---|")
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        every = ", ".join(f"{one:.1f}" for one in taken)
        print(
            f"| {name} | {middle:.1f} ({every}) | {size / middle / 1e9:.2f} | {middle / copy:.2f} | "
            f"{middle / synced:.2f} | {peaks[name] / 1e9:.2f} GB |"
        )


def timed(command: list[str]) -> float:
    """Seconds of a command; its peak of anonymous memory, in bytes, is `timed.peak`."""
    timed.peak = 0  # type: ignore[attr-defined]
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        timed.peak = max(timed.peak, anonymous(child.pid))  # type: ignore[attr-defined]
        time.sleep(SAMPLE)
    if child.returncode:
        raise SystemExit(f"{command} ended with status {child.returncode}")
    return time.monotonic() - began


def anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def copied_and_synced(source: Path, out: Path) -> float:
    began = time.monotonic()
    timed(["cp", "-r", "--reflink=never", str(source), str(out)])
    subprocess.run(["sync", *out.iterdir()], check=True)
    return time.monotonic() - began


def forget(folder: Path) -> None:
    """Take the files' pages out of the cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


if __name__ == "__main__":
    sys.exit(main())
