"""Weights of a decoder, each declared once: shape, logical axes, initialiser, Hugging Face key and layout.

The abstract tree, shardings, initialisation and the Hugging Face import and export are derived from `declare`.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from opsa_jax.models.config import DecoderConfig
from opsa_jax.parallel.rules import named


@dataclass(frozen=True)
class Weight:
    """Declaration of one weight. Block weights carry the leading layer axis, those of experts the axis of experts behind it."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axis of each dimension (parallel/rules.py)."""
    hf_key: str
    """Key in the checkpoint; `{l}` and `{e}` stand for the numbers of layer and expert of stacked weights."""
    split: tuple[int, ...] = ()
    """The stored tensor reshaped to this (its own shape when empty) ..."""
    perm: tuple[int, ...] = ()
    """... and transposed like this is our weight (one layer, or one expert of a layer, of it when stacked)."""
    init: str = "normal"
    """normal (standard deviation 0.02), ones, zeros or (adapters) kaiming."""

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading dimensions over which the checkpoint has one tensor each: (), (layers,) or (layers, experts)."""
        return self.shape[: sum(axis in ("layers", "experts") for axis in self.axes[:2])]

    @property
    def hf_keys(self) -> list[str]:
        """Keys in the checkpoint, in the order of `stack`.

        >>> Weight((2, 2, 8, 4), ("layers", "experts", "embed", "ffn"), "{l}.{e}").hf_keys
        ['0.0', '0.1', '1.0', '1.1']
        """
        return [self.hf_key.format(**dict(zip("le", index))) for index in np.ndindex(self.stack)]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape under each key: `split` with heads and head_dim as one dimension.

        >>> Weight((2, 8, 4, 3), ("layers", "embed", "heads", "head_dim"), "{l}", split=(4, 3, 8), perm=(2, 0, 1)).stored_shape
        (12, 8)
        """
        shape, axes = self.shape[len(self.stack) :], self.axes[len(self.stack) :]
        stored: list[int] = []
        previous = None
        for i in sorted(range(len(shape)), key=lambda i: self.perm[i] if self.perm else i):
            if axes[i] == "head_dim" and previous in ("heads", "kv_heads"):
                stored[-1] *= shape[i]
            else:
                stored.append(shape[i])
            previous = axes[i]
        return tuple(stored)

    @property
    def decays(self) -> bool:
        """Weight decay applies to matrices, not to norm scales and biases."""
        return self.init == "normal"


@struct.dataclass
class Lora:
    """One adapter: delta = a @ b * alpha / rank, with the scale kept apart so that a and b are what PEFT stores."""

    a: Any
    """[L, inputs..., r]"""
    b: Any
    """[L, r, outputs...]"""
    scale: float = struct.field(pytree_node=False, default=1.0)

    def scaled_b(self, dtype) -> jax.Array:
        return self.b.astype(dtype) * jnp.asarray(self.scale, dtype)


@struct.dataclass
class Layers:
    """All blocks, stacked on a leading L axis. None where the family has no such weight."""

    attn_norm_LD: Any
    wq_LDNH: Any
    wk_LDKH: Any
    wv_LDKH: Any
    wo_LNHD: Any
    mlp_norm_LD: Any
    gate_LDF: Any = None
    up_LDF: Any = None
    down_LFD: Any = None
    router_LDE: Any = None
    gate_LEDF: Any = None
    up_LEDF: Any = None
    down_LEFD: Any = None
    bq_LNH: Any = None
    bk_LKH: Any = None
    bv_LKH: Any = None
    bo_LD: Any = None
    q_norm_LH: Any = None
    k_norm_LH: Any = None
    b_gate_LF: Any = None
    b_up_LF: Any = None
    b_down_LD: Any = None
    lora: dict[str, Lora] | None = None
    """Adapters by projection name (q, k, v, o, gate, up, down); see models/lora.py."""


@struct.dataclass
class Params:
    """A decoder's weights: a frozen pytree."""

    embed_VD: Any
    layers: Layers
    final_norm_D: Any
    head_DV: Any = None
    """None when the head is the transposed embedding."""


