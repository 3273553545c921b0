"""Which processes a run has, from flags or from what clusters put into the environment; and what holds them together."""

import os
import socket

import pytest

from opsa_jax.config import DistributedConfig
from opsa_jax.errors import PeerError, UserError
from opsa_jax.parallel import distributed, supervisor
from opsa_jax.parallel.distributed import Cluster, find

CLUSTER_VARIABLES = ("SLURM_", "OMPI_", "TPU_", "KUBERNETES_", "JOB_COMPLETION", "MEGASCALE_", "JAX_COORDINATOR")


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch):
    for name in list(os.environ):
        if name.startswith(CLUSTER_VARIABLES):
            monkeypatch.delenv(name)


def test_a_plain_machine_is_one_process():
    assert find(DistributedConfig()) is None
    assert find(DistributedConfig(coordinator="h:1", processes=1, process_id=0)) is None


def test_flags():
    cfg = DistributedConfig(coordinator="10.0.0.1:1234", processes=4, process_id=3, local_devices=(0, 1))
    assert find(cfg) == Cluster("10.0.0.1:1234", 4, 3, (0, 1))


def slurm(monkeypatch, tasks="4"):
    values = {"JOB_ID": "77", "STEP_NODELIST": "node[003-006]", "NTASKS": tasks, "PROCID": "2", "LOCALID": "1", "STEP_NUM_NODES": "4"}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_slurm(monkeypatch):
    slurm(monkeypatch)
    found = find(DistributedConfig())
    assert found.coordinator.startswith("node003:") and (found.processes, found.process, found.local_devices) == (4, 2, (1,))
    assert find(DistributedConfig(detect="off")) is None
    assert find(DistributedConfig(local_devices=(0, 1))).local_devices == (0, 1)
    slurm(monkeypatch, tasks="1")
    assert find(DistributedConfig()) is None


def test_flags_go_before_detection(monkeypatch):
    slurm(monkeypatch)
    assert find(DistributedConfig(coordinator="h:1", processes=2, process_id=1)) == Cluster("h:1", 2, 1)


def test_gke_tpu_slice(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.GkeTpuCluster, "get_coordinator_address", classmethod(lambda *args, **kwargs: "w0:8482"))
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "0")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "w0,w1,w2,w3")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    found = find(DistributedConfig())
    assert (found.coordinator, found.processes, found.process) == ("w0:8482", 4, 1)


def test_a_pod_of_no_job_is_one_process(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert find(DistributedConfig()) is None


def test_a_cluster_that_cannot_be_read_is_one_line(monkeypatch):
    from jax._src.clusters import ClusterEnv

    def broken(*args):
        raise RuntimeError("metadata:\n no answer")

    monkeypatch.setattr(ClusterEnv, "auto_detect_unset_distributed_params", broken)
    with pytest.raises(UserError, match=r"metadata: no answer.*--distributed.coordinator HOST:PORT .* or --distributed.detect off") as e:
        find(DistributedConfig())
    assert "\n" not in str(e.value)


def test_a_port_in_use_and_an_address_without_a_listener():
    with socket.socket(socket.AF_INET6) as s:
        s.bind(("::", 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at .*h:{port}.*in use"):
            distributed._check_port(f"h:{port}", port)
        distributed._reach("localhost", port, 1)
    with pytest.raises(PeerError, match="nothing answers at the coordinator's address localhost"):
        distributed._reach("localhost", port, 1)
    with pytest.raises(PeerError, match=r"no\.such\.host\.invalid"):
        distributed._reach("no.such.host.invalid", port, 1)


def test_one_process_needs_no_agreement():
    assert distributed.from_first("x", lambda: 5) == 5
    distributed.check_same("config", "a", "config")
    assert not supervisor.is_worker()
