"""Compiler flags and memory settings for accelerators, in one place, each with its reason. A variable or flag that is already set wins.

TPU: none. What is commonly set by hand is on by default in libtpu 0.0.42: in the compiled text of our update the gathering of weights
is spread over the matrix products before it (async collective fusion), and gradients leave in windowed products.
"""

import importlib.util
import os
import pkgutil
from collections.abc import MutableMapping

GPU_FLAGS = {
    # Weights are gathered and gradients scattered block by block (ZeRO-3). These let a block's transfers run while its neighbour computes:
    # the scheduler that knows how long things take ...
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    # ... and transfers moved across the borders of the layer scan's iterations, which it cannot do by itself.
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
}
GPU_ENVIRONMENT = {
    # jax takes 75 % of a GPU's memory unless told otherwise; a training process has it to itself. The rest is for CUDA, NCCL and cuDNN.
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
}


def set_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what is recommended and not set already. Call it before jax starts its first backend; it does nothing without jax's CUDA plugin.

    >>> set_flags(variables := {"XLA_FLAGS": "--xla_gpu_enable_pipelined_all_gather=false"})
    >>> "all_gather=true" in variables["XLA_FLAGS"]
    False
    """
    if not has_cuda_plugin():
        return
    given = environment.get("XLA_FLAGS", "")
    missing = [f"--{name}={value}" for name, value in GPU_FLAGS.items() if f"--{name}" not in given]
    environment["XLA_FLAGS"] = " ".join([*given.split(), *missing])
    for name, value in GPU_ENVIRONMENT.items():
        environment.setdefault(name, value)


def has_cuda_plugin() -> bool:
    """Whether jax would find NVIDIA GPUs (`pip install 'opsa_jax[cuda]'`); jax is not imported for it."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    import jax_plugins

    return any(m.name.startswith("xla_cuda") for m in pkgutil.iter_modules(jax_plugins.__path__))