def declare(cfg: DecoderConfig) -> Params:
    """The tree of `Weight` declarations of an architecture."""
    L, D, N, K, H, F, V = cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.d_ff, cfg.vocab_size
    heads, kv = ("heads", "head_dim"), ("kv_heads", "head_dim")

    def block(shape, axes, key, split=(), perm=(), init="normal") -> Weight:
        return Weight((L, *shape), ("layers", *axes), f"model.layers.{{l}}.{key}", split, perm, init)

    if E := cfg.n_experts:
        expert = "mlp.experts.{e}"
        feed_forward = {
            "router_LDE": block((D, E), ("embed", "experts"), "mlp.gate.weight", perm=(1, 0)),
            "gate_LEDF": block((E, D, F), ("experts", "embed", "ffn"), f"{expert}.gate_proj.weight", perm=(1, 0)),
            "up_LEDF": block((E, D, F), ("experts", "embed", "ffn"), f"{expert}.up_proj.weight", perm=(1, 0)),
            "down_LEFD": block((E, F, D), ("experts", "ffn", "embed"), f"{expert}.down_proj.weight", perm=(1, 0)),
        }
    else:
        feed_forward = {
            "gate_LDF": block((D, F), ("embed", "ffn"), "mlp.gate_proj.weight", perm=(1, 0)),
            "up_LDF": block((D, F), ("embed", "ffn"), "mlp.up_proj.weight", perm=(1, 0)),
            "down_LFD": block((F, D), ("ffn", "embed"), "mlp.down_proj.weight", perm=(1, 0)),
        }

    def bias(present: bool, shape, axes, key) -> Weight | None:
        return block(shape, axes, key, split=shape, init="zeros") if present else None

    def norm(present: bool, size, axis, key) -> Weight | None:
        return block((size,), (axis,), key, init="ones") if present else None

    layers = Layers(
        attn_norm_LD=norm(True, D, "embed", "input_layernorm.weight"),
        wq_LDNH=block((D, N, H), ("embed", *heads), "self_attn.q_proj.weight", (N, H, D), (2, 0, 1)),
        wk_LDKH=block((D, K, H), ("embed", *kv), "self_attn.k_proj.weight", (K, H, D), (2, 0, 1)),
        wv_LDKH=block((D, K, H), ("embed", *kv), "self_attn.v_proj.weight", (K, H, D), (2, 0, 1)),
        wo_LNHD=block((N, H, D), (*heads, "embed"), "self_attn.o_proj.weight", (D, N, H), (1, 2, 0)),
        mlp_norm_LD=norm(True, D, "embed", "post_attention_layernorm.weight"),
        bq_LNH=bias(cfg.qkv_bias, (N, H), heads, "self_attn.q_proj.bias"),
        bk_LKH=bias(cfg.qkv_bias, (K, H), kv, "self_attn.k_proj.bias"),
        bv_LKH=bias(cfg.qkv_bias, (K, H), kv, "self_attn.v_proj.bias"),
        bo_LD=bias(cfg.o_bias, (D,), ("embed",), "self_attn.o_proj.bias"),
        q_norm_LH=norm(cfg.qk_norm, H, "head_dim", "self_attn.q_norm.weight"),
        k_norm_LH=norm(cfg.qk_norm, H, "head_dim", "self_attn.k_norm.weight"),
        b_gate_LF=bias(cfg.mlp_bias, (F,), ("ffn",), "mlp.gate_proj.bias"),
        b_up_LF=bias(cfg.mlp_bias, (F,), ("ffn",), "mlp.up_proj.bias"),
        b_down_LD=bias(cfg.mlp_bias, (D,), ("embed",), "mlp.down_proj.bias"),
        **feed_forward,
    )
    return Params(
        embed_VD=Weight((V, D), ("vocab", "embed"), "model.embed_tokens.weight"),
        layers=layers,
        final_norm_D=Weight((D,), ("embed",), "model.norm.weight", init="ones"),
        head_DV=None if cfg.tie_embeddings else Weight((D, V), ("embed", "vocab"), "lm_head.weight", perm=(1, 0)),
    )


def axis_sizes(cfg: DecoderConfig) -> list[tuple[str, int]]:
    """(logical axis, size) of every named dimension of the weights, each once."""
    found: set[tuple[str, int]] = set()
    map_weights(lambda w: found.update((a, n) for a, n in zip(w.axes, w.shape, strict=True) if a), declare(cfg))
    return sorted(found)


def map_weights(fn, tree, *rest):
    """`jax.tree.map` over declarations."""
    return jax.tree.map(fn, tree, *rest, is_leaf=lambda x: isinstance(x, Weight))


def abstract_params(cfg: DecoderConfig, dtype="float32", mesh: Mesh | None = None) -> Params:
    """Shapes, dtypes and (with a mesh) shardings, nothing allocated."""

    def leaf(w: Weight):
        return jax.ShapeDtypeStruct(w.shape, jnp.dtype(dtype), sharding=named(mesh, *w.axes) if mesh is not None else None)

    return map_weights(leaf, declare(cfg))


def init_params(cfg: DecoderConfig, key: jax.Array, dtype="float32") -> Params:
    """Random weights: normal(0, 0.02) matrices, unit norms, zero biases. The value of a weight depends only on key and its place."""
    leaves, tree = jax.tree.flatten(declare(cfg), is_leaf=lambda x: isinstance(x, Weight))

    def leaf(i: int, w: Weight):
        if w.init != "normal":
            return (jnp.ones if w.init == "ones" else jnp.zeros)(w.shape, dtype)
        return (0.02 * jax.random.normal(jax.random.fold_in(key, i), w.shape)).astype(dtype)

    return jax.tree.unflatten(tree, [leaf(i, w) for i, w in enumerate(leaves)])


def head_weight(params: Params) -> jax.Array:
    """The output head [D, V]; the transposed embedding when tied."""
    return params.embed_VD.T if params.head_DV is None else params.head_DV


def count(tree) -> int:
    """Number of scalars in a tree of arrays or declarations."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Weight)))
