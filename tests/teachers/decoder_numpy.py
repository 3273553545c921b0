"""A decoder in NumPy, float64, one row without padding: shares no code with the package. And tiny models for it."""

import jax.numpy as jnp
import numpy as np

from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import declare, map_weights

CFG = DecoderConfig("llama", 48, 24, 3, 4, 2, 8, 32)


def random_params(scale: float = 0.2, seed: int = 0, cfg: DecoderConfig = CFG):
    rng = np.random.default_rng(seed)
    return map_weights(lambda w: jnp.asarray(scale * rng.normal(size=w.shape) + (w.init == "ones"), jnp.float32), declare(cfg))


def norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotate(x_TNH, theta):
    T, _, H = x_TNH.shape
    angle = np.arange(T)[:, None] / theta ** (np.arange(0, H, 2) / H)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x_TNH[..., : H // 2], x_TNH[..., H // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def decoder(params, cfg, ids, steer_LD=None, unit_D=None):
    """(block inputs before steering [L, T, D], logits [T, V])."""
    w = _float64(params)
    free = (lambda x: x) if unit_D is None else (lambda x: x - np.outer(x @ unit_D, unit_D))
    x, inputs = w["embed"][list(ids)], []
    T, group = len(ids), cfg.n_heads // cfg.n_kv_heads
    for i in range(cfg.n_layers):
        x = free(x)
        inputs.append(x)
        x = x + (0 if steer_LD is None else np.asarray(steer_LD, np.float64)[i])
        h = norm(x, w["attn_norm"][i], cfg.norm_eps)
        q, k = (rotate(np.einsum("td,dnh->tnh", h, w[name][i]), cfg.rope_theta) for name in ("wq", "wk"))
        v = np.einsum("td,dnh->tnh", h, w["wv"][i])
        k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
        score = np.einsum("tnh,snh->nts", q, k) / np.sqrt(cfg.head_dim)
        score = np.where(np.tril(np.ones((T, T), bool)), score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        x = x + free(np.einsum("tnh,nhd->td", np.einsum("nts,snh->tnh", weight, v), w["wo"][i]))
        h = norm(x, w["mlp_norm"][i], cfg.norm_eps)
        gate = h @ w["gate"][i]
        x = x + free((gate / (1 + np.exp(-gate)) * (h @ w["up"][i])) @ w["down"][i])
    return np.stack(inputs), norm(x, w["final"], cfg.norm_eps) @ w["head"]


def _float64(params):
    layers = params.layers
    found = {
        "embed": params.embed_VD, "final": params.final_norm_D, "head": params.head_DV, "attn_norm": layers.attn_norm_LD,
        "wq": layers.wq_LDNH, "wk": layers.wk_LDKH, "wv": layers.wv_LDKH, "wo": layers.wo_LNHD, "mlp_norm": layers.mlp_norm_LD,
        "gate": layers.gate_LDF, "up": layers.up_LDF, "down": layers.down_LFD,
    }  # fmt: skip
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
