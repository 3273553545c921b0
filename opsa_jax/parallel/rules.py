"""Logical axes and the mesh axes they are split over. Weights and activations name what an axis means; this file says where it lives."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# ZeRO-3: weights and optimizer state are split along `embed` over fsdp and along heads, ffn and vocabulary over tensor.
# Activations are split by batch over both data axes and are whole along d_model.
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    "experts": None,  # every device has a slice of each: of its width over tensor, of d_model over fsdp
    "layers": None,
    "head_dim": None,
    "rank": None,
    None: None,
}


def spec(*axes: str | None) -> PartitionSpec:
    """The `PartitionSpec` of an array whose dimensions have these logical axes.

    >>> tuple(spec("embed", "heads", "head_dim"))
    ('fsdp', 'tensor', None)

    Raises:
        ValueError: two dimensions would be split over one mesh axis, which no layout can do.
    """
    over = [RULES[a] for a in axes]
    used = [name for rule in over for name in ((rule,) if isinstance(rule, str) else rule or ())]
    if len(set(used)) != len(used):
        raise ValueError(f"logical axes {axes} collide: their rules {over} use a mesh axis twice; give one of them another name or rule")
    return PartitionSpec(*over)


def named(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """`spec` on a concrete mesh."""
    return NamedSharding(mesh, spec(*axes))


def mesh_shape() -> dict[str, int]:
    """Axis sizes of the mesh that is set (`jax.set_mesh`), empty where there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty or mesh.size == 1 else dict(mesh.shape)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin the layout of an intermediate value inside jit. Does nothing where no mesh is set (`jax.set_mesh`) or on one device."""
    if not mesh_shape():
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


GATHERED = "gathered"
"""Name of gathered weights for the policies of `jax.checkpoint`."""


def gather(x: jax.Array, *axes: str | None) -> jax.Array:
    """A weight with these logical axes, whole over fsdp and still split over tensor; its gradient comes back split as the weight is.

    So each device's part of the gradient is the sum of what all devices found for it: a reduce-scatter, not an all-reduce.
    """
    if mesh_shape().get("fsdp", 1) == 1 or "embed" not in axes:
        return x
    return checkpoint_name(_gather(x, axes), GATHERED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return constrain(constrain(x, *axes), *(None if axis == "embed" else axis for axis in axes))


_gather.defvjp(lambda x, axes: (_gather(x, axes), None), lambda axes, _, g: (constrain(g, *axes),))
