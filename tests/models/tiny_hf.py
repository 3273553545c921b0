"""Tiny random models of each family in transformers, the reference for parity tests, and their twins in our code."""

from pathlib import Path

import jax
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opsa_jax.config import MeshConfig
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.hf import load_config, load_params
from opsa_jax.models.params import Params, declare, map_weights
from opsa_jax.parallel.mesh import make_mesh

torch.set_num_threads(1)

# head_dim is not hidden_size / heads; sizes divide by a 4x2 mesh; eps is large enough to see in every norm.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.05,
    "tie_word_embeddings": False,
}
THETA = {"rope_theta": 500.0, "rope_type": "default"}
# Wavelengths of the eight frequencies are 6 to 353 tokens: below 64/4, between, and above 64/1.
LLAMA3 = {"rope_theta": 100.0, "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
MODELS = {
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True, "rope_parameters": THETA},
    "qwen3-bias-mha": {"model_type": "qwen3", "attention_bias": True, "num_key_value_heads": 4},
    "qwen3-windows": {
        **{"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 3},
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3-moe": {
        **{"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
        "norm_topk_prob": True,
    },
    "qwen3-moe-plain": {
        **{"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"norm_topk_prob": False, "use_sliding_window": True, "sliding_window": 4},
    },
    "qwen2": {"model_type": "qwen2", "rope_parameters": THETA},
    "qwen2-windows-tied": {
        **{"model_type": "qwen2", "tie_word_embeddings": True},
        **{"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    },
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama-linear-bias-mha": {
        **{"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 3.0},
    },
    "mistral-window": {"model_type": "mistral", "sliding_window": 4, "rope_parameters": THETA},
    "mistral": {"model_type": "mistral", "sliding_window": None},
}


def torch_model(name: str, seed: int = 0, **changes):
    """A float32 model whose every weight, norm and bias is random: a fresh one has unit norms and zero biases, which hide mistakes."""
    config = AutoConfig.for_model(**(SIZES | MODELS[name] | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in key else 0.25 * noise)
    return model


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def imported(folder: Path, dtype: str = "float32") -> tuple[Params, DecoderConfig]:
    cfg, _ = load_config(str(folder))
    return load_params(folder, cfg, dtype, one_device()), cfg


def random_params(cfg: DecoderConfig) -> Params:
    """Weights without a zero or a one; the value of each depends on its key and shape only."""

    def leaf(w):
        noise = np.random.default_rng(list(w.hf_key.encode())).standard_normal(w.shape, np.float32)
        return jax.numpy.asarray(1 + 0.3 * noise if w.init == "ones" else 0.25 * noise)

    return map_weights(leaf, declare(cfg))


def batch(vocab: int = 64, T: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [3, T] and mask: a full row, a left-padded row, a right-padded row. Padding holds arbitrary ids."""
    tokens = np.random.default_rng(1).integers(0, vocab, (3, T))
    mask = np.ones((3, T), np.int64)
    mask[1, :5] = 0
    mask[2, -4:] = 0
    return tokens, mask
