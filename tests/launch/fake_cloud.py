"""A Cloud TPU on this machine: `gcloud` that keeps states in files and runs what is meant for the workers in a folder.

Files of the folder `FAKE`: calls (what gcloud was asked), tpu-vm and queued-resources (states, one per line; all but the last are used
once), vm (home of the slice's one worker), gs (object store), codes (exit codes of training, one per start), trained (its commands).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"

GCLOUD = f"""#!{sys.executable}
import json, os, shutil, subprocess, sys
from pathlib import Path

fake, args = Path(os.environ["FAKE"]), sys.argv[1:]
with open(fake / "calls", "a") as f:
    f.write(json.dumps(args) + "\\n")

def local(path):
    return str(path).replace("gs://", str(fake / "gs") + "/")

def new_vm():
    shutil.rmtree(fake / "vm", ignore_errors=True)
    shutil.copytree(fake / "template", fake / "vm")
    (fake / "tpu-vm").write_text("READY")

if args[:2] == ["config", "get-value"]:
    print("(unset)")
elif args[:2] == ["storage", "ls"]:
    sys.exit(not os.path.exists(local(args[2])))
elif args[:2] == ["storage", "rsync"]:
    shutil.copytree(local(args[-2]), local(args[-1]), dirs_exist_ok=True)
else:
    group, verb = args[2:4]
    state = fake / group
    if verb == "describe":
        states = state.read_text().splitlines() if state.exists() else ["ABSENT"]
        if states[0] == "DENIED":
            sys.exit("ERROR: (gcloud) PERMISSION_DENIED: tpu.nodes.get is\\nnot granted")
        if len(states) > 1:
            state.write_text("\\n".join(states[1:]))
        if states[0] == "ABSENT":
            sys.exit("ERROR: (gcloud) NOT_FOUND: no such thing")
        print(states[0])
    elif verb == "create":
        if group == "queued-resources":
            state.write_text("WAITING_FOR_RESOURCES\\nPROVISIONING\\nACTIVE")
        new_vm()
    elif verb == "delete":
        state.unlink(missing_ok=True)
        (fake / "tpu-vm").unlink(missing_ok=True)
    elif verb == "scp":
        source, target = (str(fake / "vm" / p.partition(":")[2]) if p.startswith("opsa:") else p for p in args[4:6])
        shutil.copytree(source, Path(target) / Path(source).name) if os.path.isdir(source) else shutil.copy(source, target)
    elif verb == "ssh":
        command = next(a for a in args if a.startswith("--command=")).removeprefix("--command=")
        sys.exit(subprocess.run(["bash", "-c", command], cwd=fake / "vm").returncode)
"""

# Training: takes the next exit code; `lost` is a slice that is taken away, `wait` is one that saves when told to stop.
PYTHON = """#!/usr/bin/env bash
[[ $2 != pip ]] || exit 0
printf '%s\\n' "$*" >>"$FAKE/trained"
while [[ $1 != --out ]]; do shift; done
mkdir -p "$2" && echo '{}' >"$2/config.json" && echo part >>"$2/metrics.jsonl"
code=$(head -n 1 "$FAKE/codes")
sed -i 1d "$FAKE/codes"
if [[ $code == lost ]]; then
  echo PREEMPTED >"$FAKE/tpu-vm"
  code=69
elif [[ $code == wait ]]; then
  trap 'echo saved; exit 75' TERM
  echo waiting
  for _ in {1..300}; do sleep 0.1; done
fi
echo "trained, $code"
exit "$code"
"""


class Cloud:
    """A project folder with the launch scripts, and a PATH on which `gcloud` and `curl` are fakes."""

    def __init__(self, folder: Path):
        self.fake, self.project, bin = folder / "fake", folder / "project", folder / "bin"
        shutil.copytree(LAUNCH, self.project / "launch")
        (self.fake / "template/opsa_jax/.venv/bin").mkdir(parents=True)
        bin.mkdir()
        self._tool(self.fake / "template/opsa_jax/.venv/bin/python", PYTHON)
        self._tool(bin / "gcloud", GCLOUD)
        self._tool(bin / "curl", "#!/bin/sh\necho 0\n")
        here = {"FAKE": str(self.fake), "OPSA_POLL": "0", "PATH": f"{bin}:/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder)}
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("CLOUDSDK", "SLURM", "OPSA"))} | here

    @staticmethod
    def _tool(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def tool(self, name: str, text: str) -> None:
        """A further command on the PATH."""
        self._tool(self.project.parent / "bin" / name, text)

    def write(self, name: str, *lines: str) -> None:
        (self.fake / name).write_text("\n".join(lines))

    def read(self, name: str) -> list[str]:
        path = self.fake / name
        return path.read_text().splitlines() if path.exists() else []

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess:
        """A command in the project folder."""
        return subprocess.run(args, cwd=self.project, env=self.env | env, capture_output=True, text=True, timeout=60)

    def tpu(self, *args: str, **env: str) -> subprocess.CompletedProcess:
        return self.run("bash", "launch/tpu_vm.sh", *args, **env)
