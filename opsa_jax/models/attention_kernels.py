"""Attention kernels of accelerators: splash on TPU, cuDNN on NVIDIA GPUs. Neither keeps the scores of all pairs.

Which one is chosen by the devices of the mesh that is set, not by the machine that traces, so that a program for a TPU can be
compiled ahead of time on a host without one. Under a mesh a kernel runs on each device's rows and heads (`jax.shard_map`): the
compiler cannot split it itself.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec as P

from opsa_jax.errors import UserError
from opsa_jax.parallel.mesh import current_shards
from opsa_jax.parallel.rules import mesh_shape, spec

LANES = 128
"""Columns are padded to a multiple of this for splash: the width of a TPU vector register."""
BLOCKS = (512, 384, 256, 128)
"""Tile sizes of splash, the largest that divides the columns is used."""


@dataclass(frozen=True)
class Case:
    """What decides whether a kernel can be used."""

    platform: str
    """cpu, tpu, gpu, or rocm for GPUs that are not NVIDIA's."""
    queries: int
    keys: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    batch_shards: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, q_BTNH: jax.Array, k_BKSH: jax.Array) -> "Case":
        """Of arrays under the mesh that is set."""
        (B, T, N, H), (_, K, S, _) = q_BTNH.shape, k_BKSH.shape
        return cls(mesh_platform(), T, S, B, N, K, H, q_BTNH.dtype.name, current_shards(), mesh_shape().get("tensor", 1))


