"""SIGTERM and SIGINT ask a run to stop; the loop finishes its step, saves and ends."""

from __future__ import annotations

import signal
from types import FrameType

_received: list[int] = []


def install() -> None:
    """Note both signals from now on instead of dying of them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)


def received() -> int:
    """The first signal that came, 0 if none has."""
    return _received[0] if _received else 0


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(number)
