"""Meta's own release as the source of a conversion: params.json and consolidated.*.pth, one file a parallel rank.

Sources: llama/model.py of Meta's llama and llama-models repositories.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rocm.checkpoint.convert import archive, huggingface
from megatron_rocm.checkpoint.convert.mapped import Mapped
from megatron_rocm.checkpoint.convert.source import DTYPES
from megatron_rocm.checkpoint.convert.table import Weight, weights, without_place
from megatron_rocm.config.presets import PRESETS
from megatron_rocm.config.schema import Model
from megatron_rocm.data.spm import read_model
from megatron_rocm.errors import UsageError

PARAMS, SHARDS, TOKENIZER = "params.json", "consolidated.*.pth", "tokenizer.model"
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"

# Positions by the rotary base, where the shape is not a published one: params.json does not say.
POSITIONS = {10_000: 4096, 1_000_000: 16384, 500_000: 8192}
SCALED_POSITIONS = 131_072
# Of the texts' beginning and end, by family; what the tokenizer says comes first.
IDS = {"llama2": (1, 2), "llama3": (128_000, 128_001)}


class FromMeta:
    """A folder of Meta's. A Source."""

    def __init__(self, folder: str | Path) -> None:
        """Opens every shard and reads the directory in it. Raises UsageError for what is missing or damaged."""
        self.folder = Path(folder)
        self._params = read_params(self.folder)
        paths = sorted(self.folder.glob(SHARDS))
        if [path.name for path in paths] != [SHARDS.replace("*", f"{n:02d}") for n in range(len(paths))] or not paths:
            there = ", ".join(path.name for path in paths) or "none"
            raise UsageError(f"{self.folder}: consolidated.00.pth and those after it should be here; there is {there}")
        self._shards = [_shard(path) for path in paths]
        self.model = self._model()
        self._require_all_shards()
        names = {name for shard in self._shards for name in shard} - {OUTPUT}  # Llama 3.2's has the table twice
        if others := without_place(names, self.model, "meta"):
            raise UsageError(f"{self.folder}: {others}: {PARAMS} is of another model")

    def _model(self) -> Model:
        """params.json leaves out the size of the feed forward layers, the vocabulary and the range of positions."""
        params = self._params
        try:
            dim, heads = params["dim"], params["n_heads"]
            factor = None
            if params.get("use_scaled_rope"):
                factor = float(params.get("rope_scale_factor", 8.0))
            base = huggingface.whole_base(params.get("rope_theta", 10_000))
            shape = {
                "num_layers": params["n_layers"],
                "hidden_size": dim,
                "ffn_hidden_size": self._rows("layers.0.feed_forward.w1.weight"),
                "num_attention_heads": heads,
                "num_query_groups": params.get("n_kv_heads") or heads,
                "kv_channels": params.get("head_dim") or dim // heads,
                "vocab_size": self._rows(OUTPUT) if self._has(OUTPUT) else self._vocabulary(dim),
                "max_position_embeddings": SCALED_POSITIONS if factor else POSITIONS.get(base, 4096),
                "rotary_base": base,
                "rope_scaling_factor": factor,
                "tied_embeddings": not self._has(OUTPUT),
                "norm_eps": params["norm_eps"],
            }
            return published(shape)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            why = huggingface.reason(error)
            raise UsageError(f"{self.folder / PARAMS}: does not describe a Llama ({why})") from error

    def _require_all_shards(self) -> None:
        """Two shards of four would look like a model of half the size but for what is cut by its other dimension."""
        first = next(weight for weight in weights(self.model) if weight.meta == ("layers.0.attention.wo.weight",))
        (found,), (expected,) = self._shapes(first), first.hugging_face_shapes(self.model).values()
        if len(found) != 2 or found[1] * len(self._shards) != expected[1]:
            raise UsageError(
                f"{self.folder}: a consolidated.*.pth is missing, or not of this model: {len(self._shards)} are here, "
                f"and with attention.wo.weight of {found} each, a model of dim {expected[1]} has "
                f"{expected[1] // max(1, found[-1])}"
            )

    def _has(self, name: str) -> bool:
        return name in self._shards[0]

    def _one(self, name: str, shard: int = 0) -> Tensor:
        try:
            return self._shards[shard][name]
        except KeyError:
            raise UsageError(f"{self.folder}: consolidated.{shard:02d}.pth holds no {name}") from None

    def _rows(self, name: str) -> int:
        """Of all shards, for what is cut by its rows."""
        return sum(self._one(name, shard).shape[0] for shard in range(len(self._shards)))

    def _vocabulary(self, dim: int) -> int:
        """Llama 3's table is cut by its rows, Llama 2's by its columns."""
        rows, columns = self._one(EMBEDDING).shape
        return rows * len(self._shards) if columns == dim else rows

    def _shapes(self, weight: Weight) -> list[tuple[int, ...]]:
        return [tuple(self._one(name).shape) for name in weight.meta]

    def dtype(self, weight: Weight) -> torch.dtype:
        found = {self._one(name, shard).dtype for name in weight.meta for shard in range(len(self._shards))}
        if len(found) > 1 or not found <= set(DTYPES.values()):
            raise UsageError(
                f"{self.folder}: {', '.join(weight.meta)} are of type {', '.join(map(str, found))}; one of "
                f"{', '.join(DTYPES)} can be converted"
            )
        return found.pop()

    def tensors(self, weight: Weight) -> dict[str, Tensor]:
        self.dtype(weight)
        shapes = weight.hugging_face_shapes(self.model).values()
        whole = [self._whole(name, shape) for name, shape in zip(weight.meta, shapes, strict=True)]
        return {name: tensor.contiguous() for name, tensor in weight.from_meta(whole, self.model).items()}

    def _whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Put the shards' parts together: the dimension that they cut is the one they are short of."""
        parts = [self._one(name, shard) for shard in range(len(self._shards))]
        if tuple(parts[0].shape) == shape:  # on every rank the same
            return parts[0]
        alike = all(part.dim() == len(shape) for part in parts)
        for dimension in range(len(shape)) if alike else ():
            whole = list(parts[0].shape)
            whole[dimension] = sum(part.shape[dimension] for part in parts)
            others = {tuple(part.shape[:dimension] + part.shape[dimension + 1 :]) for part in parts}
            if tuple(whole) == shape and len(others) == 1:
                return torch.cat(parts, dimension)
        raise UsageError(
            f"{self.folder}: {name} has shape {tuple(parts[0].shape)} in each of {len(parts)} files, which does not "
            f"make {shape}: {PARAMS} is of another model"
        )

    def ahead(self, weight: Weight) -> None:
        for name in weight.meta:
            for shard in self._shards:
                shard.ahead(name)

    def describe(self, folder: Path, tokenizer: str | None, dtype: torch.dtype) -> None:
        bos, eos = IDS[self.model.family]
        config = huggingface.llama_config(self.model, dtype=str(dtype).removeprefix("torch."), bos=bos, eos=eos)
        huggingface.write_json(folder / huggingface.CONFIG, config)
        huggingface.write_json(folder / huggingface.GENERATION, huggingface.generation_config(bos, eos))
        if tokenizer:
            huggingface.copy_tokenizer_files(Path(tokenizer), folder)
            return
        # Llama 2 and Code Llama; in Meta's layout also beside the folders of the sizes. Llama 3's is tiktoken's format.
        for place in (self.folder, self.folder.parent):
            if (place / TOKENIZER).is_file() and _sentencepiece(place / TOKENIZER):
                shutil.copyfile(place / TOKENIZER, folder / TOKENIZER)
                huggingface.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
                return


