"""The documents of a chunk: one JSON object a line, or the values of a Parquet column."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson


class Fault(NamedTuple):
    """A line without a document: its number within the chunk, from 0, and what is wrong."""

    line: int
    why: str


def texts(payload: bytes | list[Any], key: str) -> tuple[list[str], list[Fault]]:
    """The documents of a chunk, and the lines that hold none. Blank lines count for nothing."""
    if isinstance(payload, list):
        if {*map(type, payload)} <= {str}:
            return payload, []
        faults = [Fault(at, f"`{key}` is a {_kind(one)}") for at, one in enumerate(payload) if type(one) is not str]
        return [one for one in payload if type(one) is str], faults
    try:
        found = _of_whole_lines(payload, key)
        if {*map(type, found)} <= {str}:
            return found, []
    except (ValueError, TypeError, KeyError):
        pass
    return _one_by_one(payload, key)


def utf8_sizes(texts: Sequence[str]) -> list[int]:
    """Bytes of each text. Python keeps the UTF-8 form that this makes, and an encoder finds it there."""
    size = ctypes.c_ssize_t()
    into = ctypes.byref(size)
    sizes = []
    for text in texts:
        if text.isascii():
            sizes.append(len(text))
        else:
            _as_utf8(text, into)
            sizes.append(size.value)
    return sizes


_as_utf8 = ctypes.pythonapi.PyUnicode_AsUTF8AndSize
_as_utf8.argtypes, _as_utf8.restype = [ctypes.py_object, ctypes.POINTER(ctypes.c_ssize_t)], ctypes.c_void_p


def _of_whole_lines(payload: bytes, key: str) -> list[Any]:
    load, view, found, at = orjson.loads, memoryview(payload), [], 0
    while at < len(payload):
        end = payload.find(b"\n", at)
        if end < 0:
            end = len(payload)
        if end > at:
            found.append(load(view[at:end])[key])
        at = end + 1
    return found


def _one_by_one(payload: bytes, key: str) -> tuple[list[str], list[Fault]]:
    found, faults = [], []
    for number, line in enumerate(payload.split(b"\n")):
        if not line.strip():
            continue
        try:
            found.append(_document(line, key))
        except UnicodeDecodeError as error:
            faults.append(Fault(number, f"is not UTF-8 text: byte {error.start + 1} of the line ({error.reason})"))
        except UnicodeEncodeError:
            faults.append(Fault(number, "half of a surrogate pair is no character"))
        except KeyError:
            faults.append(Fault(number, f"there is no key `{key}`"))
        except (ValueError, TypeError, RecursionError) as error:
            faults.append(Fault(number, str(error)))
    return found, faults


def _document(line: bytes, key: str) -> str:
    """What the fast parser refuses is the standard library's, which knows NaN and tells what is wrong better."""
    try:
        value = orjson.loads(line)  # first, so that a line is judged alike whatever its neighbours are
    except ValueError:
        value = json.loads(line.decode("utf-8-sig"))
    if not isinstance(value, dict):
        raise TypeError(f"it is a {_kind(value)}")
    text = value[key]
    if not isinstance(text, str):
        raise TypeError(f"`{key}` is a {_kind(text)}")
    text.encode()
    return text


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
