"""Reads the .npy files of packed sequences that NeMo's and MLPerf's tools write, without running what is in them.

Such a file is a pickle: a row of dicts with `input_ids`, `loss_mask` and `seq_start_id`, each a list or an array.
numpy.load would need allow_pickle=True, which lets a file from elsewhere execute anything. Here not even numpy's own
constructors are called: the five names that such a pickle needs stand for the small classes below.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_rocm.errors import UsageError

NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
FIELDS = ("input_ids", "loss_mask", "seq_start_id")


class Row(NamedTuple):
    """One packed sequence: ids (int64), mask (bool, of the same length), and where its examples begin (int64)."""

    ids: np.ndarray
    mask: np.ndarray
    starts: np.ndarray


class _Dtype:
    """numpy.dtype as far as plain numbers and objects need it."""

    def __init__(self, name: Any, align: Any = False, copy: Any = False) -> None:
        self.name = str(name)
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        order, subtype, names, fields = state[1:5]
        if order not in ("<", ">", "|", "=") or (subtype, names, fields) != (None, None, None):
            raise pickle.UnpicklingError("an array of it is not of plain numbers")
        self.order = order

    def numbers(self) -> np.dtype:
        if self.name not in NUMBERS:
            raise pickle.UnpicklingError(f"an array of it is of {self.name!r}, not of plain numbers")
        return np.dtype(self.order.replace("|", "=") + self.name)


class _Array:
    """numpy.ndarray with one dimension: `values` is a list of objects or an array of numbers."""

    values: Any = ()

    def __setstate__(self, state: Any) -> None:
        shape, dtype, _, data = state[-4:]
        if dtype.name == "O8":
            self.values = list(data)
        else:
            self.values = np.frombuffer(data, dtype.numbers())
        if len(shape) != 1 or math.prod(shape) != len(self.values):
            raise pickle.UnpicklingError(f"an array of it has the shape {shape}, one dimension was expected")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, data: bytes) -> int | float:
    return np.frombuffer(data, dtype.numbers())[0].item()


def _frombuffer(data: Any, dtype: _Dtype, shape: Any, _: Any) -> _Array:
    array = _Array()
    array.__setstate__((shape, dtype, False, bytes(data)))
    return array


ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    # numpy 1 and 2 name their modules differently.
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which packed sequences never need") from None


def rows(path: str | Path, key: str = "--input") -> Iterator[Row]:
    """The packed sequences of a file, in order.

    Raises UsageError, naming `key`, for a file that is anything else; nothing that it names is called then.
    """
    for number, row in enumerate(_load(path, key)):
        try:
            yield _row(row)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            why = f"it has no `{error.args[0]}`" if isinstance(error, KeyError) else str(error)
            raise UsageError(f"{key}={path}: row {number:,}: {why}. Get or make the file again") from None


def _load(path: str | Path, key: str) -> list[Any]:
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            shape, _, dtype = read_header[version](file)
            if dtype.kind != "O" or len(shape) != 1:
                raise ValueError(f"it holds an array of {dtype} of shape {shape}, not a row of dicts")
            read = _Unpickler(file).load()
        values = read.values if isinstance(read, _Array) else None
        if not isinstance(values, list) or len(values) != shape[0]:
            raise ValueError("it holds something else than its head announces")
        return values
    except OSError as error:
        raise UsageError(f"{key}={path}: can't be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle raises anything
        raise UsageError(
            f"{key}={path}: not a .npy file of packed sequences, or damaged: {error}. Get or make the file again"
        ) from None


def _row(row: Any) -> Row:
    if not isinstance(row, dict):
        raise TypeError(f"it is a {type(row).__name__}, not a dict with {', '.join(FIELDS)}")
    ids, mask, starts = (_numbers(row[name], name) for name in FIELDS)
    if len(ids) != len(mask):
        raise ValueError(f"{len(ids):,} input_ids and {len(mask):,} in loss_mask")
    if not len(ids) or not len(starts) or starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= len(ids):
        raise ValueError(f"seq_start_id does not begin with 0 and rise up to below the {len(ids):,} input_ids")
    if ids.dtype.kind == "f" or starts.dtype.kind == "f":
        raise ValueError("input_ids or seq_start_id are not whole numbers")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("loss_mask has other values than 0 and 1")
    return Row(ids.astype(np.int64), mask.astype(bool), starts.astype(np.int64))


def _numbers(value: Any, name: str) -> np.ndarray:
    if isinstance(value, (_Array, list, tuple)):
        array = np.asarray(value.values if isinstance(value, _Array) else value)
        if array.ndim == 1 and array.dtype.kind in "biuf":
            return array
    raise TypeError(f"`{name}` is not a list of numbers")
