"""Several processes that run one program: starting them, agreeing, and ending together with a line that says why.

Plain multi-controller JAX: `jax.distributed` finds the processes and watches their heartbeats. What it does on a failure is to abort
every process from C++ with pages of text, so a command of several processes runs in two: `supervise` (the process that was started)
keeps the worker's errors back, and says in one line which process is missing or dead. No jax is imported here before it is needed.
"""

import atexit
import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

from opsa_jax.config import DistributedConfig
from opsa_jax.errors import PeerError, Preempted, UserError

T = TypeVar("T")
_POLL = 1.0  # seconds between looks at what other processes have said
_FAILED = "opsa/failed/"
_calls = itertools.count()
# What jax's errors say when a peer or the network is gone, rather than this process at fault.
_LOST = re.compile(r"gloo|nccl|unavailable|connection|connect|peer|socket|deadline|timed out|aborted|cancelled|heartbeat", re.IGNORECASE)


@dataclass(frozen=True)
class Cluster:
    """The processes of a run, seen from one of them."""

    coordinator: str
    """HOST:PORT of process 0."""
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None


def find(cfg: DistributedConfig) -> Cluster | None:
    """The processes that the flags or the cluster name; None for a single one. Starts no backend.

    Raises:
        UserError: a cluster that does not say where its processes are.
    """
    if cfg.coordinator:
        found = Cluster(cfg.coordinator, cfg.processes, cfg.process_id, cfg.local_devices or None)
    else:
        found = _detect(cfg) if cfg.detect == "auto" else None
    return found if found and found.processes > 1 else None


def _detect(cfg: DistributedConfig) -> Cluster | None:
    """jax's own detection: Cloud TPU and GKE TPU slices, SLURM (srun), Open MPI, Kubernetes jobs."""
    from jax._src.clusters import ClusterEnv

    if "KUBERNETES_SERVICE_HOST" in os.environ and not any(name in os.environ for name in ("JOB_COMPLETION_INDEX", "TPU_WORKER_ID")):
        return None  # a pod of its own, not of an indexed job
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, cfg.local_devices or None, None, cfg.timeout)
    except Exception as e:  # whatever the metadata service or the Kubernetes client raises
        raise UserError(
            f"this looks like a cluster, but its processes cannot be found ({type(e).__name__}: {' '.join(str(e).split())[:200]}); give "
            "--distributed.coordinator HOST:PORT --distributed.processes N --distributed.process-id I, or --distributed.detect off"
        ) from None
    coordinator, processes, process, local_devices = found
    if None in (coordinator, processes, process):
        return None
    return Cluster(coordinator, processes, process, tuple(local_devices) if local_devices else None)


def start(cluster: Cluster, cfg: DistributedConfig) -> None:
    """Join the other processes; before any other jax call. Returns when all have joined.

    Raises:
        PeerError: the coordinator cannot be reached within the timeout.
        UserError: the coordinator's port is taken.
    """
    import jax
    from jax._src.lib import _jax

    host, _, port = cluster.coordinator.rpartition(":")
    if cluster.process == 0:
        _check_port(cluster.coordinator, int(port))
        print(f"process  0 of {cluster.processes} waits for the others at {cluster.coordinator}, up to {cfg.timeout} s", flush=True)
    else:
        _reach(host, int(port), cfg.timeout)
    service = _jax.get_distributed_runtime_service

    def with_timeout(*args, **kwargs):
        # Not an argument of jax.distributed.initialize; with it the service says who is missing instead of timing out in silence.
        return service(*args, **kwargs, cluster_register_timeout=cfg.timeout)

    with mock.patch.object(_jax, "get_distributed_runtime_service", with_timeout):
        try:
            jax.distributed.initialize(
                cluster.coordinator, cluster.processes, cluster.process, cluster.local_devices, "deactivate",
                initialization_timeout=cfg.timeout + 5, heartbeat_timeout_seconds=cfg.heartbeat, shutdown_timeout_seconds=cfg.timeout,
            )  # fmt: skip
        except RuntimeError as e:
            why = " ".join(str(e).split())[:200]
            raise PeerError(f"process {cluster.process} could not join the run at {cluster.coordinator}: {why}") from None
    threading.Thread(target=_watch, args=(cluster.process,), daemon=True).start()


