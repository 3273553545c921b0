"""Notice that the machine is about to be taken away: SIGTERM, which cloud and cluster schedulers send some time before."""

import contextlib
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Asked at points that every process passes in the same order, says at the same one on all of them that it is time to stop.

    A single process listens for SIGTERM itself. With several, jax does: a notice to any of them (SIGTERM, or a maintenance event of a
    TPU slice) reaches all, and they agree on a point that none of them has passed.
    """

    def __init__(self):
        self._asked = False
        self._points = 0
        self._several = jax.process_count() > 1
        self._before = None

    def __enter__(self) -> "Preemption":
        if not self._several:
            with contextlib.suppress(ValueError):  # not the main thread: whoever runs us there listens
                self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def due(self) -> bool:
        """True if the processes stop here. To be called by all of them, equally often."""
        self._points += 1
        return multihost_utils.reached_preemption_sync_point(self._points) if self._several else self._asked
