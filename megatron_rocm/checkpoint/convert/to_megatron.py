"""Any source → a distributed checkpoint at iteration 0 that training starts from, in any layout. No model is built."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_rocm.checkpoint.convert.destination import new_folder
from megatron_rocm.checkpoint.convert.source import Source, stream
from megatron_rocm.checkpoint.convert.table import Weight, weights
from megatron_rocm.checkpoint.convert.torch_dist_writer import TorchDistWriter
from megatron_rocm.checkpoint.folder import TRACKER, checkpoint_path, set_latest
from megatron_rocm.config.schema import Model
from megatron_rocm.errors import UsageError

DESCRIPTION = "huggingface"  # subfolder of a converted checkpoint: its configuration and tokenizer as they came


def write_checkpoint(
    source: Source,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    tokenizer: str | None = None,
) -> Path:
    """Write `source` as `out`/iter_0000000, named in `out`'s tracker; returns `out`.

    Weights keep their type unless `dtype` says another. Whole tensors, layers stacked, Transformer Engine's names: what
    training loads with any TP, PP, FSDP. Raises UsageError.
    """
    out = Path(out)
    kinds = {weight: dtype or source.dtype(weight) for weight in weights(source.model)}
    size = sum(weight.row.elements(source.model) * kind.itemsize for weight, kind in kinds.items())
    with new_folder(out, size, source=source.folder, overwrite=overwrite, ours=_not_replaced) as partial:
        folder = checkpoint_path(partial, 0)
        (folder / DESCRIPTION).mkdir(parents=True)
        source.describe(folder / DESCRIPTION, tokenizer, next(iter(kinds.values())))
        with TorchDistWriter(folder) as writer:
            for weight, kind in kinds.items():
                _declare(writer, weight, kind, source)
            for weight, tensors in stream(source, dtype):
                _write(writer, weight, tensors, source.model)
            run = {"model": source.model.model_dump(mode="json")}
            writer.finish({"checkpoint_version": 3.0, "iteration": 0, "weights_only": True, "run": run})
        set_latest(partial, 0)
    return out


def _declare(writer: TorchDistWriter, weight: Weight, kind: torch.dtype, source: Source) -> None:
    shape = weight.row.shape(source.model)
    if weight.layer is None:
        writer.tensor(weight.stacked, shape, kind)
    elif weight.layer == 0:
        writer.tensor(weight.stacked, (source.model.num_layers, *shape), kind)
    elif writer.dtype(weight.stacked) != kind:
        raise UsageError(
            f"{source.folder}: {weight.hugging_face[0]} is {kind}, the layers before it "
            f"{writer.dtype(weight.stacked)}, and they become one tensor: --dtype bf16, fp16 or fp32 makes them one"
        )


def _write(writer: TorchDistWriter, weight: Weight, tensors: dict[str, Tensor], model: Model) -> None:
    row = 0
    for part in weight.to_megatron(tensors, model):
        offsets = (row, *[0] * (part.dim() - 1))
        if weight.layer is None:
            writer.part(weight.stacked, offsets, part)
        else:
            writer.part(weight.stacked, (weight.layer, *offsets), part.unsqueeze(0))
        row += len(part)


def _not_replaced(out: Path) -> str:
    tracker = out / TRACKER
    if not tracker.is_file() or tracker.read_text().strip() != "0":
        return f"not a converted checkpoint (no {TRACKER} with iteration 0)"
    if more := [path.name for path in out.glob("iter_*") if path.name != checkpoint_path(out, 0).name]:
        return f"a run's, with {', '.join(sorted(more))}"
    if not (checkpoint_path(out, 0) / DESCRIPTION).is_dir():
        return "a run's"
    more = sorted({path.name for path in out.iterdir()} - {TRACKER, checkpoint_path(out, 0).name})
    return f"more than a converted checkpoint, with {', '.join(more)}" if more else ""
