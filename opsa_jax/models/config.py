"""Architecture of a decoder, read from and written to Hugging Face `config.json`.

One set of fields serves Qwen3 (dense and mixture of experts), Qwen2/2.5 (and R1-Distill-Qwen), Llama 2/3.x (and R1-Distill-Llama) and
Mistral: families differ by values, not by code. Every field of `config.json` is either implemented, required to have the one value
we compute, or known not to change the maths; anything else is refused by name.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from opsa_jax.errors import UserError, did_you_mean


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings: `linear` (factor) or `llama3` (all fields)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder. Frozen and hashable: a static argument of every jitted function, so a changed field is a new program."""

    family: str
    """model_type of Hugging Face: qwen3, qwen3_moe, qwen2, llama or mistral."""
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    """Width of the feed-forward; of each expert where there are experts."""
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qk_norm: bool = False
    """RMS norm of each query and key head (Qwen3)."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    windows: tuple[int, ...] = ()
    """Sliding window of each layer in tokens, 0 for full attention; empty when all layers are full."""
    n_experts: int = 0
    """Experts of every feed-forward; 0 is a dense one."""
    experts_per_token: int = 0
    normalize_router: bool = False
    """Divide the chosen experts' probabilities by their sum (norm_topk_prob)."""
    compute_dtype: str = "float32"
    """Execution, not architecture: dtype of matrix products."""
    remat: str = "none"
    """Execution: none, dots or full; what `jax.checkpoint` recomputes per block."""
    scan_unroll: int = 1
    """Execution: blocks per iteration of the layer scan."""
    attention: str = "auto"
    """Execution: auto, xla, splash or cudnn (models/attention.py)."""

    @property
    def n_params(self) -> int:
        """Number of weights, counted by hand from the architecture."""
        d, h = self.d_model, self.head_dim
        qkv, o = (self.n_heads + 2 * self.n_kv_heads) * h, self.n_heads * h
        block = d * qkv + o * d + 3 * d * self.d_ff * (self.n_experts or 1) + d * self.n_experts + 2 * d
        block += 2 * h * self.qk_norm + qkv * self.qkv_bias + d * self.o_bias + (2 * self.d_ff + d) * self.mlp_bias
        return self.n_layers * block + d + self.vocab_size * d * (1 if self.tie_embeddings else 2)


