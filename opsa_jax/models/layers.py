"""The parts of a block: normalisation, rotary positions, projections."""

import math

import jax
import jax.numpy as jnp

from opsa_jax.models.config import DecoderConfig


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32, returned in the dtype of x."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(cfg: DecoderConfig) -> jax.Array:
    """Inverse frequencies [H/2], float32, with the scaling of the checkpoint (`linear`, or `llama3` by wavelength)."""
    inverse = 1.0 / cfg.rope_theta ** (jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim)
    if (s := cfg.rope_scaling) is None:
        return inverse
    if s.kind == "linear":
        return inverse / s.factor
    # llama3: short wavelengths stay, long ones are divided by the factor, those between are interpolated.
    turns = s.original_max_position * inverse / (2 * math.pi)
    keep = jnp.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    return keep * inverse + (1 - keep) * inverse / s.factor


def rope_tables(cfg: DecoderConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, T, 1, H/2], float32."""
    angles = positions_BT[..., None].astype(jnp.float32) * rope_frequencies(cfg)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding, Hugging Face layout: the first half of a head is paired with the second. Float32 inside."""
    cos, sin = tables
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def project(x: jax.Array, weight: jax.Array, contract: int, bias: jax.Array | None = None, lora=None) -> jax.Array:
    """`x @ weight (+ x @ a @ b) (+ bias)` over the last `contract` axes of x and the first of weight, in the dtype of x.

    `lora` is a pair (a [..., r], b [r, ...]) whose scale is already in b; the low-rank path never forms a full matrix.
    """
    y = jnp.tensordot(x, weight.astype(x.dtype), axes=contract)
    if lora is not None:
        y = y + jnp.tensordot(jnp.tensordot(x, lora.a.astype(x.dtype), axes=contract), lora.scaled_b(x.dtype), axes=1)
    return y if bias is None else y + bias.astype(x.dtype)
