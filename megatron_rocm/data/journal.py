"""What a killed run left to the next one: how far the committed output goes, and in which input to go on."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_rocm.data.indexed import discard, partial
from megatron_rocm.platform.disk import sync_folder

BLOCK = 8 << 20


@dataclass
class State:
    """`sha256` is that of the first `tokens` ids of the .bin file; what follows was not committed.

    `source`, `position`: where the next chunk begins (source.Chunk). `shown`: the first faults that were skipped.
    """

    source: int = 0
    position: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    skipped: int = 0
    passed_over: int = 0
    shown: list[str] = field(default_factory=list)
    seconds: float = 0.0
    sha256: str = ""
    sealed: bool = False


class Journal:
    """PREFIX.journal, for the job of `stamp` alone."""

    def __init__(self, prefix: str, stamp: str) -> None:
        self._prefix = prefix
        self._path = Path(f"{prefix}.journal")
        self._stamp = stamp

    def write(self, state: State) -> None:
        """Replace what is there, once the data that `state` speaks of is on the disk."""
        beside = self._path.with_name(f"{self._path.name}.partial")
        with open(beside, "w") as file:
            json.dump({"stamp": self._stamp, **asdict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._path)
        sync_folder(self._path.parent)

    def read(self) -> State | None:
        """The state to go on from; None where there is nothing, or nothing that belongs to this job."""
        stamp, state = self._known()
        return state if stamp == self._stamp else None

    def documents(self) -> int:
        """Of the unfinished run that stands here, whichever job's it is."""
        state = self._known()[1]
        return state.documents if state else 0

    def _known(self) -> tuple[str, State | None]:
        try:
            known: dict[str, Any] = json.loads(self._path.read_bytes())
            return known.pop("stamp"), State(**known)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return "", None

    def verify(self, state: State, itemsize: int) -> Any:
        """The hash of the committed ids, which are read again; None where they are not what was committed."""
        digest = hashlib.sha256()
        left = state.tokens * itemsize
        try:
            if os.path.getsize(partial(self._prefix, "lengths")) < 4 * state.documents:
                return None
            with open(partial(self._prefix, "bin"), "rb", buffering=0) as file:
                while left and (block := file.read(min(BLOCK, left))):
                    digest.update(block)
                    left -= len(block)
        except OSError:
            return None
        return digest if not left and digest.hexdigest() == state.sha256 else None

    def remove(self, output: bool = False) -> None:
        """Forget the run; with `output` also what it has written."""
        self._path.unlink(missing_ok=True)
        self._path.with_name(f"{self._path.name}.partial").unlink(missing_ok=True)
        if output:
            discard(self._prefix)
