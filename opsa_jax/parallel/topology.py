"""Devices to compile for, present or not: a TPU slice by name (through libtpu's compiler), fake CPU devices, or the local GPUs."""

import contextlib
import os
import re
from dataclasses import dataclass
from typing import Any

from opsa_jax.errors import UserError, did_you_mean

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What a program can use of one chip. None where we know no figure: then nothing is estimated from it."""

    name: str
    hbm_bytes: int | None
    """Memory a program can have."""
    flops: float | None
    """Dense bfloat16 peak, FLOP/s."""
    hbm_bandwidth: float | None
    """Bytes/s."""
    ici_bandwidth: float | None
    """Bytes/s in one direction, over all of a chip's links to other chips."""


# Memory: the limit that libtpu 0.0.42 states when a program does not fit (less than the chip's nominal 16, 95 and 32 GB). Peaks, memory
# bandwidth and interconnect (1,600, 4,800 and 3,584 Gbit/s per chip, both directions; half of it is one direction): the vendor's figures,
# from memory. They enter the roofline only, not what fits.
CHIPS = {
    "v5e": Chip("TPU v5e", int(15.75 * GIB), 197e12, 819e9, 100e9),
    "v5p": Chip("TPU v5p", int(95.74 * GIB), 459e12, 2765e9, 300e9),
    "v6e": Chip("TPU v6e", int(31.25 * GIB), 918e12, 1640e9, 224e9),
}
# The same of NVIDIA GPUs, by what is in `device_kind`: data sheets (dense bfloat16, SXM parts; NVLink one direction). Memory is asked of
# the device.
GPUS = {
    "H200": Chip("H200", None, 989e12, 4800e9, 450e9),
    "H100": Chip("H100", None, 989e12, 3350e9, 450e9),
    "A100": Chip("A100", None, 312e12, 2039e9, 300e9),
}
SLICES = {
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
}
"""Slices that are offered; v5p also in other multiples of four chips."""


@dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    name: str
    platform: str
    """tpu, cpu or gpu."""
    chip: Chip
    devices: list[Any]


def get_topology(name: str) -> Topology:
    """The devices of `v5e:4x4`, `v5p:2x2x1`, `v6e:8x8`, `cpu:8` or `gpu`. Call it before jax starts its first backend.

    Raises:
        UserError: no such topology (with the nearest), libtpu is not installed, or no GPU is here.
    """
    kind, _, shape = name.partition(":")
    if kind in SLICES:
        return _tpu(name, kind, shape)
    if kind == "cpu" and re.fullmatch(r"[1-9]\d{0,3}", shape or "1"):
        return _cpu(name, int(shape or 1))
    if name == "gpu":
        return _gpu()
    known = [f"{k}:{s}" for k, shapes in SLICES.items() for s in shapes] + ["cpu:8", "gpu"]
    raise UserError(f"--topology {name}: unknown{did_you_mean(name, known)}")


def _tpu(name: str, kind: str, shape: str) -> Topology:
    sizes = [int(x) for x in shape.split("x")] if re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}", shape) else []
    whole = len(sizes) == 3 and sizes[0] % 2 == sizes[1] % 2 == 0  # hosts hold 2x2x1 chips
    if shape not in SLICES[kind] and not (kind == "v5p" and whole):
        raise UserError(f"--topology {name}: {kind} has no slice of shape {shape!r}{did_you_mean(shape, SLICES[kind])}")
    # libtpu looks for the machine it is on; here it only compiles, beside other processes that do.
    for variable, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
    }.items():  # fmt: skip
        os.environ.setdefault(variable, value)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError(
            f"--topology {name}: TPU's compiler is not installed; pip install 'opsa_jax[tpu]' (or libtpu alone, which runs on any "
            "x86-64 Linux machine)"
        ) from None
    from jax.experimental import topologies

    options = {"chips_per_host_bounds": [1, 1, 1]} if shape == "1x1" else {}
    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as e:
        raise UserError(f"--topology {name}: libtpu does not know it ({' '.join(str(e).split())[:200]})") from None
    return Topology(name, "tpu", CHIPS[kind], devices)


def _cpu(name: str, count: int) -> Topology:
    import jax

    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # jax has started already; perhaps with enough devices
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"--topology {name}: this process already runs with {len(devices)} CPU devices")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
    return Topology(name, "cpu", Chip("CPU device", memory, None, None, None), devices[:count])


def _gpu() -> Topology:
    import jax

    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        raise UserError(
            "--topology gpu: jax finds no GPU here (pip install 'opsa_jax[cuda]'); programs for GPUs are compiled on a machine with one"
        ) from None
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    found = next((chip for name, chip in GPUS.items() if name in devices[0].device_kind), None)
    figures = (found.flops, found.hbm_bandwidth, found.ici_bandwidth) if found else (None, None, None)
    return Topology(f"gpu:{len(devices)}", "gpu", Chip(devices[0].device_kind, memory, *figures), devices)
