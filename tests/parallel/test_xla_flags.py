"""Recommended flags are known to the compiler, and never override what is set."""

import os
import subprocess
import sys

from opsa_jax.parallel import xla_flags


def test_set_only_what_is_unset(monkeypatch):
    monkeypatch.setattr(xla_flags, "has_cuda_plugin", lambda: True)
    variables = {"XLA_FLAGS": "--xla_gpu_enable_pipelined_all_gather=false --xla_dump_to=/tmp/x"}
    xla_flags.set_flags(variables)
    flags = variables["XLA_FLAGS"].split()
    assert flags[:2] == ["--xla_gpu_enable_pipelined_all_gather=false", "--xla_dump_to=/tmp/x"]
    assert len(flags) == 2 + len(xla_flags.GPU_FLAGS) - 1
    assert variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
    again = dict(variables)
    xla_flags.set_flags(again)
    assert again == variables


def test_nothing_without_gpus(monkeypatch):
    monkeypatch.setattr(xla_flags, "has_cuda_plugin", lambda: False)
    variables: dict[str, str] = {}
    xla_flags.set_flags(variables)
    assert not variables


def test_the_compiler_knows_them():
    """XLA ends the process when it does not know a flag, so an outdated one would stop every run."""
    flags = " ".join(f"--{name}={value}" for name, value in xla_flags.GPU_FLAGS.items())
    script = [sys.executable, "-c", "import jax; print(jax.jit(lambda x: x + 1)(1))"]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "2", done.stderr[-500:]
