"""What is in a checkpoint folder, and in what two differ. No model is built."""

from __future__ import annotations

import io
import math
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rocm.checkpoint import megatron_lm
from megatron_rocm.checkpoint.convert.torch_dist import TorchDist
from megatron_rocm.checkpoint.keys import STATE
from megatron_rocm.checkpoint.unpickle import read_common, read_metadata
from megatron_rocm.config.changes import changes
from megatron_rocm.errors import UsageError

# Of the saved configuration: what is shown of each section, by the names of its fields.
SHOWN = {
    "model": ("title", "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "vocab_size"),
    "parallel": ("world_size", "tp", "pp", "vpp", "cp", "dp", "fsdp", "megatron_fsdp", "distributed_optimizer"),
    "precision": ("dtype",),
    "training": ("global_batch_size", "seq_length", "train_iters", "seed"),
    "optimizer": ("name", "lr", "lr_decay_iters"),
    "data": ("blend", "train_blend", "tokenizer_model"),
}


def contents(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, as JSON can have it. Raises UsageError where it can't be read."""
    common = megatron_lm.with_position(read_common(path), path)
    tensors = tensors_in(path)
    weights = {key: value for key, value in tensors.items() if not key.startswith(STATE)}
    kinds = sorted({key.removeprefix(STATE).partition(".")[0] for key in tensors if key.startswith(STATE)})
    return {
        "saved_by": _saved_by(common),
        "iteration": common.get("iteration"),
        "consumed_samples": common["consumed_train_samples"],
        "weights_only": bool(common["weights_only"]),
        "parameters": sum(math.prod(shape) for shape, _ in weights.values()),
        "dtypes": dict(Counter(dtype for _, dtype in weights.values())),
        "optimizer": kinds or sorted(key for key in ("optimizer",) if key in common),
        "configuration": configuration(common, path),
        "tensors": {key: {"shape": shape, "dtype": dtype} for key, (shape, dtype) in tensors.items()},
    }


def _saved_by(common: Mapping[str, Any]) -> str:
    if isinstance(common.get("run"), dict):
        return "megatron-rocm"
    return "Megatron-LM" if isinstance(common.get("args"), Namespace) else "another program"


def configuration(common: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The configuration of the run that saved it, as far as it is told."""
    if isinstance(common.get("run"), dict):
        return dict(common["run"])
    args = common.get("args")
    return megatron_lm.configuration(args, path) if isinstance(args, Namespace) else {}


def tensors_in(path: Path) -> dict[str, tuple[list[int], str]]:
    """Every tensor's shape and type, by its key."""
    entries = read_metadata(path).state_dict_metadata.items()
    return {
        key: (list(entry.size), str(entry.properties.dtype).removeprefix("torch."))
        for key, entry in sorted(entries)
        if isinstance(entry, TensorStorageMetadata)
    }


def shown(path: Path | str, found: Mapping[str, Any], *, tensors: bool) -> list[str]:
    """`contents` for people."""
    dtypes = ", ".join(f"{count} tensors {dtype}" for dtype, count in found["dtypes"].items())
    kind = "weights alone" if found["weights_only"] else f"iteration {found['iteration']:,}"
    rows = {
        "saved by": found["saved_by"],
        "position": f"{kind}, {found['consumed_samples']:,} samples consumed",
        "weights": f"{found['parameters']:,} parameters, padding included; {dtypes}",
        "optimizer's": ", ".join(found["optimizer"]) or "none",
    }
    for section, fields in SHOWN.items():
        there = found["configuration"].get(section, {})
        if told := [f"{field} {there[field]}" for field in fields if there.get(field) is not None]:
            rows[section] = ", ".join(told)
    lines = [str(path), *(f"  {name:<11} {value}" for name, value in rows.items())]
    if tensors:
        lines += [f"  {key}  {entry['dtype']} {entry['shape']}" for key, entry in found["tensors"].items()]
    return lines


def differences(a: Path, b: Path, *, values: bool) -> dict[str, list[str]]:
    """In what `b` differs from `a`, by kind, a line each."""
    common = [megatron_lm.with_position(read_common(path), path) for path in (a, b)]
    there, here = (configuration(of, path) for of, path in zip(common, (a, b), strict=True))
    tensors_a, tensors_b = tensors_in(a), tensors_in(b)
    both = [key for key in tensors_a if key in tensors_b]
    same = [key for key in both if tensors_a[key][0] == tensors_b[key][0]]
    return {
        "settings": [f"{change}: {change.row.verdict}" for change in changes(there, here)],
        "position": [
            f"{name} {common[0].get(name)} → {common[1].get(name)}"
            for name in ("iteration", "consumed_train_samples", "weights_only")
            if common[0].get(name) != common[1].get(name)
        ],
        "only in A": [key for key in tensors_a if key not in tensors_b],
        "only in B": [key for key in tensors_b if key not in tensors_a],
        "shapes and types": [
            f"{key} {tensors_a[key]} → {tensors_b[key]}" for key in both if tensors_a[key] != tensors_b[key]
        ],
        "values": _values(a, b, same) if values else [],
    }


def _values(a: Path, b: Path, keys: list[str]) -> list[str]:
    """The largest difference in each tensor that differs; one layer of a stack is in memory at a time."""
    one, other = TorchDist(a), TorchDist(b)
    lines = []
    for key in keys:
        stacked = "layers." in key and not any(part.isdigit() for part in key.split("."))
        layers = range(one.layers(key)) if stacked else (None,)
        most = 0.0
        for layer in layers:
            left, right = one.whole(key, layer).double(), other.whole(key, layer).double()
            most = max(most, float((left - right).abs().max()) if left.numel() else 0.0)
        if most or math.isnan(most):
            lines.append(f"{key} by up to {most:.3g}")
    return lines


def told(a: Path, b: Path, found: Mapping[str, list[str]]) -> list[str]:
    """`differences` for people."""
    lines = [f"A {a}", f"B {b}"]
    for kind, of in found.items():
        lines += [f"{kind}:", *(f"  {line}" for line in of)] if of else []
    return lines if any(found.values()) else [*lines, "no difference"]


def structural_faults(path: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint that has no manifest: parts that its files lack, or whose own checksums differ.

    Every byte of `common.pt` and of the tensors is read, or with `share` (k, n) of every nth part from the k-th on.
    """
    places: list[tuple[str, str, int, int | None]] = [("it", "common.pt", 0, None)]
    try:
        read_common(path)
        stored = read_metadata(path).storage_data
    except UsageError as error:
        return [str(error)]
    places += [(index.fqn, place.relative_path, place.offset, place.length) for index, place in stored.items()]
    found = []
    for what, name, offset, length in places[share[0] :: share[1]]:
        file = path / name
        try:
            with file.open("rb") as opened:
                opened.seek(offset)
                part = opened.read(length)
            if length is not None and len(part) != length:
                found.append(f"{file.name} ends within {what}")
            elif damaged := zipfile.ZipFile(io.BytesIO(part)).testzip():
                found.append(f"{file.name}: {what} is not as it was written: the checksum of {damaged} differs")
        except FileNotFoundError:
            found.append(f"{file.name} is missing")
        except Exception as error:  # a damaged archive raises anything
            found.append(f"{file.name}: {what} can't be read: {error}")
    return sorted(set(found))