def mesh_platform() -> str:
    """Platform of the devices of the mesh that is set (`jax.set_mesh`), of the default backend where none is."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform, kind = (device.platform, device.device_kind) if device else (jax.default_backend(), jax.devices()[0].device_kind)
    if platform in ("gpu", "cuda", "rocm"):
        return "rocm" if platform == "rocm" or "AMD" in kind or "Radeon" in kind else "gpu"
    return platform


def choose(wanted: str, case: Case) -> str:
    """xla, splash or cudnn. `auto` takes the kernel of the platform where it can be used; a name insists on it for T = S.

    >>> choose("auto", Case("tpu", 4096, 4096, 8, 32, 8, 128, "bfloat16"))
    'splash'
    >>> choose("auto", Case("tpu", 1, 4096, 8, 32, 8, 128, "bfloat16"))  # decoding
    'xla'

    Raises:
        UserError: a kernel asked for by name that cannot be used, with the reason.
    """
    if wanted == "xla" or case.queries != case.keys or case.queries == 1:
        return "xla"
    name = {"tpu": "splash", "gpu": "cudnn"}.get(case.platform, "xla") if wanted == "auto" else wanted
    if name == "xla":
        return name
    why = unsupported(name, case)
    if wanted == "auto" and name == "splash" and case.queries < LANES:
        return "xla"  # padding to a tile would cost more than the scores
    if why and wanted != "auto":
        raise UserError(f"--model.attention {name}: {why}; use auto or xla")
    return "xla" if why else name


def unsupported(name: str, case: Case) -> str | None:
    """Why a kernel cannot be used, or None."""
    if case.batch % case.batch_shards or case.heads % case.tensor or case.kv_heads % case.tensor:
        return (
            f"{case.batch} rows and {case.heads}/{case.kv_heads} heads do not divide over {case.batch_shards} batch shards "
            f"and tensor={case.tensor}"
        )
    if name == "splash":
        if case.platform not in ("tpu", "cpu"):  # on CPU it is interpreted, for tests
            return f"it is a TPU kernel, and the devices are {case.platform}"
        return f"head_dim {case.head_dim} is not a multiple of 64" if case.head_dim % 64 and case.platform == "tpu" else None
    if case.platform != "gpu":
        return f"it needs an NVIDIA GPU, and the devices are {case.platform}"
    if case.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, not {case.dtype}"
    return f"head_dim {case.head_dim} must be a multiple of 8 and at most 128" if case.head_dim % 8 or case.head_dim > 128 else None


def splash(q_BTNH, k_BKSH, v_BKSH, segments_BT, window: int) -> jax.Array:
    """Splash attention (block-sparse flash attention in Pallas). Padding columns see padding columns: finite, and read by nobody."""
    T, H, interpret = q_BTNH.shape[1], q_BTNH.shape[3], mesh_platform() == "cpu"
    more = -T % (BLOCKS[0] if 4 * BLOCKS[0] <= T else LANES)

    def local(q_BTNH, k_BKSH, v_BKSH, segments_BT):
        q_BNTH = (q_BTNH * H**-0.5).astype(q_BTNH.dtype).transpose(0, 2, 1, 3)  # splash does not scale
        q_BNTH, k_BKTH, v_BKTH = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (q_BNTH, k_BKSH, v_BKSH))
        segments = jnp.pad(segments_BT, ((0, 0), (0, more)))
        kernel = _splash_kernel(q_BNTH.shape[1], T + more, window, interpret)
        out_BNTH = jax.vmap(lambda q, k, v, s: kernel(q, k, v, splash_kernel.SegmentIds(s, s)))(q_BNTH, k_BKTH, v_BKTH, segments)
        return out_BNTH[:, :, :T].transpose(0, 2, 1, 3)

    return _per_device(local, q_BTNH, k_BKSH, v_BKSH, segments_BT)


@functools.lru_cache(maxsize=32)
def _splash_kernel(heads: int, columns: int, window: int, interpret: bool):
    """The kernel of `heads` heads with the same mask. Its tables are NumPy arrays: constants of whatever program uses it."""
    shape = (columns, columns)
    mask = splash_mask.LocalMask(shape, (window - 1, 0), 0) if window else splash_mask.CausalMask(shape)
    tile = next(size for size in BLOCKS if columns % size == 0)
    # Without all sizes of the backward pass there is no gradient.
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash_kernel.BlockSizes(**{f"block_{name}": tile for name in names})
    masks = splash_mask.MultiHeadMask([mask] * heads)

    def make():
        kernel = splash_kernel.make_splash_mha(masks, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        return jax.tree.map(np.asarray, kernel)

    # In a thread of its own, which has neither this one's trace nor its mesh: the devices of a mesh for ahead-of-time compilation do not
    # exist, and nothing can be put on them.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


def cudnn(q_BTNH, k_BKSH, v_BKSH, segments_BT, window: int, implementation: str = "cudnn") -> jax.Array:
    """cuDNN's flash attention through `jax.nn.dot_product_attention`.

    cuDNN knows causal masks, windows and padding on the right only; an explicit mask would be a [B, T, T] bias with a gradient. So rows
    are rolled until their tokens start at column 0 (`. . a b` becomes `a b . .`), and the result is rolled back. Neither order nor
    distance of tokens changes. It follows that a row must be one run of one segment, as all rows of training and prefill are.

    Args:
        implementation: `xla` computes the same by XLA, for tests on other devices.
    """
    T = q_BTNH.shape[1]

    def roll(x_BT, by_B):
        index_BT = (jnp.arange(T)[None] + by_B[:, None]) % T
        return jnp.take_along_axis(x_BT, index_BT[:, :, None, None], axis=1)

    def local(q_BTNH, k_BKSH, v_BKSH, segments_BT):
        token_BT = segments_BT > 0
        start_B, length_B = jnp.argmax(token_BT, axis=1), jnp.sum(token_BT, axis=1, dtype=jnp.int32)
        q, k, v = (roll(x, start_B) for x in (q_BTNH, k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)))
        out_BTNH = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, query_seq_lengths=length_B, key_value_seq_lengths=length_B,
            local_window_size=(window - 1, 0) if window else None, implementation=implementation,
        )  # fmt: skip
        return roll(out_BTNH, -start_B)

    return _per_device(local, q_BTNH, k_BKSH, v_BKSH, segments_BT)


def _per_device(local: Callable, q_BTNH, k_BKSH, v_BKSH, segments_BT):
    """`local` on every device's rows and heads."""
    if not mesh_shape():
        return local(q_BTNH, k_BKSH, v_BKSH, segments_BT)
    q_spec, kv_spec = spec("batch", None, "heads", None), spec("batch", "kv_heads", None, None)
    in_specs = (q_spec, kv_spec, kv_spec, P(*spec("batch"), None))
    return jax.shard_map(local, in_specs=in_specs, out_specs=q_spec, check_vma=False)(q_BTNH, k_BKSH, v_BKSH, segments_BT)


RUN: dict[str, Callable] = {"splash": splash, "cudnn": cudnn}
