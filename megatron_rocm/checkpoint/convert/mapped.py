"""Files whose tensors are looked at where they lie: the file's own pages, which take no memory from others."""

from __future__ import annotations

import math
import mmap
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from megatron_rocm.errors import UsageError


class Mapped:
    """A file in memory, to be read only."""

    def __init__(self, path: str | Path) -> None:
        """Raises UsageError where it is missing, empty or can't be read."""
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  # as long as its tensors
            self.size = os.fstat(self._file.fileno()).st_size
            self.bytes = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise UsageError(f"{self.path}: is empty: copy or download it again") from None
        except OSError as error:
            raise UsageError(f"{self.path}: can't be read ({error.strerror}): copy or download it again") from error

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
        """The contiguous tensor at a byte offset, not to be written to. UsageError where the file is too short."""
        count = math.prod(shape)
        if offset + count * dtype.itemsize > self.size:
            raise UsageError(
                f"{self.path}: is truncated: {self.size:,} bytes, of at least {offset + count * dtype.itemsize:,}. "
                "Copy or download it again"
            )
        if not count:
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has no tensors that can't be written
            return torch.frombuffer(self.bytes, dtype=dtype, count=count, offset=offset).view(shape)

    @property
    def address(self) -> int:
        """Where its first byte is in memory, as `Tensor.data_ptr()` tells it."""
        return self.tensor(torch.uint8, (1,), 0).data_ptr()

    def ahead(self, offset: int, length: int) -> None:
        """Have the system begin to read what will be needed soon."""
        os.posix_fadvise(self._file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)
