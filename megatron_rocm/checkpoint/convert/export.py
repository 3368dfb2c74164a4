"""A run's checkpoint → a Hugging Face folder that transformers, vLLM and others load. No model is built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_rocm.checkpoint.convert.huggingface import copy_tokenizer, generation_config, llama_config
from megatron_rocm.checkpoint.convert.table import Weight, weights
from megatron_rocm.checkpoint.convert.torch_dist import TorchDist
from megatron_rocm.checkpoint.folder import TRACKER, WHOLE, checkpoint_path, latest
from megatron_rocm.config.schema import Model, RunConfig
from megatron_rocm.errors import UsageError

MAX_SHARD_BYTES = 5 * 10**9
NO_LAUNCH = {"master_port": 1, "log_dir": ""}  # a checkpoint does not say from where it was launched


def iteration_folder(checkpoint_dir: str | Path, iteration: int | None = None) -> Path:
    """The `iter_…` folder of an iteration, the latest by default; such a folder itself is taken as it is.

    Raises UsageError, naming the iterations that are there.
    """
    root = Path(checkpoint_dir)
    if iteration is None and (root / WHOLE).is_file():
        return root
    if iteration is None and (path := latest(root)):
        return path
    there = ", ".join(sorted(path.name for path in root.glob("iter_*") if (path / WHOLE).is_file()))
    if not there:
        raise UsageError(f"{root}: no checkpoint here; give the SAVE_CKPT_PATH of a run, which holds iter_… folders")
    if iteration is None:
        raise UsageError(f"{root}: has no {TRACKER}; choose one of {there} with --iteration")
    path = checkpoint_path(root, iteration)
    if not (path / WHOLE).is_file():
        raise UsageError(f"{root}: no checkpoint of iteration {iteration}; there is {there}")
    return path


def run_config(folder: Path) -> RunConfig:
    """The configuration stored in an `iter_…` folder. Raises UsageError where there is none of ours."""
    path = folder / "common.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)["run"]
        return RunConfig.model_validate({**saved, "launch": NO_LAUNCH})
    except Exception as error:  # a damaged archive raises anything
        raise UsageError(
            f"{path}: does not hold the configuration of a run of megatron-rocm ({type(error).__name__}: {error})"
        ) from error


def export(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    iteration: int | None = None,
    overwrite: bool = False,
    tokenizer: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the weights of a checkpoint, its configuration and tokenizer as a Hugging Face folder; returns it.

    Weights keep the type they were trained in (with BF16, the BF16 copy). Memory is that of one shard. The folder
    appears whole or not at all. `tokenizer` names the run's tokenizer where it has moved.
    Raises UsageError for a bad source, and for an existing destination unless it is empty or to be overwritten.
    """
    source, out = iteration_folder(checkpoint_dir, iteration), Path(out_dir).absolute()
    _refuse(out, overwrite)
    run, checkpoint = run_config(source), TorchDist(source)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        bos = copy_tokenizer(run, tokenizer, partial)
        dtype = str(checkpoint.dtype(next(weights(run.model)))).removeprefix("torch.")
        config = llama_config(run.model, dtype=dtype, bos=bos, eos=run.data.eod)
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", generation_config(bos, run.data.eod))
        _write_weights(checkpoint, run.model, partial, max_shard_bytes)
        _put_in_place(partial, out)
    except OSError as error:
        raise UsageError(f"{out}: can't be written ({error}); choose another folder or make room") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _refuse(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{out} exists and is not empty: choose another folder, or replace it with --overwrite")
    if not (out / "config.json").is_file():
        raise UsageError(f"{out} is not a Hugging Face folder (no config.json): --overwrite replaces no other")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_weights(checkpoint: TorchDist, model: Model, folder: Path, max_shard_bytes: int) -> None:
    """Safetensors of at most `max_shard_bytes` (or one tensor), named and indexed as transformers does it."""
    shards = list(_plan(checkpoint, model, max_shard_bytes))
    last = len(shards)
    names = [f"model-{i + 1:05d}-of-{last:05d}.safetensors" for i in range(last)] if last > 1 else ["model.safetensors"]
    index: dict[str, str] = {}
    total = 0
    for name, shard in zip(names, shards, strict=True):
        tensors: dict[str, Tensor] = {}
        for weight in shard:
            tensors.update(_convert(checkpoint, weight, model))
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if last > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _plan(checkpoint: TorchDist, model: Model, max_shard_bytes: int) -> Iterator[list[Weight]]:
    shard: list[Weight] = []
    filled = 0
    for weight in weights(model):
        size = weight.row.elements(model) * checkpoint.dtype(weight).itemsize
        if shard and filled + size > max_shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(weight)
        filled += size
    yield shard


def _convert(checkpoint: TorchDist, weight: Weight, model: Model) -> dict[str, Tensor]:
    try:
        return weight.to_hugging_face(checkpoint.read(weight), model)
    except ValueError as error:
        raise UsageError(f"{checkpoint.folder}: {error}: not of the model it is said to be of") from error


def _put_in_place(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    partial.rename(out)
    shutil.rmtree(old)
