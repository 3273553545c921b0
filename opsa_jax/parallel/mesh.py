"""The device mesh. It always exists, also on one device; its axes are data, fsdp and tensor, in this order."""

import functools
import math
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opsa_jax.config import MeshConfig
from opsa_jax.errors import UserError
from opsa_jax.parallel.rules import RULES, mesh_shape, spec

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
        nearest = _flags(nearest_mesh(tuple(sizes), len(devices)))
        raise UserError(
            f"mesh data={cfg.data} fsdp={cfg.fsdp} tensor={cfg.tensor} does not fit {len(devices)} devices: "
            f"the product of the axes must equal the number of devices; nearest that does: {nearest} (-1 for one axis takes what is left)"
        )
    types = (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # no product of the slice's own axes has these sizes, such as 2 x 32 on 8 x 8: one of them is split
        return Mesh(create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True), AXES, axis_types=types)


def nearest_mesh(wanted: tuple[int, int, int], devices: int, sizes: Iterable[tuple[str, int]] = (), batch: int = 0):
    """The (data, fsdp, tensor) of `devices` devices nearest to `wanted` (in factors) that divides the sizes and the batch, or None.

    Args:
        wanted: a -1 counts as 1.
        sizes: (logical axis, size) of the dimensions of weights.
        batch: rows that are split at a time; 0 for any.

    >>> nearest_mesh((1, 2, 8), 16, [("kv_heads", 4), ("embed", 64)], batch=32)
    (1, 4, 4)
    """
    sizes = list(sizes)
    fitting = [
        (data, fsdp, devices // (data * fsdp))
        for data in range(1, devices + 1)
        for fsdp in range(1, devices // data + 1)
        if devices % (data * fsdp) == 0
    ]
    fitting = [m for m in fitting if batch % (m[0] * m[1]) == 0 and not _uneven(dict(zip(AXES, m, strict=True)), sizes)]
    return min(fitting, key=lambda m: sum(abs(math.log(a / max(b, 1))) for a, b in zip(m, wanted, strict=True)), default=None)


def check_mesh(mesh: Mesh, sizes: Iterable[tuple[str, int]], batch: int, batch_flag: str) -> None:
    """Weights and batch must divide over the mesh: nothing is padded.

    Args:
        sizes: (logical axis, size) of the dimensions of all weights.
        batch: rows that are split at a time, as `batch_flag` sets them.

    Raises:
        UserError: what does not divide, with the nearest mesh that works, and the nearest batch.
    """
    sizes, shape = list(sizes), tuple(mesh.shape[a] for a in AXES)
    uneven, shards = _uneven(mesh.shape, sizes), batch_shards(mesh)
    if not uneven and batch % shards == 0:
        return
    other = nearest_mesh(shape, mesh.size, sizes, batch)
    if uneven:
        what = f"mesh data={shape[0]} fsdp={shape[1]} tensor={shape[2]} does not divide the model: {', '.join(uneven)}"
        if other is None and (weights_only := nearest_mesh(shape, mesh.size, sizes)):
            shards = weights_only[0] * weights_only[1]
            raise UserError(f"{what}; nearest that does: {_flags(weights_only)} with {batch_flag} {_nearest_multiple(batch, shards)}")
        hint = f"nearest that does: {_flags(other)}" if other else f"no mesh of {mesh.size} devices does: use fewer"
        raise UserError(f"{what}; {hint}")
    hint = f", or another mesh: {_flags(other)}" if other else ""
    nearest = _nearest_multiple(batch, shards)
    raise UserError(f"{batch_flag} {batch} does not divide over {shards} shards (data * fsdp); nearest that does: {nearest}{hint}")


def _uneven(shape: Mapping[str, int], sizes: Iterable[tuple[str, int]]) -> list[str]:
    """Dimensions that a mesh does not divide, in words."""
    found = {(axis, size, RULES[axis]) for axis, size in sizes if isinstance(RULES[axis], str)}
    return [f"{axis}={size} over {over}={shape[over]}" for axis, size, over in sorted(found) if size % shape[over]]


def _nearest_multiple(n: int, of: int) -> int:
    return max(round(n / of), 1) * of


def _flags(shape: tuple[int, int, int] | None) -> str:
    return " ".join(f"--mesh.{name} {n}" for name, n in zip(AXES, shape or (), strict=False))


def batch_shards(mesh: Mesh) -> int:
    """Number of parts the batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def current_shards() -> int:
    """`batch_shards` of the mesh that is set (`jax.set_mesh`), 1 where none is."""
    shape = mesh_shape()
    return shape.get("data", 1) * shape.get("fsdp", 1)


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below n.

    >>> round_up(9, 8), round_up(8, 8)
    (16, 8)
    """
    return -(-n // multiple) * multiple


def own_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which of `rows` rows of a batch lie on this process's devices, in order. Processes that share a tensor group hold the same."""
    index = NamedSharding(mesh, spec("batch")).addressable_devices_indices_map((rows,))
    return sorted({row for (part,) in index.values() for row in range(rows)[part]})


def rows_to_devices(mesh: Mesh, mine: np.ndarray, rows: int) -> jax.Array:
    """A global array of `rows` rows, split over the batch axes, from the rows that are this process's (`own_rows`)."""
    place = {row: i for i, row in enumerate(own_rows(mesh, rows))}

    def part(index):
        return mine[[place[row] for row in range(rows)[index[0]]]]

    return jax.make_array_from_callback((rows, *mine.shape[1:]), NamedSharding(mesh, spec("batch")), part)


def whole(mesh: Mesh, arrays):
    """The same arrays with every row on every device, so that each process can read them; as they are in a single process."""
    return arrays if jax.process_count() == 1 else _replicate(mesh)(arrays)


@functools.cache
def _replicate(mesh: Mesh):
    return jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, PartitionSpec()))


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of an array split along its first axis that are this process's, in order, on the host (waits for them).

    The counterpart of `rows_to_devices`; copies of a row on several devices count once.
    """
    if x.is_fully_addressable:
        return np.asarray(x)
    rows = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(rows[start]) for start in sorted(rows)])
