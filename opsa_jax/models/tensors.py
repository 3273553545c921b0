"""Trees of declared weights to and from safetensors files, one tensor at a time. Nothing here can run code from a file."""

import functools
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opsa_jax.errors import UserError
from opsa_jax.models.params import Weight, map_weights
from opsa_jax.parallel.rules import named

FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not yet read."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    """numpy name: float64, float32, bfloat16 or float16."""

    def read(self) -> np.ndarray:
        # pread, not mmap: a mapped file would stay in this process's memory while its other tensors are read.
        with safe_open(self.file, framework="np", backend="pread") as f:
            return f.get_tensor(self.key)


def scan(files: list[Path]) -> dict[str, Stored]:
    """What safetensors files hold, by key; reads only their headers.

    Raises:
        UserError: a missing, truncated or damaged file, a tensor in two files, or one that is not of floats (quantised checkpoints).
    """
    found: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file.parent}: the file {file.name} of the checkpoint is missing; copy or download it again")
        try:
            with safe_open(file, framework="np", backend="pread") as f:
                headers = [(key, f.get_slice(key)) for key in f.keys()]  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file}: not a complete safetensors file ({e}); copy or download it again") from None
        for key, header in headers:
            dtype = FLOATS.get(header.get_dtype())
            if dtype is None and not key.endswith(IGNORED):
                allowed = ", ".join(FLOATS)
                raise UserError(f"{file}: tensor {key} has dtype {header.get_dtype()}; allowed: {allowed} (quantised checkpoints are not)")
            if key in found:
                raise UserError(f"{file}: tensor {key} is also in {found[key].file.name}; remove one of the two files")
            found[key] = Stored(file, key, tuple(header.get_shape()), dtype)
    return {key: stored for key, stored in found.items() if not key.endswith(IGNORED)}


# Buffers that old versions of transformers saved; they follow from the config.
IGNORED = ("rotary_emb.inv_freq",)


def load_tree(stored: dict[str, Stored], declared, dtype: str, mesh: Mesh, where: Path):
    """The arrays of a tree of declarations, sharded over the mesh.

    Stacked weights are filled layer by layer in place, so that host memory holds one layer of one weight at a time, and each process
    transfers only the parts of its own devices.

    Args:
        stored: from `scan`; exactly the keys that are declared.
        declared: a pytree of `Weight`.
        dtype: of the arrays; conversion rounds to nearest even.
        where: folder to name in errors.

    Raises:
        UserError: keys that are missing, unexpected, or of the wrong shape; dimensions that the mesh does not divide.
    """
    weights = jax.tree.leaves(declared, is_leaf=lambda x: isinstance(x, Weight))
    expected = {key: w for w in weights for key in w.hf_keys}
    if missing := [key for key in expected if key not in stored]:
        raise UserError(f"{where}: missing from the checkpoint: {_some(missing)}; is config.json of another model?")
    if unexpected := sorted(set(stored) - set(expected)):
        raise UserError(f"{where}: not part of the architecture that config.json describes: {_some(unexpected)}")
    for key, w in expected.items():
        if stored[key].shape != w.stored_shape:
            raise UserError(f"{stored[key].file}: tensor {key} has shape {stored[key].shape}; config.json says {w.stored_shape}")
    for w in weights:
        _check_divides(w, mesh)
    return map_weights(lambda w: _load(stored, w, jnp.dtype(dtype), mesh), declared)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _check_divides(w: Weight, mesh: Mesh) -> None:
    for size, axis, over in zip(w.shape, w.axes, named(mesh, *w.axes).spec):
        parts = 1 if over is None else mesh.shape[over]
        if size % parts:
            raise UserError(f"mesh axis {over}={parts} does not divide {axis}={size} of {w.hf_key}; choose a divisor of {size}")


def _load(stored: dict[str, Stored], w: Weight, dtype, mesh: Mesh) -> jax.Array:
    views = (_from_stored(stored[key].read(), w) for key in w.hf_keys)
    if not w.stack:
        return _put(next(views), dtype, named(mesh, *w.axes))
    sharding = named(mesh, *w.axes)
    stacked = jnp.zeros(w.shape, dtype, device=sharding)
    for l in range(w.shape[0]):
        layer = next(views) if len(w.stack) == 1 else np.stack(list(itertools.islice(views, w.stack[1])))
        # Wait: transfers that queue up would keep their host copies.
        layer = _put(layer, dtype, named(mesh, *w.axes[1:]))
        stacked = _write_layer(stacked, layer, l, sharding).block_until_ready()
    return stacked


def _put(view: np.ndarray, dtype, sharding: NamedSharding) -> jax.Array:
    host = np.array(view, dtype, order="C")
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write_layer(stacked, layer, l, sharding):
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_index_in_dim(stacked, layer, l, 0), sharding)


@jax.jit
def _read_one(stacked, index):
    return stacked[index]


def _from_stored(tensor: np.ndarray, w: Weight) -> np.ndarray:
    """One stored tensor as (one layer, or one expert of a layer, of) our weight; a view."""
    tensor = tensor.reshape(w.split or w.stored_shape)
    return tensor.transpose(w.perm) if w.perm else tensor


def _to_stored(array: np.ndarray, w: Weight) -> np.ndarray:
    """Inverse of `_from_stored`."""
    return (array.transpose(np.argsort(w.perm)) if w.perm else array).reshape(w.stored_shape)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when the block ends well, and vanishes otherwise: never half-written.

    With several processes all enter; the first one makes and renames, and none leaves before that is done.

    Raises:
        UserError: `folder` exists, or its parent cannot be written to.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder or remove it first")
    partial = folder.parent / f".{folder.name}.partial"
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as e:
            raise UserError(f"cannot create {folder}: {e}") from None
    try:
        yield partial
        if first:
            partial.rename(folder)
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"wrote {folder}")


@dataclass(frozen=True)
class _Part:
    """One tensor to write: a weight, or one layer (one expert of a layer) of a stacked weight."""

    key: str
    weight: Weight
    array: Any
    index: tuple[int, ...]
    """Place in `weight.stack`."""

    @property
    def size(self) -> int:
        return math.prod(self.weight.stored_shape)

    def gather(self, dtype: str) -> np.ndarray:
        """The stored form on this host; under several processes all take part."""
        array = _read_one(self.array, self.index) if self.index else self.array
        if not array.is_fully_addressable:
            array = multihost_utils.process_allgather(array, tiled=True)
        return np.ascontiguousarray(_to_stored(np.asarray(array), self.weight), dtype)


def save_tree(declared, tree, folder: Path, dtype: str, stem: str = "model", max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a tree of arrays as `stem`.safetensors, or as numbered shards with `stem`.safetensors.index.json.

    Host memory holds one shard at a time. All processes call it (arrays are gathered tensor by tensor); the first one writes.

    Args:
        declared: a pytree of `Weight`.
        tree: the arrays, in the same structure.
        dtype: of the stored tensors.
        max_shard_bytes: largest file, unless a single tensor is larger.
    """
    itemsize = jnp.dtype(dtype).itemsize
    shards = _plan(_parts(declared, tree), itemsize, max_shard_bytes)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        tensors = {part.key: part.gather(dtype) for part in shard}
        if jax.process_index() == 0:
            save_file(tensors, folder / name, metadata={"format": "pt"})
            (folder / name).chmod(folder.stat().st_mode & 0o666)  # save_file leaves it readable by its owner only
    if len(shards) > 1 and jax.process_index() == 0:
        weight_map = {part.key: name for name, shard in zip(names, shards) for part in shard}
        total = itemsize * sum(part.size for shard in shards for part in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _parts(declared, tree) -> list[_Part]:
    """Every tensor of the checkpoint, layer by layer so that a reader of one layer opens one file."""
    pairs: list[tuple[Weight, Any]] = []
    map_weights(lambda w, array: pairs.append((w, array)), declared, tree)
    parts = [_Part(key, w, array, index) for w, array in pairs for key, index in zip(w.hf_keys, np.ndindex(w.stack))]
    return sorted(parts, key=lambda part: part.index[:1])


def _plan(parts: list[_Part], itemsize: int, max_bytes: int) -> list[list[_Part]]:
    """Parts in files of at most `max_bytes`."""
    shards: list[list[_Part]] = [[]]
    filled = 0
    for part in parts:
        if shards[-1] and filled + part.size * itemsize > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += part.size * itemsize
    return shards
