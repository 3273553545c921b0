"""The device mesh. It always exists, also on one device; its axes are data, fsdp and tensor, in this order."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from opsa_jax.config import MeshConfig
from opsa_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(cfg: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh with Auto axes over all devices; one axis of the config may be -1, which takes what the others leave.

    >>> dict(make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1), jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    known = math.prod(s for s in sizes if s != -1)
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh {tuple(sizes)} is not valid: axes are positive, and at most one of data, fsdp, tensor is -1")
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(s for s in sizes if s != -1) != len(devices) or -1 in sizes:
        raise UserError(
            f"mesh data={cfg.data} fsdp={cfg.fsdp} tensor={cfg.tensor} does not fit {len(devices)} devices: "
            "the product of the axes must equal the number of devices (use -1 for one axis to take what is left)"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Number of parts the batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of an array split along its first axis that are this process's, in order, on the host (waits for them).

    The counterpart of `jax.make_array_from_process_local_data`; copies of a row on several devices count once.
    """
    if x.is_fully_addressable:
        return np.asarray(x)
    rows = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(rows[start]) for start in sorted(rows)])
