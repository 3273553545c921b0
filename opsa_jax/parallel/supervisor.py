"""The outer of the two processes of a command that is one of several: runs the worker, and explains its end in one line.

jax's runtime aborts a process from C++ when another one is missing or dead; nothing inside can catch that, so it is watched from
outside. Signals are passed on, output is passed through, and the worker dies with its supervisor.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import TextIO

from opsa_jax.config import DistributedConfig
from opsa_jax.errors import PeerError
from opsa_jax.parallel.distributed import Cluster

WORKER = "OPSA_JAX_WORKER"
"""Set in the environment of a worker."""
_NOISE = re.compile(r"[WEF]\d{4} .*(coordination_service\w*|preemption_\w+|client|service|distributed\w*)\.(cc|h):\d+\]")
_HOLD = 5.0  # seconds that lines after jax's complaint are kept back: those of an abort come at once


def is_worker() -> bool:
    return os.environ.get(WORKER) == str(os.getppid())


def supervise(module: str, argv: list[str], cluster: Cluster, cfg: DistributedConfig) -> int:
    """Run `python -m module *argv` as the worker; its exit code, or 69 with one line where another process is the reason."""
    environment = os.environ | {WORKER: str(os.getpid())}
    worker = subprocess.Popen(
        [sys.executable, "-m", module, *argv], env=environment, stderr=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True, preexec_fn=_die_with_parent,
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, _: worker.send_signal(number))
    errors = _Errors(worker.stderr)
    code = worker.wait()
    held = errors.rest()
    if code >= 0:
        sys.stderr.write(held)
        return code
    why = explain(held, cluster, cfg)
    if why is None:
        sys.stderr.write(held)
        hint = ": out of host memory, or ended from outside" if -code == signal.SIGKILL else ""
        why = f"process {cluster.process} was ended by {signal.Signals(-code).name}{hint}"
    print(f"opsa {module.rpartition('.')[2]}: error: {why}", file=sys.stderr)
    return PeerError.exit_code if -code == signal.SIGABRT else 128 - code


def explain(text: str, cluster: Cluster, cfg: DistributedConfig) -> str | None:
    """One line on why jax ended a worker after writing `text`; None if the text has nothing to say about other processes."""
    me, flags = f"process {cluster.process}", "--distributed.coordinator, --distributed.processes and --distributed.process-id"
    if found := re.search(r"reached the barrier: (\d+)/(\d+)\.", text):
        missing = _numbers(r"timed out task names:", text)
        return (
            f"only {found[1]} of {found[2]} processes joined within {cfg.timeout} s (--distributed.timeout); missing: "
            f"{', '.join(missing) or 'unknown'}; start the same command on each, and check their {flags}"
        )
    if dead := _numbers(r"unhealthy \(stopped sending heartbeats\):", text):
        whose = f"process {dead[0]}" if len(dead) == 1 else f"processes {', '.join(dead)}"
        return f"{whose} died or lost the network (no heartbeat for {cfg.heartbeat} s), so {me} ends; see the log of {whose}, then --resume"
    if re.search(r"RegisterTask|incarnation|ALREADY_EXISTS", text):
        why = "already joined with this number, or came from an earlier start" if re.search("incarnation|ALREADY", text) else "did not join"
        return f"{me} could not join the run at {cluster.coordinator} within {cfg.timeout} s: a process {why}; check {flags} of all"
    if re.search(r"leader task|Failed to send RPC to coordination service|Socket closed", text):
        return f"process 0, the coordinator at {cluster.coordinator}, died or cannot be reached, so {me} ends; see its log, then --resume"
    return None


def _numbers(before: str, text: str) -> list[str]:
    """The task numbers on the lines after `before`."""
    found = re.search(before + r"\s*((?:\d+\s*\n)+)", text)
    return sorted(set(found[1].split()), key=int) if found else []


class _Errors:
    """Passes a worker's stderr on, except what follows jax's complaints: that is kept until it is clear what it means."""

    def __init__(self, stream: TextIO):
        self._lock, self._held, self._since = threading.Lock(), [], 0.0
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()
        threading.Thread(target=self._flush, daemon=True).start()

    def _read(self, stream: TextIO) -> None:
        for line in stream:
            with self._lock:
                if _NOISE.match(line):
                    self._since = time.monotonic()
                if _NOISE.match(line) or self._held:
                    self._held.append(line)
                    continue
            sys.stderr.write(line)
            sys.stderr.flush()

    def _flush(self) -> None:
        """The worker lives on: show what was kept back."""
        while self._reader.is_alive():
            time.sleep(1)
            with self._lock:
                if self._held and time.monotonic() - self._since > _HOLD:
                    sys.stderr.write("".join(self._held))
                    self._held.clear()

    def rest(self) -> str:
        """What was kept back, after the worker has ended."""
        self._reader.join(timeout=5)
        with self._lock:
            held, self._held = "".join(self._held), []
        return held


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