EXECUTION = ("compute_dtype", "remat", "scan_unroll", "attention")
"""Fields of `DecoderConfig` that say how it is computed, not what."""
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
# What transformers assumes where config.json is silent and the families differ.
_SILENT: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3_moe": {
        **{"num_key_value_heads": 4, "sliding_window": 4096, "moe_intermediate_size": 768},
        **{"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False},
    },
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_MUST_BE: dict[str, tuple] = {
    "hidden_act": ("silu",),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
}
_NO_EFFECT = {
    *(
        "_name_or_path",
        "_attn_implementation",
        "attn_implementation",
        "architectures",
        "auto_map",
        "transformers_version",
        "torch_dtype",
        "dtype",
    ),
    *("use_cache", "cache_implementation", "initializer_range", "max_position_embeddings", "attention_dropout", "pretraining_tp"),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "output_hidden_states",
        "output_attentions",
    ),
    *(
        "return_dict",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "task_specific_params",
        "finetuning_task",
        "rope_ratio",
        "is_llama_config",
    ),
    *("output_router_logits", "router_aux_loss_coef"),
    *("unsloth_fixed", "unsloth_version", "language", "license", "model_max_length", "tokenizer_class", "prefix", "suffix"),
}
_IMPLEMENTED = {
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias"),
    *("mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
}


def from_hf(hf: dict[str, Any], where: str = "config.json") -> DecoderConfig:
    """The architecture that a `config.json` describes.

    Raises:
        UserError: an unknown family, an unknown field, or a field value that changes the maths in a way not implemented.
    """
    family = hf.get("model_type", "")
    if family not in ARCHITECTURES:
        raise UserError(f"{where}: architecture {family!r} is not supported{did_you_mean(str(family), ARCHITECTURES)}")
    for name, value in hf.items():
        if name in _MUST_BE and value not in _MUST_BE[name]:
            raise UserError(f"{where}: {name}={value!r} changes the maths and is not implemented; allowed: {_MUST_BE[name][0]!r}")
        if name not in _IMPLEMENTED | _NO_EFFECT | set(_MUST_BE):
            raise UserError(f"{where}: unknown field {name!r}={value!r}; if it does not change the maths, remove it from the file")
    for name in _SIZES:
        if name not in hf:
            raise UserError(f"{where}: field {name!r} is missing")
    hf = _SILENT[family] | hf
    n_heads, d_model = hf["num_attention_heads"], hf["hidden_size"]
    hf["num_key_value_heads"] = n_kv_heads = hf.get("num_key_value_heads") or n_heads
    _check_sizes(hf, (*_SIZES, "num_key_value_heads"), where)
    if n_heads % n_kv_heads:
        raise UserError(f"{where}: num_key_value_heads={n_kv_heads} does not divide num_attention_heads={n_heads}")
    return DecoderConfig(
        family=family,
        vocab_size=hf["vocab_size"],
        d_model=d_model,
        n_layers=hf["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=hf.get("head_dim") or d_model // n_heads,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        qkv_bias=family == "qwen2" or hf.get("attention_bias", False),
        o_bias=family != "qwen2" and hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        windows=_windows(hf, where),
        **_feed_forward(hf, where),
        **_rope(hf, where),
    )


def _check_sizes(hf: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in names:
        if not isinstance(hf[name], int) or hf[name] < 1:
            raise UserError(f"{where}: {name}={hf[name]!r} is not a positive integer")


def _feed_forward(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """Its width and, in Qwen3-MoE, its experts (`num_local_experts` is the spelling of transformers 5)."""
    if hf["model_type"] != "qwen3_moe":
        return {"d_ff": hf["intermediate_size"]}
    hf = hf | {"num_experts": hf.get("num_local_experts", hf["num_experts"])}
    _check_sizes(hf, ("num_experts", "num_experts_per_tok", "moe_intermediate_size"), where)
    n_experts, chosen = hf["num_experts"], hf["num_experts_per_tok"]
    if chosen > n_experts:
        raise UserError(f"{where}: num_experts_per_tok={chosen} is more than num_experts={n_experts}")
    experts = {"n_experts": n_experts, "experts_per_token": chosen, "normalize_router": hf["norm_topk_prob"]}
    return {"d_ff": hf["moe_intermediate_size"], **experts}


def _rope(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """Both spellings: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5)."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10_000.0
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise UserError(f"{where}: partial_rotary_factor changes the maths and is not implemented; allowed: 1.0")
    names = {"default": set(), "linear": {"factor"}}
    names["llama3"] = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    if kind not in names:
        raise UserError(f"{where}: rope type {kind!r} is not implemented; allowed: {', '.join(names)}")
    if set(rope) != names[kind]:
        raise UserError(f"{where}: rope type {kind!r} needs exactly the fields {sorted(names[kind])}, got {sorted(rope)}")
    if kind == "default":
        return {"rope_theta": float(theta)}
    original = int(rope.pop("original_max_position_embeddings", 8192))
    return {"rope_theta": float(theta), "rope_scaling": RopeScaling(kind, original_max_position=original, **rope)}


def _windows(hf: dict[str, Any], where: str) -> tuple[int, ...]:
    """Per-layer windows: all layers or none in Mistral and Qwen3-MoE; in other Qwen those listed in `layer_types`, or the ones from
    `max_window_layers` on."""
    family, n_layers, size = hf["model_type"], hf["num_hidden_layers"], hf.get("sliding_window")
    if family == "mistral":
        sliding = [size is not None] * n_layers
    elif family == "qwen3_moe":
        sliding = [hf.get("use_sliding_window", False) and size is not None] * n_layers
    elif family in ("qwen2", "qwen3") and hf.get("use_sliding_window", False) and size is not None:
        types = hf.get("layer_types")
        sliding = [t == "sliding_attention" for t in types] if types else [i >= hf["max_window_layers"] for i in range(n_layers)]
    else:
        sliding = [False] * n_layers
    if len(sliding) != n_layers:
        raise UserError(f"{where}: layer_types has {len(sliding)} entries for num_hidden_layers={n_layers}")
    return tuple(int(size) if s else 0 for s in sliding) if any(sliding) else ()


def to_hf(cfg: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of an architecture, in the spelling that transformers 4 and 5 and vLLM read. `from_hf` inverts it.

    Raises:
        UserError: a combination of fields that the family cannot express.
    """
    hf: dict[str, Any] = {
        "architectures": [ARCHITECTURES[cfg.family]],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": cfg.tie_embeddings,
    }
    if scaling := cfg.rope_scaling:
        hf["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            hf["rope_scaling"] |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
            hf["rope_scaling"] |= {"original_max_position_embeddings": scaling.original_max_position}
    if cfg.family == "qwen3_moe":
        hf |= {"num_experts": cfg.n_experts, "num_experts_per_tok": cfg.experts_per_token, "moe_intermediate_size": cfg.d_ff}
        hf |= {"norm_topk_prob": cfg.normalize_router, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if cfg.family in ("llama", "qwen3", "qwen3_moe"):
        hf["attention_bias"] = cfg.qkv_bias
    if cfg.family == "llama":
        hf["mlp_bias"] = cfg.mlp_bias
    window = max(cfg.windows, default=0)
    if cfg.family == "mistral":
        hf["sliding_window"] = window or None
    elif cfg.windows:
        hf |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": cfg.n_layers}
        hf["layer_types"] = ["sliding_attention" if w else "full_attention" for w in cfg.windows]
    execution = {name: getattr(cfg, name) for name in EXECUTION}
    if dataclasses.replace(from_hf(hf), **execution) != cfg:
        raise UserError(f"family {cfg.family!r} cannot express this architecture in config.json: {cfg}")
    return hf
