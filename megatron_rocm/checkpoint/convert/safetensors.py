"""Safetensors files: a header in JSON, then the bytes of one tensor after the other. Format: its README."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rocm.checkpoint.convert.mapped import Mapped
from megatron_rocm.errors import UsageError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER = 100_000_000  # bytes, as the format's own library has it


class Safetensors:
    """A file's tensors, looked at where they lie."""

    def __init__(self, path: str | Path) -> None:
        """Raises UsageError where it is missing, truncated or no safetensors file."""
        self.file = Mapped(path)
        length = int.from_bytes(self.file.bytes[:8], "little")
        self._begin = 8 + length
        try:
            if not 1 < length <= MOST_HEADER:
                raise ValueError("it has no header")
            if self._begin > self.file.size:
                raise ValueError(f"it ends within its header, after {self.file.size:,} bytes")
            header = json.loads(self.file.bytes[8 : self._begin])
            header.pop("__metadata__", None)
            self._entries: dict[str, dict[str, Any]] = header
            end = self._begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if self.file.size != end:
                raise ValueError(f"it has {self.file.size:,} bytes of {end:,}")
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                if not all(isinstance(size, int) and size >= 0 for size in (start, stop, *entry["shape"])):
                    raise ValueError(f"{name} has shape {entry['shape']} at {start} to {stop}")
                width = DTYPES[entry["dtype"]].itemsize if entry["dtype"] in DTYPES else None
                if start > stop or (width and math.prod(entry["shape"]) * width != stop - start):
                    raise ValueError(f"{name} has {stop - start:,} bytes for shape {entry['shape']}")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UsageError(
                f"{path}: not a safetensors file, damaged or truncated ({error}): copy or download it again"
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def dtype(self, name: str) -> torch.dtype:
        """Raises UsageError for a type that no Llama is trained in, such as a quantised one."""
        said = self._entries[name]["dtype"]
        if said not in DTYPES:
            raise UsageError(
                f"{self.file.path}: {name} is of type {said}; weights of {', '.join(DTYPES)} can be converted"
            )
        return DTYPES[said]

    def tensor(self, name: str) -> Tensor:
        entry = self._entries[name]
        return self.file.tensor(self.dtype(name), tuple(entry["shape"]), self._begin + entry["data_offsets"][0])

    def ahead(self, name: str) -> None:
        start, stop = self._entries[name]["data_offsets"]
        self.file.ahead(self._begin + start, stop - start)


def header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """What stands before the bytes of these tensors, which follow in this order."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
