"""Starts real training commands as processes of their own, one or several that run together over loopback."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
PATIENCE = 240  # seconds after which a test gives up: far beyond what is needed, also on a busy machine


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def recipe(folder: Path, body: str = "", **fields: str) -> Path:
    """A recipe file of the tiny run in `folder`; `fields` are Python expressions for `tiny.run_config`."""
    file = folder / f"recipe{len(list(folder.glob('recipe*.py')))}.py"
    changes = "".join(f", {name}={value}" for name, value in fields.items())
    file.write_text(
        f"from pathlib import Path\nfrom opsa_jax import config as c\nfrom tiny import run_config\n{body}\n"
        f"def get_config():\n    return run_config(Path({str(folder)!r}){changes})\n"
    )
    return file


class Job:
    """Processes of one run. Used as a context: whatever is left of them is killed at the end."""

    def __init__(self, folder: Path, file: Path, count: int = 1, devices: int = 1, *argv: str, first: int = 0, port: int = 0, only=None):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"opsa_jax-test-programs-{os.getuid()}"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "PYTHONPATH": str(HERE),
            "HF_HUB_OFFLINE": "1",
        }
        port = port or free_port()
        self._logs, self.processes = [], []
        for i in range(count) if only is None else only:
            command = [sys.executable, "-m", "opsa_jax.train", str(file), *argv]
            if count > 1:
                command += ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.processes", str(count)]
                command += ["--distributed.process-id", str(i)]
            log = folder / f"log{len(list(folder.glob('log*')))}"
            self._logs.append(log)
            with log.open("w") as f:
                self.processes.append(subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=environment, cwd=folder))

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        for p in self.processes:
            if p.poll() is None:
                p.kill()
            p.wait()

    def log(self, i: int = 0) -> str:
        return self._logs[i].read_text()

    def wait(self) -> list[int]:
        """Exit codes."""
        end = time.monotonic() + PATIENCE
        return [p.wait(timeout=max(1, end - time.monotonic())) for p in self.processes]

    def until(self, happened, i: int = 0) -> None:
        """Wait until `happened()`, while process i runs."""
        end = time.monotonic() + PATIENCE
        while not happened():
            assert self.processes[i].poll() is None, self.log(i)
            assert time.monotonic() < end, self.log(i)
            time.sleep(0.02)

    def signal(self, number: signal.Signals = signal.SIGTERM, i: int = 0) -> None:
        self.processes[i].send_signal(number)


def succeeded(job: Job) -> bool:
    codes = job.wait()
    assert codes == [0] * len(codes), (codes, *(job.log(i) for i in range(len(codes))))
    return True
