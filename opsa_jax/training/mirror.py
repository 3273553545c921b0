"""Checkpoints on object stores that Orbax does not write to itself (s3://): staged in a folder, then copied as a whole."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from opsa_jax.errors import UserError

COMPLETE = "COMPLETE"
"""Written last into a copy: a copy without it was cut short, and does not count."""


class Mirror:
    """Keeps a store like a staging folder of Orbax's checkpoints. One process of a run has it."""

    def __init__(self, staging: Path, store: str):
        self._staging, self._store = staging, epath.Path(store)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def fetch(self) -> None:
        """The newest complete checkpoint of the store into the staging folder, unless it has that or a newer one."""
        newest = max(self._steps(), default=None)
        if newest is None or newest <= max(_numbers(self._staging), default=-1):
            return
        partial = self._staging / f".{newest}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        _copy(self._store / str(newest), epath.Path(partial))
        (partial / COMPLETE).unlink()
        partial.rename(self._staging / str(newest))

    def send(self, step: int, written: Callable[[], None]) -> None:
        """Start copying a checkpoint to the store, as soon as `written()` returns; waits for the copy before it.

        Raises:
            UserError: that could not be written.
        """
        self.wait()
        self._thread = threading.Thread(target=self._send, args=(step, written))
        self._thread.start()

    def wait(self) -> None:
        """For the copy under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            why = " ".join(str(self._error).split())[:200]
            raise UserError(f"--train.checkpoints {self._store} cannot be written: {type(self._error).__name__}: {why}") from None

    def _send(self, step: int, written: Callable[[], None]) -> None:
        try:
            written()
            target = self._store / str(step)
            if target.exists():  # cut short before
                target.rmtree()
            _copy(epath.Path(self._staging / str(step)), target)
            (target / COMPLETE).write_text("")
            for old in set(self._steps()) - set(_numbers(self._staging)):
                (self._store / str(old)).rmtree()
        except Exception as e:  # told by `wait`, in the main thread
            self._error = e

    def _steps(self) -> list[int]:
        return [n for n in _numbers(self._store) if (self._store / str(n) / COMPLETE).exists()]


def _numbers(folder: Path | epath.Path) -> list[int]:
    return [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []


def _copy(source: epath.Path, target: epath.Path) -> None:
    """All files below `source`, several at a time."""
    files = [(p, target / str(p.relative_to(source))) for p in _files(source)]
    for folder in {t.parent for _, t in files}:
        folder.mkdir(parents=True, exist_ok=True)

    def one(pair: tuple[epath.Path, epath.Path]) -> None:
        with pair[0].open("rb") as f, pair[1].open("wb") as g:
            shutil.copyfileobj(f, g, 1 << 24)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, files))


def _files(folder: epath.Path) -> list[epath.Path]:
    return [f for p in folder.iterdir() for f in (_files(p) if p.is_dir() else [p])]
