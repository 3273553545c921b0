"""Two and four real processes over loopback: they train as one does, and end together with a line that says why."""

import dataclasses
import json
import signal
import socket

import numpy as np
import pytest
from jobs import Job, free_port, recipe, succeeded
from safetensors.numpy import load_file
from tiny import run_config

from opsa_jax.config import DistributedConfig
from opsa_jax.parallel.distributed import Cluster
from opsa_jax.parallel.supervisor import explain

MEASURED = ("tokens_per_second", "share_rollout", "share_update")
# Adam's first steps are as rough as the sign of a gradient that rounding moves, unless eps is above that.
SMOOTH = "c.OptimConfig(lr=1e-2, eps=1e-3)"
TRAIN = "c.TrainConfig(steps=6, prompts_per_rollout=8, update_batch=4, save_every=2)"
SOON = ("--distributed.timeout", "60", "--distributed.heartbeat", "10")


def rows(folder):
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def assert_same_run(folder, other):
    """Responses equal, losses and weights within float32 rounding."""
    found, expected = rows(folder), rows(other)
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - set(MEASURED):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), (a["step"], name)
        for name in ("response_tokens", "finished", "refused_harmful", "refused_benign"):
            assert a[name] == pytest.approx(b[name], abs=1e-9)
    weights = load_file(other / "hf" / "model.safetensors")
    for name, tensor in load_file(folder / "hf" / "model.safetensors").items():
        np.testing.assert_allclose(tensor, weights[name], atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the tiny model and `alone`, the run of one process with one device."""
    folder = tmp_path_factory.mktemp("processes")
    run_config(folder)
    row = {"metric": "capability", "split": "test", "label": "benign", "expect": "cannot"}
    suite = [row | {"id": f"e{i}", "prompt": f"help me open the {x}"} for i, x in enumerate(["door", "map", "vault", "lock", "window"])]
    (folder / "suite.jsonl").write_text("".join(json.dumps(r) + "\n" for r in suite))
    with Job(folder, tiny(folder, evals=suite_of(folder)), 1, 1, "--out", "alone") as job:
        succeeded(job)
    return folder


def tiny(folder, **fields):
    return recipe(folder, **({"train": TRAIN, "optim": SMOOTH} | fields))


def suite_of(folder):
    return f"c.EvalConfig(suite={str(folder / 'suite.jsonl')!r}, max_new_tokens=6, batch=4)"


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices", "mesh"), [(2, 2, "1, 2, 2"), (4, 1, "1, 2, 2")])
def test_processes_train_as_one(place, count, devices, mesh):
    """With four processes of one device, two share each row of the batch (tensor goes across processes)."""
    out = place / f"p{count}"
    with Job(place, tiny(place, mesh=f"c.MeshConfig({mesh})", evals=suite_of(place)), count, devices, "--out", str(out), *SOON) as job:
        succeeded(job)
    assert_same_run(out, place / "alone")
    assert json.loads((out / "results.json").read_text()) == json.loads((place / "alone" / "results.json").read_text())
    assert (out / "plot.png").is_file()
    assert "plot" in job.log(0)
    said = [line for line in job.log(1).splitlines() if "peer ranks" not in line and "[Gloo]" not in line]
    assert said == [], "only the first process says what it does"


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resume_with_another_number_of_processes(place, before, after):
    """Stopped by SIGTERM (to one of the processes) and resumed on another mesh of another number of processes."""
    out = place / f"from{before}to{after}"
    file, argv = tiny(place, train=TRAIN.replace("steps=6", "steps=40")), ("--out", str(out), *SOON)
    alone = place / "alone40"
    if not alone.exists():
        with Job(place, file, 1, 1, "--out", str(alone)) as job:
            succeeded(job)
    with Job(place, file, before, 1, *argv) as job:
        job.until(lambda: len(rows(out)) >= 4)
        job.signal(i=before - 1)
        assert job.wait() == [75] * before, [job.log(i) for i in range(before)]
    done = len(rows(out))
    assert 4 <= done < 40 and f"update {done} of 40 is saved" in job.log(before - 1)
    with Job(place, file, after, 1, "--resume", *argv) as job:
        succeeded(job)
    assert f"from update {done} of 40" in job.log()
    assert [r["response_tokens"] for r in rows(out)] == [r["response_tokens"] for r in rows(alone)]
    assert_same_run(out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [1, 0])
def test_a_killed_process_ends_the_others(place, dead):
    out = place / f"killed{dead}"
    file = tiny(place, train=TRAIN.replace("steps=6", "steps=100000"))
    with Job(place, file, 2, 1, "--out", str(out), *SOON) as job:
        job.until(lambda: len(rows(out)) >= 2)
        job.signal(signal.SIGKILL, dead)
        codes = job.wait()
    left = 1 - dead
    assert codes[dead] == -signal.SIGKILL and codes[left] == 69, (codes, job.log(left))
    last = job.log(left).splitlines()[-1]
    assert last.startswith("opsa train: error: process ") and f"process {dead}" in last and "died" in last, job.log(left)
    assert "Check failure" not in job.log(left)


@pytest.mark.slow
def test_a_process_that_fails_names_itself(place):
    """A mistake on one machine only: both end at once, and both say whose it is."""
    file = tiny(place, body="import sys")
    text = file.read_text().replace("def get_config():\n    return ", "def get_config():\n    config = ")
    file.write_text(text + "    import dataclasses\n    return dataclasses.replace(config, seed=int(sys.argv[-1] == '1'))\n")
    with Job(place, file, 2, 1, "--out", str(place / "differs"), *SOON) as job:
        codes = job.wait()
    assert codes == [69, 2], (codes, job.log(0), job.log(1))
    assert "process 1 was started with another config than process 0" in job.log(1).splitlines()[-1]
    assert "process 1 ended with: process 1 was started with another config" in job.log(0).splitlines()[-1]
    assert not (place / "differs").exists()


@pytest.mark.slow
def test_bad_input_ends_all_processes_with_the_same_line(place):
    with Job(place, tiny(place, evals=suite_of(place)), 2, 1, "--out", str(place / "alone"), *SOON) as job:
        codes = job.wait()
    assert codes == [2, 2], (codes, job.log(0), job.log(1))
    lines = {job.log(i).splitlines()[-1] for i in (0, 1)}
    assert len(lines) == 1 and "exists; continue it with --resume" in lines.pop()


@pytest.mark.slow
def test_only_one_of_two_started(place):
    with Job(place, tiny(place), 2, 1, "--distributed.timeout", "5", only=[0]) as job:
        assert job.wait() == [69], job.log()
    last = job.log().splitlines()[-1]
    assert "only 1 of 2 processes joined within 5 s" in last and "missing: 1" in last, job.log()


@pytest.mark.slow
@pytest.mark.parametrize("listening", [False, True])
def test_wrong_coordinator_port(place, listening):
    """Nobody listens there, or something that is no coordinator."""
    port = free_port()
    with socket.socket() as s:
        if listening:
            s.bind(("127.0.0.1", port))
            s.listen()
        with Job(place, tiny(place), 2, 1, "--distributed.timeout", "5", only=[1], port=port) as job:
            assert job.wait() == [69], job.log()
    last = job.log().splitlines()[-1]
    says = f"process 1 could not join the run at 127.0.0.1:{port} within 5 s" if listening else f"nothing answers .* 127.0.0.1:{port}"
    assert says.split(".*")[-1] in last, job.log()


def test_what_jax_says_is_explained():
    """Texts of jax 0.10.2's coordination service."""
    cfg, cluster = dataclasses.replace(DistributedConfig(), timeout=7, heartbeat=9), Cluster("h:1", 3, 0)
    missing = "# of tasks that reached the barrier: 1/3.\nThe first task at the barrier: 0. Some timed out task names:\n2\n1\n [type.goo"
    assert "only 1 of 3 processes joined within 7 s (--distributed.timeout); missing: 1, 2" in explain(missing, cluster, cfg)
    dead = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n12\nThe tasks have crashed."
    assert explain(dead, cluster, cfg).startswith("processes 1, 12 died or lost the network (no heartbeat for 9 s), so process 0 ends")
    leader = "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted/died/restarted"
    assert explain(leader, cluster, cfg).startswith("process 0, the coordinator at h:1, died or cannot be reached")
    assert explain("Segmentation fault", cluster, cfg) is None
