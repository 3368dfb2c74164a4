"""A Hugging Face folder as the source of a conversion: safetensors, or the older pytorch_model.bin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rocm.checkpoint.convert import archive, huggingface
from megatron_rocm.checkpoint.convert.mapped import Mapped
from megatron_rocm.checkpoint.convert.safetensors import Safetensors
from megatron_rocm.checkpoint.convert.source import DTYPES
from megatron_rocm.checkpoint.convert.table import Weight, without_place
from megatron_rocm.errors import UsageError


class _Bin:
    """A pytorch_model*.bin file, with Safetensors' methods."""

    def __init__(self, path: Path) -> None:
        self.file = Mapped(path)
        self._tensors = archive.read(self.file)
        if not isinstance(self._tensors, dict) or not all(isinstance(one, Tensor) for one in self._tensors.values()):
            raise UsageError(f"{path}: is not a dictionary of tensors, as a file of weights is")

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = self._tensors[name].dtype
        if found not in DTYPES.values():
            raise UsageError(f"{self.file.path}: {name} is of type {found}; {', '.join(DTYPES)} can be converted")
        return found

    def tensor(self, name: str) -> Tensor:
        self.dtype(name)
        found: Tensor = self._tensors[name]
        return found

    def ahead(self, name: str) -> None:
        found = self._tensors[name]
        self.file.ahead(found.data_ptr() - self.file.address, found.nbytes)


TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The file, the index where there are several, and how one is opened: in order of preference.
FORMS = (
    ("model.safetensors", "model.safetensors.index.json", Safetensors),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", _Bin),
)


class FromHuggingFace:
    """A model folder on this machine. A Source."""

    def __init__(self, folder: str | Path) -> None:
        """Opens every file and reads the headers. Raises UsageError for what is missing or damaged."""
        self.folder = Path(folder)
        self._config = huggingface.read_config(self.folder)
        self.model = huggingface.model_of(self._config, self.folder / "config.json")
        self._files = self._open()
        self._refuse_others()

    def _refuse_others(self) -> None:
        """Nothing is left out in silence."""
        names = {name for file in set(self._files.values()) for name in file.names}
        if self.model.tied_embeddings and {TABLE, HEAD} <= self._files.keys():
            names.remove(HEAD)
            if not torch.equal(self._file(HEAD).tensor(HEAD), self._file(TABLE).tensor(TABLE)):
                raise UsageError(
                    f"{self.folder}: {HEAD} is not {TABLE}, and config.json ties them: with "
                    '"tie_word_embeddings": false in it both are converted'
                )
        if others := without_place(names, self.model, "hugging_face"):
            raise UsageError(
                f"{self.folder}: {others}: config.json is of another model, or its weights are more than a Llama's"
            )

    def _open(self) -> dict[str, Any]:
        """The opened files by the names of the tensors in them."""
        for single, index, kind in FORMS:
            if (self.folder / single).is_file():
                file = kind(self.folder / single)
                return dict.fromkeys(file.names, file)
            if (self.folder / index).is_file():
                return self._indexed(self.folder / index, kind)
        raise UsageError(
            f"{self.folder}: no weights here (neither {FORMS[0][0]} nor {FORMS[1][0]}, nor an index of them)"
        )

    def _indexed(self, index: Path, kind: Any) -> dict[str, Any]:
        try:
            places = json.loads(index.read_text())["weight_map"]
            names = sorted(set(places.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{index}: not an index of weights, or damaged ({error})") from error
        if any(Path(name).name != name for name in names):
            raise UsageError(f"{index}: names files outside its folder")
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise UsageError(
                f"{self.folder}: {', '.join(missing)} missing, of the {len(names)} files that {index.name} names: "
                "download again what is missing"
            )
        opened = {name: kind(self.folder / name) for name in names}
        return {tensor: opened[name] for tensor, name in places.items()}

    def _file(self, name: str) -> Any:
        file = self._files.get(name)
        if file is None or name not in file:
            where = f" ({file.file.path.name} should have it)" if file else ""
            raise UsageError(f"{self.folder}: holds no {name}{where}: not of the model that config.json describes")
        return file

    def dtype(self, weight: Weight) -> torch.dtype:
        found = {self._file(name).dtype(name) for name in weight.hugging_face}
        return found.pop() if len(found) == 1 else _mixed(self.folder, weight)

    def tensors(self, weight: Weight) -> dict[str, Tensor]:
        return {name: self._file(name).tensor(name).contiguous() for name in weight.hugging_face}

    def ahead(self, weight: Weight) -> None:
        for name in weight.hugging_face:
            self._file(name).ahead(name)

    def describe(self, folder: Path, tokenizer: str | None, dtype: torch.dtype) -> None:
        huggingface.copy_description(self.folder, folder, self._config, dtype)
        huggingface.copy_tokenizer_files(Path(tokenizer) if tokenizer else self.folder, folder)


def _mixed(folder: Path, weight: Weight) -> torch.dtype:
    raise UsageError(
        f"{folder}: {', '.join(weight.hugging_face)} are of different types, and become one tensor: "
        "--dtype bf16, fp16 or fp32 makes them one"
    )
