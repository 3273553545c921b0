"""The launch scripts: their dry runs word for word, and their real runs against fakes of gcloud, srun and nvidia-smi."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fake_cloud import LAUNCH, Cloud

SCRIPTS = ["tpu_vm.sh", "tpu_worker.sh", "gpu.sh", "slurm.sbatch"]
PLACE = ["--name", "opsa", "--project", "p", "--zone", "z"]
WHERE = "--zone=z --project=p"
SSH = f"gcloud compute tpus tpu-vm ssh opsa --quiet --worker=%s '--command=%s' {WHERE}"


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def fails(done: subprocess.CompletedProcess, *words: str) -> None:
    """One line on stderr with these words, nothing else, exit code 2."""
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1, done
    assert "error: " in done.stderr and all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_clean(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    checker = Path(sys.executable).with_name("shellcheck")
    found = str(checker) if checker.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([found, LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_script_names_this_machine_or_needs_a_password():
    for path in LAUNCH.iterdir():
        text = path.read_text()
        assert "/root" not in text and "/work" not in text and "HF_TOKEN" not in text, path


# ---- tpu_vm.sh


def test_dry_run_of_all_prints_every_command_and_runs_none(cloud):
    done = cloud.tpu(
        "all", *PLACE, "--type", "v5litepod-16", "--spot", "--queued", "--delete", "--create-flag=--network=n", "--bucket", "gs://b-1/opsa/",
        "--out", "runs/x", "--dry-run", "--", "configs/opsa/qwen3_0p6b.py", "--teacher.context-harmful", "be \"safe\", it's $HOME",
        PATH="/usr/bin:/bin",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    leave = "--exclude=./.git --exclude=.venv --exclude=./runs --exclude=./.launch --exclude=__pycache__"
    leave += " '--exclude=.*_cache' '--exclude=*.egg-info'"
    archive = f"{cloud.project.parent}/opsa_jax-opsa.tgz"
    start = SSH % ("all", "cd opsa_jax && bash launch/tpu_worker.sh start 0 %s")
    arguments = r"""'\''runs/x'\'' '\''gs://b-1/opsa'\'' '\''configs/opsa/qwen3_0p6b.py'\'' '\''--teacher.context-harmful'\'' """
    assert done.stdout.splitlines() == [
        f"gcloud compute tpus tpu-vm describe opsa '--format=value(state,acceleratorType)' {WHERE}",
        f"gcloud compute tpus queued-resources describe opsa '--format=value(state.state)' {WHERE}",
        "gcloud compute tpus queued-resources create opsa --node-id=opsa --runtime-version=v2-alpha-tpuv5-lite "
        f"--accelerator-type=v5litepod-16 --spot --network=n {WHERE}",
        f"tar -C {cloud.project} {leave} -czf {archive} .",
        f"gcloud compute tpus tpu-vm scp {archive} opsa:opsa_jax.tgz --quiet --worker=all {WHERE}",
        f"rm -f {archive}",
        SSH % ("all", "mkdir -p opsa_jax && tar -xzf opsa_jax.tgz -C opsa_jax"),
        SSH % ("all", "cd opsa_jax && bash launch/tpu_worker.sh install"),
        start % (arguments + r"""'\''be "safe", it'\''\'\'''\''s $HOME'\''"""),
        SSH % ("0", "cd opsa_jax && bash launch/tpu_worker.sh follow"),
        "mkdir -p runs/x",
        "gcloud storage rsync --recursive gs://b-1/opsa/run runs/x",
        f"gcloud compute tpus queued-resources describe opsa '--format=value(state.state)' {WHERE}",
        f"gcloud compute tpus queued-resources delete opsa --quiet --force {WHERE}",
    ]
    assert cloud.read("calls") == [] and not Path(archive).exists() and not (cloud.project / "runs").exists()


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [("v6e-64", "v2-alpha-tpuv6e"), ("v5p-8", "v2-alpha-tpuv5"), ("v5litepod-8", "v2-alpha-tpuv5-lite"), ("v4-8", "tpu-ubuntu2204-base")],
)
def test_dry_run_of_create_chooses_the_software_of_the_type(cloud, kind, runtime):
    done = cloud.tpu("create", *PLACE, "--type", kind, "--dry-run")
    expected = f"gcloud compute tpus tpu-vm create opsa --version={runtime} --accelerator-type={kind} {WHERE}"
    assert done.stdout.splitlines()[1:] == [expected]
    mine = cloud.tpu("create", *PLACE, "--type", kind, "--runtime", "mine", "--dry-run").stdout
    assert "--version=mine" in mine


