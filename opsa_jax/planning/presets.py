"""Published architectures of the papers' models, so that a plan needs no checkpoint: the fields of their `config.json`."""

from typing import Any

from opsa_jax.models.config import DecoderConfig, from_hf


def _qwen3(hidden: int, layers: int, heads: int, ffn: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": ffn, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
    }  # fmt: skip


def _qwen3_30b_a3b(theta: float) -> dict[str, Any]:
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    return _qwen3(2048, 48, 32, 6144, False) | {"model_type": "qwen3_moe", "num_key_value_heads": 4, "rope_theta": theta} | experts


def _qwen2(vocab: int, hidden: int, heads: int, kv_heads: int, ffn: int, theta: float) -> dict[str, Any]:
    return {
        "model_type": "qwen2", "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": 28, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": ffn, "rms_norm_eps": 1e-6, "rope_theta": theta, "tie_word_embeddings": False,
    }  # fmt: skip


def _llama(hidden: int, layers: int, heads: int, ffn: int, tied: bool, factor: float) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
    }  # fmt: skip
    return {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": ffn, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": scaling if factor > 1 else None, "tie_word_embeddings": tied,
    }  # fmt: skip


# Name -> (hub names, fields).
PRESETS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "qwen3-0.6b": (("Qwen/Qwen3-0.6B",), _qwen3(1024, 28, 16, 3072, True)),
    "qwen3-1.7b": (("Qwen/Qwen3-1.7B",), _qwen3(2048, 28, 16, 6144, True)),
    "qwen3-4b": (("Qwen/Qwen3-4B",), _qwen3(2560, 36, 32, 9728, True)),
    "qwen3-8b": (("Qwen/Qwen3-8B",), _qwen3(4096, 36, 32, 12288, False)),
    "qwen3-30b-a3b": (("Qwen/Qwen3-30B-A3B",), _qwen3_30b_a3b(1000000.0)),
    "qwen3-30b-a3b-2507": (
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen3-30B-A3B-Thinking-2507"),
        _qwen3_30b_a3b(10000000.0),
    ),
    "r1-distill-qwen-1.5b": (("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",), _qwen2(151936, 1536, 12, 2, 8960, 10000.0)),
    "r1-distill-llama-8b": (("deepseek-ai/DeepSeek-R1-Distill-Llama-8B",), _llama(4096, 32, 32, 14336, False, 8.0)),
    "qwen2.5-7b": (("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"), _qwen2(152064, 3584, 28, 4, 18944, 1000000.0)),
    "llama-3-8b": (("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"), _llama(4096, 32, 32, 14336, False, 1.0)),
    "llama-3.2-3b": (("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct"), _llama(3072, 28, 24, 8192, True, 32.0)),
}


def preset(name: str) -> DecoderConfig | None:
    """The architecture of a preset or of a hub name that has one; None for any other name."""
    for short, (hub, fields) in PRESETS.items():
        if name.lower() in (short, *(x.lower() for x in hub)):
            return from_hf(dict(fields), where=short)
    return None
