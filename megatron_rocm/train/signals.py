"""What asks a run to save or to stop: SIGTERM, SIGINT and EXIT_DURATION to stop, saved; SIGUSR1 and the clock to save.

Any rank may be asked, and each step ends with all ranks knowing (train/step.py). Rank 0's clock alone counts.
"""

from __future__ import annotations

import math
import signal
from types import FrameType
from typing import NamedTuple

from megatron_rocm.config.checkpoint import Checkpoint
from megatron_rocm.platform import startup


class Asked(NamedTuple):
    """What a rank, or any, was asked for."""

    stop: bool = False
    save: bool = False


_received: list[int] = []
_save_received: list[int] = []
# In seconds, on the clock of platform/startup.py; for other ranks than 0, never.
_stop_at = _save_at = _save_every = math.inf


def install() -> None:
    """Note the signals from now on instead of dying of them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)
    signal.signal(signal.SIGUSR1, _note_save)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(number)


def _note_save(number: int, frame: FrameType | None) -> None:
    _save_received.append(number)


def watch(settings: Checkpoint, began: float) -> None:
    """Have this rank's clock ask too, for a run that began at `began` on the clock of platform/startup.py."""
    global _stop_at, _save_every
    _stop_at = began + 60 * settings.exit_duration if settings.exit_duration else math.inf
    _save_every = settings.save_seconds if settings.save and settings.save_seconds else math.inf
    saving()


def saving() -> None:
    """A save begins: what has asked for one is met, and the clock starts anew."""
    global _save_at
    _save_received.clear()
    _save_at = startup.now() + _save_every


def asked() -> Asked:
    """What this rank is asked for now."""
    now = startup.now()
    return Asked(bool(_received) or now >= _stop_at, bool(_save_received) or now >= _save_at)