class _Shard(dict[str, Tensor]):
    """The tensors of one file, and where they lie."""

    def __init__(self, file: Mapped, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self._file = file

    def ahead(self, name: str) -> None:
        if name in self:
            start = self[name].data_ptr() - self._file.address
            self._file.ahead(start, self[name].nbytes)


def _shard(path: Path) -> _Shard:
    file = Mapped(path)
    tensors = archive.read(file)
    if not isinstance(tensors, dict) or not all(isinstance(one, Tensor) for one in tensors.values()):
        raise UsageError(f"{path}: is not a dictionary of tensors, as Meta's weights are")
    return _Shard(file, tensors)


def read_params(folder: Path) -> dict[str, Any]:
    """A folder's params.json. Raises UsageError."""
    path = folder / PARAMS
    try:
        params = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{folder}: no model of Meta's here (no {PARAMS}); name the folder of one size") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: can't be read ({error})") from error
    if not isinstance(params, dict):
        raise UsageError(f"{path}: is not the description of a model")
    return params


def published(shape: dict[str, Any]) -> Model:
    """The Model of a shape; what params.json leaves open is as published where the shape is a published one.

    Meta's files of Llama 3.2 have the table twice and don't tell its RoPE factor, 32.
    """
    for preset in PRESETS.values():
        same = all(getattr(preset, key) == shape[key] for key in (*huggingface.SHAPE, "vocab_size"))
        if same and (preset.rope_scaling_factor is None) == (shape["rope_scaling_factor"] is None):
            shape = {
                **shape,
                "rope_scaling_factor": preset.rope_scaling_factor,
                "tied_embeddings": preset.tied_embeddings,
                "max_position_embeddings": preset.max_position_embeddings,
            }
    return huggingface.with_names(shape)


def _sentencepiece(path: Path) -> bool:
    try:
        read_model(path.read_bytes(), str(path))
    except UsageError:  # of another format
        return False
    return True
