"""Tiny random models with opinions, prompts of several lengths, and a re-scoring pass that shares no code with the sampler's loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import declare, head_weight, map_weights
from opsa_jax.models.transformer import forward, prompt_inputs

CONFIGS = {
    "qwen3": {"family": "qwen3", "qk_norm": True, "tie_embeddings": True},
    "llama": {"family": "llama", "rope_theta": 500.0},
    "mistral-window": {"family": "mistral", "windows": (4, 4)},
}
PROMPTS = [[5, 9, 2], [7], [11, 3, 8, 8, 1, 4], [60, 2, 33, 12], [9, 9], [1, 2, 3, 4, 5], [44], [6, 31, 20]]


def tiny(name: str = "qwen3", scale: float = 0.25, **changes):
    """Weights and architecture: two layers, vocabulary of 64, no weight zero or one."""
    sizes = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "d_ff": 48}
    cfg = DecoderConfig(**(sizes | CONFIGS[name] | changes))

    def leaf(w):
        noise = np.random.default_rng(list(w.hf_key.encode())).standard_normal(w.shape, np.float32)
        return jnp.asarray(1 + 0.3 * noise if w.init == "ones" else scale * noise)

    return map_weights(leaf, declare(cfg)), cfg


def padded(prompts, width: int, filler: int = 0) -> tuple[jax.Array, jax.Array]:
    """Left-padded ids and mask."""
    ids = [[filler] * (width - len(p)) + p for p in prompts]
    return jnp.array(ids, jnp.int32), jnp.array([[0] * (width - len(p)) + [1] * len(p) for p in prompts], jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def _hidden(params, cfg, tokens_1T):
    return forward(params, cfg, tokens_1T, *prompt_inputs(jnp.ones_like(tokens_1T))).hidden_BTD[0]


def rescored(params, cfg, prompt: list[int], response: list[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities [R, V] that predict each response token, from one pass without cache, padding or batch; softmax in float64."""
    tokens = prompt + response
    hidden = _hidden(params, cfg, jnp.array([tokens + [0] * (24 - len(tokens))], jnp.int32))[len(prompt) - 1 : len(tokens) - 1]
    logits = np.asarray(hidden, np.float64) @ np.asarray(head_weight(params), np.float64) / temperature
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
