"""The documents of a chunk: one JSON object a line, or the values of a Parquet column."""

from __future__ import annotations

import json
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
    load = orjson.loads
    try:
        found = [load(line)[key] for line in payload.split(b"\n") if line]
        if {*map(type, found)} <= {str}:
            return found, []
    except (ValueError, TypeError, KeyError):
        pass
    return _one_by_one(payload, key)


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
