"""How long the devices spent on what, without making the host wait for them."""

import queue
import threading
import time
from typing import Any

import jax


class DeviceClock:
    """Attributes device time to named phases of numbered rounds.

    Programs run on a device in the order they were launched, so the time between two completions belongs to the later one. A
    thread waits for each output in turn; the training loop never does.
    """

    def __init__(self):
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._seconds: dict[int, dict[str, float]] = {}
        self._marks: dict[int, int] = {}
        self._changed = threading.Condition()
        self._last = time.perf_counter()
        threading.Thread(target=self._watch, daemon=True).start()

    def mark(self, round_number: int, phase: str, output: Any) -> None:
        """`output` (not donated later) is made by the program launched last; its time goes to `phase` of this round."""
        with self._changed:
            self._marks[round_number] = self._marks.get(round_number, 0) + 1
        self._queue.put((round_number, phase, output))

    def take(self, round_number: int) -> dict[str, float]:
        """Seconds by phase of a round all of whose programs have finished, or will soon."""
        with self._changed:
            self._changed.wait_for(lambda: self._marks[round_number] == 0)
            del self._marks[round_number]
            return self._seconds.pop(round_number)

    def _watch(self) -> None:
        while True:
            round_number, phase, output = self._queue.get()
            jax.block_until_ready(output)
            now = time.perf_counter()
            with self._changed:
                seconds = self._seconds.setdefault(round_number, {})
                seconds[phase] = seconds.get(phase, 0.0) + now - self._last
                self._marks[round_number] -= 1
                self._changed.notify_all()
            self._last = now
