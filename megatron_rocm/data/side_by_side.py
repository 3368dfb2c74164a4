"""Long pieces of work in threads, which neither a failure of one nor Ctrl-C has to wait for."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence


def side_by_side(tasks: Sequence[Callable[[], None]], threads: int) -> None:
    """Run all tasks, so many at a time; raise what the first that fails raises, as soon as it does.

    The others then go on until the process ends, which leaves their work as a kill would: for tasks that a second
    call goes on with. None begins after a failure.
    """
    waiting = deque(tasks)
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        while waiting:
            try:
                task = waiting.popleft()
            except IndexError:
                return  # another thread took the last one
            try:
                task()
                ended.put(None)
            except BaseException as error:
                waiting.clear()
                ended.put(error)

    for _ in range(min(threads, len(tasks))):
        # A daemon is not waited for when the process ends; the threads of concurrent.futures are.
        threading.Thread(target=work, daemon=True).start()
    for _ in tasks:
        error = ended.get()
        if error is not None:
            raise error