def test_dry_run_of_the_other_commands(cloud):
    def lines(*args: str) -> list[str]:
        done = cloud.tpu(args[0], *PLACE, *args[1:], "--dry-run")
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if "describe" not in line]

    clone = r"{ test -d opsa_jax || git clone '\''https://host/r.git'\'' opsa_jax; } && cd opsa_jax && git fetch --quiet --tags origin"
    install = SSH % ("all", "cd opsa_jax && bash launch/tpu_worker.sh install")
    expected = [SSH % ("all", clone + r" && git checkout --quiet '\''v1'\''"), install]
    assert lines("install", "--repo", "https://host/r.git", "--ref", "v1") == expected
    assert lines("logs") == [SSH % ("0", "cd opsa_jax && bash launch/tpu_worker.sh follow")]
    assert lines("stop") == [SSH % ("all", "cd opsa_jax && bash launch/tpu_worker.sh stop")]
    copied = f"gcloud compute tpus tpu-vm scp opsa:opsa_jax/runs/x runs --quiet --recurse --worker=0 {WHERE}"
    assert lines("fetch", "--out", "runs/x") == ["mkdir -p runs", copied]
    assert lines("delete") == [f"gcloud compute tpus tpu-vm delete opsa --quiet {WHERE}"]


def test_a_whole_run_goes_on_after_a_preemption_and_after_a_lost_slice(cloud):
    cloud.write("codes", "75", "lost", "0", "")
    options = ["--type", "v5litepod-8", "--bucket", "gs://b-1/x", "--out", "runs/x", "--delete"]
    done = cloud.tpu("all", *PLACE, *options, "--", "a b.py", "--seed", "3")
    assert done.returncode == 0, done.stderr
    # The same command three times, the last on a new slice, whose run directory came from the bucket.
    expected = "-m opsa_jax.train a b.py --seed 3 --out runs/x --resume --train.checkpoints gs://b-1/x/checkpoints"
    assert cloud.read("trained") == [expected] * 3
    assert (cloud.project / "runs/x/metrics.jsonl").read_text() == "part\n" * 3
    verbs = [call[2:4] for call in map(json.loads, cloud.read("calls")) if call[0] == "compute" and call[3] in ("create", "delete", "scp")]
    created, copied, deleted = (["tpu-vm", verb] for verb in ("create", "scp", "delete"))
    assert verbs == [created, copied, deleted, created, copied, deleted]
    assert "exit code 75, slice READY: restart 1 of 10" in done.stderr and "exit code 69, slice PREEMPTED: restart 2 of 10" in done.stderr
    assert "trained, 0" in done.stdout and not (cloud.fake / "tpu-vm").exists()


def test_a_failed_run_ends_with_its_exit_code_and_keeps_the_slice(cloud):
    for code in ("2", "1"):
        cloud.write("codes", code, "0", "")
        done = cloud.tpu("all", *PLACE, "--type", "v5litepod-8", "--out", "runs/x", "--", "a.py")
        assert done.returncode == int(code) and "slice opsa is kept" in done.stderr
        assert cloud.read("codes") == ["0"] and (cloud.fake / "tpu-vm").exists()


def test_restarts_end_after_their_number_and_a_lost_run_is_said(cloud):
    cloud.write("codes", "75", "69", "75", "")
    done = cloud.tpu("all", *PLACE, "--type", "v5litepod-8", "--max-restarts", "2", "--out", "runs/x", "--", "a.py")
    assert done.returncode == 75 and len(cloud.read("trained")) == 3 and "no more restarts" in done.stderr
    cloud.write("codes", "lost", "")
    done = cloud.tpu("run", *PLACE, "--type", "v5litepod-8", "--out", "runs/x", "--", "a.py")
    assert done.returncode == 2 and "the run is lost with it: no --bucket" in done.stderr


