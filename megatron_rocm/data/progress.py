"""How far a long run is, in a line now and then."""

from __future__ import annotations

import time
from collections.abc import Sequence

from megatron_rocm.data.journal import State
from megatron_rocm.data.source import Chunk, Source

SECONDS = 10.0  # between two lines


class Progress:
    """Speed is that of this run alone, from where an earlier one had come."""

    def __init__(self, sources: Sequence[Source], state: State) -> None:
        sizes = [(source.size if source.end is None or source.kind != "lines" else source.end) - _start(source)
                 for source in sources]  # fmt: skip
        self._before = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
        self._began = self._shown = time.monotonic()
        self._bytes, self._tokens = state.bytes, state.tokens
        self._first: int | None = None

    def show(self, chunk: Chunk, state: State) -> None:
        """Print where `chunk` ends, if the last line is SECONDS old."""
        done, total = self._before[chunk.source] + chunk.done, self._before[-1]
        if self._first is None:
            self._first = done
        now = time.monotonic()
        if now - self._shown < SECONDS:
            return
        self._shown = now
        seconds = now - self._began
        line = (
            f"  {state.documents:,} documents, {(state.bytes - self._bytes) / 1e6 / seconds:,.1f} MB/s, "
            f"{(state.tokens - self._tokens) / 1e6 / seconds:,.2f} M tokens/s"
        )
        if total and done > self._first:
            left = (total - done) * seconds / (done - self._first)
            line += f", {100 * done / total:.1f} % of {total / 1e6:,.0f} MB, {_clock(left)} left"
        print(line, flush=True)


class Heartbeat:
    """Of a pass over `total` bytes of which nothing else is to be seen."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._began = self._shown = time.monotonic()

    def show(self, done: int) -> None:
        """Print how far it is, if the last line is SECONDS old."""
        now = time.monotonic()
        if now - self._shown < SECONDS or not done:
            return
        self._shown = now
        seconds = now - self._began
        print(
            f"  {self._what}: {100 * done / self._total:.1f} % of {self._total / 1e6:,.0f} MB, "
            f"{done / 1e6 / seconds:,.1f} MB/s, {_clock((self._total - done) * seconds / done)} left",
            flush=True,
        )


def _start(source: Source) -> int:
    return source.start if source.kind == "lines" else 0


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