def _check_port(address: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError as e:
            why = f"process 0 cannot listen at --distributed.coordinator {address}: {e.strerror}"
            raise UserError(f"{why}; another program (or a run that has not ended) uses port {port}: choose another") from None


def _reach(host: str, port: int, timeout: float) -> None:
    """Wait until something listens at the coordinator's address."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), port), timeout=max(0.1, min(5, end - time.monotonic()))).close()
            return
        except OSError as e:
            if time.monotonic() + 0.5 > end:
                raise PeerError(
                    f"nothing answers at the coordinator's address {host}:{port} ({e.strerror or e}) after {timeout:.0f} s; is process 0 "
                    "running, is this its address and port, and do firewalls let it through? (--distributed.coordinator)"
                ) from None
        time.sleep(0.5)


def client() -> Any:
    """jax's key-value store and barriers, or None in a single process."""
    from jax._src import distributed

    return distributed.global_state.client


def from_first(name: str, compute: Callable[[], T]) -> T:
    """What `compute()` gives on process 0, on every process: only that one runs it. Its UserError is raised on all.

    All processes call this equally often, in the same order.

    Args:
        name: for whoever looks into the key-value store.
        compute: gives JSON types.
    """
    store = client()
    if store is None:
        return compute()
    import jax

    key = f"opsa/first/{next(_calls)}/{name}"
    if jax.process_index() == 0:
        try:
            value = compute()
        except UserError as e:
            store.key_value_set(key, json.dumps({"error": str(e)}))
            raise
        store.key_value_set(key, json.dumps({"value": value}))
        return value
    found = json.loads(_await(store, key))
    if "error" in found:
        raise UserError(found["error"])
    return found["value"]


def _await(store, key: str) -> str:
    """The value of a key, once a process has set it."""
    while True:
        # In short waits, so that Ctrl-C and the watch are heard: an evaluation or a download on process 0 may take long.
        with contextlib.suppress(Exception):
            return store.blocking_key_value_get(key, 2000)


def check_same(name: str, value: str, what: str) -> None:
    """All processes must have the same `value`; none goes on before all have found that they do.

    Raises:
        UserError: on those that differ from process 0. The others are ended by it (`running`) while they wait here.
    """
    store = client()
    if store is None:
        return
    import jax

    if from_first(f"same/{name}", lambda: value) != value:
        raise UserError(f"process {jax.process_index()} was started with another {what} than process 0; start all with the same command")
    key = f"opsa/same/{next(_calls)}/{name}"
    store.key_value_set(f"{key}/{jax.process_index()}", "same")
    for process in range(jax.process_count()):
        _await(store, f"{key}/{process}")


@contextlib.contextmanager
def running(cfg: DistributedConfig, cluster: Cluster | None) -> Iterator[None]:
    """The life of a process of the run: joins the others, and tells them when it fails."""
    if cluster is None:
        yield
        return
    start(cluster, cfg)
    try:
        yield
    except Preempted:
        raise  # all processes stop at the same point
    except BaseException as e:
        _fail(e, cluster.process, cfg)
        raise


def _fail(e: BaseException, process: int, cfg: DistributedConfig) -> None:
    """Tell the others why this process ends. If the reason seems to be another process, wait for the word on that one."""
    if not isinstance(e, (UserError, KeyboardInterrupt, SystemExit)) and _LOST.search(str(e)) and "RESOURCE_EXHAUSTED" not in str(e):
        time.sleep(1.5 * cfg.heartbeat)  # by now `_watch` or jax has ended this process, if another one is the reason
    code = {KeyboardInterrupt: 130}.get(type(e), getattr(e, "exit_code", 1))
    reason = " ".join((str(e) or type(e).__name__).split())[:300]
    message = "was interrupted" if isinstance(e, KeyboardInterrupt) else f"ended with: {reason}"
    with contextlib.suppress(Exception):
        client().key_value_set(f"{_FAILED}{process}", message)
        if process == 0:
            time.sleep(3 * _POLL)  # the others read it while the coordinator, which is this process, still answers
    # Leaving in the ordinary way would wait for the others at a barrier that they may never reach.
    atexit.register(_leave, code)
    late = threading.Timer(30, _leave, (code,))  # threads that wait for other processes, as saves do, hold up even that
    late.daemon = True
    late.start()


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _watch(process: int) -> None:
    """Ends this process when another one has said that it failed."""
    while (store := client()) is not None:
        time.sleep(_POLL)
        failed: list[tuple[str, str]] = []
        with contextlib.suppress(Exception):  # no entry yet, or the coordinator is gone, which jax notices itself
            failed = store.key_value_dir_get(_FAILED)
        names = {int(key.rpartition("/")[2]): message for key, message in failed}
        if process in names:
            return
        if names:
            first = min(names)
            if process == 0:
                time.sleep(4 * _POLL)  # the coordinator leaves last
            print(f"opsa: error: process {first} {names[first]}; process {process} ends with it", file=sys.stderr)
            _leave(PeerError.exit_code)