def test_stop_lets_training_save(cloud):
    cloud.write("codes", "wait", "")
    cloud.tpu("create", *PLACE, "--type", "v5litepod-8")
    cloud.tpu("install", *PLACE)
    arguments = ["bash", "launch/tpu_vm.sh", "run", *PLACE, "--max-restarts=0", "--out", "runs/x", "--", "a.py"]
    running = subprocess.Popen(arguments, cwd=cloud.project, env=cloud.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("waiting" in line for line in running.stdout)
    again = cloud.tpu("run", *PLACE, "--out", "runs/x", "--", "a.py")
    assert again.returncode == 2 and "a run is under way" in again.stderr
    assert "to save and end" in cloud.tpu("stop", *PLACE).stdout
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 75 and "saved" in out and "training ended with exit code 75" in out
    assert "no run under way" in cloud.tpu("stop", *PLACE).stdout


def test_queued_resources_are_waited_for_and_made_anew(cloud):
    cloud.write("queued-resources", "SUSPENDING", "SUSPENDED")
    done = cloud.tpu("create", *PLACE, "--type", "v6e-8", "--queued")
    assert done.returncode == 0, done.stderr
    verbs = [call[3] for call in map(json.loads, cloud.read("calls")) if call[2] == "queued-resources"]
    assert verbs == ["describe"] * 2 + ["delete", "create"] + ["describe"] * 3
    assert "queued-resources opsa is WAITING_FOR_RESOURCES" in done.stderr
    cloud.write("queued-resources", "PROVISIONING", "FAILED")
    (cloud.fake / "tpu-vm").unlink()
    done = cloud.tpu("create", *PLACE, "--type", "v6e-8", "--queued")
    assert done.returncode == 2 and "error: queued-resources opsa is FAILED" in done.stderr


def test_an_existing_slice_is_used_where_it_fits(cloud):
    cloud.write("tpu-vm", "READY\tv5litepod-8")
    done = cloud.tpu("create", *PLACE, "--type", "v5litepod-8")
    assert done.returncode == 0 and "using slice opsa" in done.stderr and len(cloud.read("calls")) == 1
    fails(cloud.tpu("create", *PLACE, "--type", "v5litepod-16"), "is a v5litepod-8, not v5litepod-16")


def test_bad_input_of_tpu_vm(cloud):
    fails(cloud.tpu("start"), "no command start", "create, install")
    fails(cloud.tpu("create", "--name"), "--name needs a value")
    fails(cloud.tpu("create", "--spott"), "no option --spott")
    fails(cloud.tpu("create", *PLACE), "create needs --type")
    fails(cloud.tpu("create", "--project", "p", "--zone", "z"), "--name is missing")
    fails(cloud.tpu("create", *PLACE, "--name", "Bad_Name"), "Bad_Name", "lower-case")
    fails(cloud.tpu("create", "--name", "a", "--zone", "z", "--type", "v6e-8"), "no project", "--project")
    fails(cloud.tpu("create", "--name", "a", "--project", "p", "--type", "v6e-8"), "no zone", "--zone")
    fails(cloud.tpu("run", *PLACE), "run needs --out")
    fails(cloud.tpu("run", *PLACE, "--out", "/tmp/x"), "must be a relative path")
    fails(cloud.tpu("run", *PLACE, "--out", "x", "--bucket", "b"), "must be gs://BUCKET")
    fails(cloud.tpu("run", *PLACE, "--out", "x", "--", "a.py", "--out", "y"), "leave --out out")
    fails(cloud.tpu("run", *PLACE, "--out", "x", "--max-restarts", "many"), "must be a number")
    fails(cloud.tpu("run", *PLACE, "--out", "x"), "slice opsa in z is ABSENT", "create")
    cloud.write("tpu-vm", "DENIED")
    fails(cloud.tpu("create", *PLACE, "--type", "v6e-8"), "cannot look at opsa in p, z", "PERMISSION_DENIED")
    (cloud.project.parent / "bin/gcloud").unlink()
    fails(cloud.tpu("create", *PLACE, "--type", "v6e-8", PATH=str(only_bash(cloud))), "gcloud is not installed")


def only_bash(cloud: Cloud) -> Path:
    """A PATH without gcloud or nvidia-smi, also where this machine has them."""
    folder = cloud.project.parent / "only"
    folder.mkdir(exist_ok=True)
    for name in ("bash", "dirname"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


@pytest.mark.parametrize("name", ["tpu_vm.sh", "gpu.sh"])
def test_help(cloud, name):
    done = cloud.run("bash", f"launch/{name}", "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"Usage: launch/{name}") and done.stderr == ""
    assert "--dry-run" in done.stdout and all(len(line) <= 140 for line in done.stdout.splitlines())


# ---- gpu.sh

SMI = "#!/bin/sh\nprintf '0, NVIDIA A, 81920 MiB, %s\\n1, NVIDIA A, 81920 MiB, %s\\n'\n"


def test_dry_run_of_gpu(cloud):
    done = cloud.run("bash", "launch/gpu.sh", "--gpus", "0,1", "--dry-run", "--", "a.py", "--out", "runs/a b")
    assert done.stdout.splitlines() == [
        "'python3' '-m' 'venv' '.venv'",
        "'.venv/bin/python' '-m' 'pip' 'install' '--quiet' '-e' '.[cuda]'",
        "'env' 'CUDA_VISIBLE_DEVICES=0,1' '.venv/bin/python' '-m' 'opsa_jax.train' 'a.py' '--out' 'runs/a b'",
    ]
    assert not (cloud.project / ".venv").exists()


@pytest.mark.parametrize(("driver", "packages"), [("580.65.06", "-e .[cuda]"), ("550.54.15", "-e . jax[cuda12]")])
def test_gpu_installs_for_the_driver_and_passes_the_exit_code_on(cloud, driver, packages):
    cloud.tool("nvidia-smi", SMI % (driver, driver))
    tool = '#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES: $*"\ncase $2 in opsa_jax.train) exit 75 ;; esac\n'
    (cloud.project / ".venv/bin").mkdir(parents=True)
    cloud._tool(cloud.project / ".venv/bin/python", tool)
    done = cloud.run("bash", "launch/gpu.sh", "--gpus", "1", "--", "a.py", CUDA_VISIBLE_DEVICES="")
    assert done.stdout.splitlines() == [f": -m pip install --quiet {packages}", "1: -m opsa_jax.train a.py"]
    assert done.returncode == 75


def test_bad_input_of_gpu(cloud):
    fails(cloud.run("bash", "launch/gpu.sh", "a.py"), "no option a.py", "after --")
    fails(cloud.run("bash", "launch/gpu.sh", "--gpus", "all"), "must be numbers")
    fails(cloud.run("bash", "launch/gpu.sh", PATH=str(only_bash(cloud))), "nvidia-smi is not there")
    cloud.tool("nvidia-smi", "#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    fails(cloud.run("bash", "launch/gpu.sh"), "No devices were found")
    cloud.tool("nvidia-smi", SMI % ("580.1", "580.1"))
    done = cloud.run("bash", "launch/gpu.sh", "--gpus", "2")
    assert done.returncode == 2 and "error: there is no GPU 2; there are: 0,1" in done.stderr


# ---- slurm.sbatch


def test_dry_run_of_slurm(cloud):
    done = cloud.run("bash", "launch/slurm.sbatch", "--dry-run", "a.py", "--out", "runs/x")
    train = "'srun' '--kill-on-bad-exit=0' '.venv/bin/python' '-m' 'opsa_jax.train' 'a.py' '--out' 'runs/x' '--resume'"
    assert done.stdout.splitlines() == [train, "exit code 75: scontrol requeue $SLURM_JOB_ID"]


def test_the_header_of_slurm_asks_for_a_signal_and_a_requeue():
    header = [line.split()[1] for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    options = dict(option.partition("=")[::2] for option in header)
    assert options["--signal"] == "TERM@120" and "--requeue" in options and options["--open-mode"] == "append"
    assert options["--ntasks-per-node"] == options["--gpus-per-node"]  # one task per GPU, and all GPUs of a node visible to its tasks
    assert not {"--gpus-per-task", "--gpu-bind"} & set(options)


@pytest.mark.parametrize(("code", "start", "requeued"), [(75, 0, True), (75, 20, False), (0, 0, False), (2, 0, False), (69, 0, False)])
def test_slurm_requeues_what_was_saved(cloud, code, start, requeued):
    cloud.tool("srun", f'#!/bin/sh\necho "srun $*"\nexit {code}\n')
    cloud.tool("scontrol", '#!/bin/sh\necho "scontrol $*"\n')
    (cloud.project / ".venv/bin").mkdir(parents=True)
    cloud._tool(cloud.project / ".venv/bin/python", "#!/bin/sh\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(cloud.project), "SLURM_RESTART_COUNT": str(start)}
    done = cloud.run("bash", "launch/slurm.sbatch", "a.py", "--out", "runs/x", **job)
    assert done.returncode == code, done.stderr
    assert "srun --kill-on-bad-exit=0 .venv/bin/python -m opsa_jax.train a.py --out runs/x --resume" in done.stdout
    assert ("scontrol requeue 7" in done.stdout) == requeued


def test_bad_input_of_slurm(cloud):
    fails(cloud.run("bash", "launch/slurm.sbatch", "a.py"), "not in a SLURM job", "sbatch launch/slurm.sbatch")
    fails(cloud.run("bash", "launch/slurm.sbatch", "a.py", "--resume"), "leave --resume out")
    fails(cloud.run("bash", "launch/slurm.sbatch", SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(cloud.project)), ".venv/bin/python is not there")


# ---- gke_jobset.yaml


def test_the_jobset_is_complete_and_consistent():
    (jobset,) = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"], jobset["metadata"]["name"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet", "opsa")
    spec = jobset["spec"]
    assert set(spec) == {"network", "failurePolicy", "replicatedJobs"} and spec["network"]["enableDNSHostnames"] is True
    assert spec["failurePolicy"]["maxRestarts"] > 0
    assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == 1 and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # Hosts times chips of a host are the chips of the topology.
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["completions"] == job["parallelism"] == x * y // chips and job["parallelism"] > 1
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    # A pod that saves and ends is not restarted alone, and bad input (exit code 2) ends the set.
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 300
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]}}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_command_of_the_jobset_is_a_training_command():
    from opsa_jax.recipes import parse_run

    (jobset,) = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
    command = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:3] == ["python", "-m", "opsa_jax.train"] and all(isinstance(word, str) for word in command)
    config, _ = parse_run([str(LAUNCH.parent / command[3]), *command[4:]], "train", "")
    assert config.resume and config.train.checkpoints.startswith("gs://") and config.mesh.fsdp == 16
