"""config.json to architecture and back, refusals by name, and the sizes of published models."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_hf import MODELS, SIZES
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from opsa_jax.errors import UserError
from opsa_jax.models.config import from_hf, to_hf
from opsa_jax.models.layers import rope_frequencies
from opsa_jax.models.params import abstract_params, count, declare

# config.json of the published checkpoints, in the spelling of transformers 4 in which they were published.
QWEN = {"hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_cache": True}
QWEN |= {"use_sliding_window": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "bos_token_id": 151643}
QWEN3 = QWEN | {
    **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "eos_token_id": 151645, "head_dim": 128},
    **{"max_position_embeddings": 40960, "num_key_value_heads": 8, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None},
    "vocab_size": 151936,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0}
LLAMA |= {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "initializer_range": 0.02}
LLAMA |= {"max_position_embeddings": 131072, "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
LLAMA |= {"torch_dtype": "bfloat16", "transformers_version": "4.43.0", "use_cache": True, "vocab_size": 128256, "num_key_value_heads": 8}
LLAMA3_ROPE = {"rope_type": "llama3", "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
PUBLISHED = {
    "Qwen3-0.6B": (
        596_049_920,
        QWEN3
        | {"hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28}
        | {"tie_word_embeddings": True},
    ),
    "Qwen3-8B": (
        8_190_735_360,
        QWEN3
        | {"hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 36, "num_attention_heads": 32, "num_hidden_layers": 36}
        | {"tie_word_embeddings": False},
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        QWEN3
        | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1, "hidden_size": 2048}
        | {"intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768}
        | {"norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48}
        | {"num_key_value_heads": 4, "output_router_logits": False, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False},
    ),
    "Qwen2.5-7B": (
        7_615_616_512,
        QWEN
        | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "eos_token_id": 151643, "hidden_size": 3584}
        | {"intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 28}
        | {"num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0, "sliding_window": 131072, "use_mrope": False}
        | {"tie_word_embeddings": False, "vocab_size": 152064},
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        1_777_088_000,
        QWEN
        | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "eos_token_id": 151643, "hidden_size": 1536}
        | {"intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 21, "num_attention_heads": 12}
        | {"num_hidden_layers": 28, "num_key_value_heads": 2, "rope_theta": 10000, "sliding_window": 4096, "use_mrope": False}
        | {"tie_word_embeddings": False, "vocab_size": 151936},
    ),
    "Llama-3.1-8B": (
        8_030_261_248,
        LLAMA
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32}
        | {"rope_scaling": LLAMA3_ROPE | {"factor": 8.0}, "tie_word_embeddings": False},
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        LLAMA
        | {"head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 16}
        | {"rope_scaling": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True},
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"}
        | {"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768}
        | {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
        | {"sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0"}
        | {"use_cache": True, "vocab_size": 32000},
    ),
}


def saved(name: str, tmp_path) -> dict:
    """What transformers writes for a tiny model."""
    AutoConfig.for_model(**(SIZES | MODELS[name]), dtype="float32").save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_to_the_unit(name):
    total, raw = PUBLISHED[name]
    cfg = from_hf(raw)
    assert cfg.n_params == total
    assert count(declare(cfg)) == total
    assert count(abstract_params(cfg)) == total
    assert from_hf(to_hf(cfg)) == cfg


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_frequencies(name):
    """The rotary frequencies of transformers, which also reads the old spelling."""
    raw = PUBLISHED[name][1]
    hf = AutoConfig.for_model(**raw)
    kind = hf.rope_parameters["rope_type"]
    dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    plain = 1.0 / raw["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    expected = plain if kind == "default" else ROPE_INIT_FUNCTIONS[kind](hf, "cpu")[0]
    np.testing.assert_allclose(rope_frequencies(from_hf(raw)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_of_what_transformers_writes(name, tmp_path):
    cfg = from_hf(saved(name, tmp_path))
    assert from_hf(to_hf(cfg)) == cfg
    assert count(declare(cfg)) == cfg.n_params
    assert AutoConfig.for_model(**to_hf(cfg)).to_dict()["rope_parameters"]["rope_theta"] == cfg.rope_theta


@pytest.mark.parametrize("name", MODELS)
def test_old_and_new_spelling_agree(name, tmp_path):
    """transformers 4 has rope_theta and rope_scaling (with `type` or `rope_type`) and no layer_types."""
    new = saved(name, tmp_path)
    rope = dict(new["rope_parameters"])
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "dtype")}
    if name != "qwen3-windows":  # its windows are not a suffix of the layers, which only layer_types can say
        old.pop("layer_types", None)
    old |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": new["dtype"]}
    kind = rope.pop("rope_type")
    for spelled in ("rope_type", "type"):
        old["rope_scaling"] = None if kind == "default" else rope | {spelled: kind}
        assert from_hf(old) == from_hf(new)


def test_windows():
    base = {k: v for k, v in PUBLISHED["Qwen2.5-7B"][1].items() if k != "max_window_layers"} | {"num_hidden_layers": 4}
    assert from_hf(base).windows == ()
    on = base | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    assert from_hf(on).windows == (0, 0, 0, 8)
    assert from_hf(on | {"layer_types": ["sliding_attention", "full_attention"] * 2}).windows == (8, 0, 8, 0)
    with pytest.raises(UserError, match="layer_types has 1 entries for num_hidden_layers=4"):
        from_hf(on | {"layer_types": ["full_attention"]})


def test_silent_fields_mean_what_transformers_assumes():
    """A config.json written by hand may leave out what its class has a default for."""
    sizes = {k: SIZES[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    sizes |= {"num_attention_heads": 32, "hidden_size": 256}
    for family in ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral"):
        ours, theirs = from_hf(sizes | {"model_type": family}), AutoConfig.for_model(family, **sizes)
        if family == "qwen3_moe":
            assert (ours.n_experts, ours.experts_per_token, ours.d_ff) == (128, theirs.num_experts_per_tok, theirs.moe_intermediate_size)
            assert ours.n_experts == theirs.num_experts and ours.normalize_router == theirs.norm_topk_prob
        window = theirs.sliding_window if family == "mistral" else None
        assert ours.n_kv_heads == theirs.num_key_value_heads, family
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8), family
        assert ours.norm_eps == theirs.rms_norm_eps, family
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"], family
        assert ours.tie_embeddings == theirs.tie_word_embeddings, family
        assert (max(ours.windows, default=0) or None) == window, family


REFUSED = {
    "architecture 'qwen4' is not supported; did you mean 'qwen": {"model_type": "qwen4"},
    "architecture 'gemma2' is not supported": {"model_type": "gemma2"},
    "unknown field 'logit_softcapping'=30.0": {"logit_softcapping": 30.0},
    "hidden_act='gelu' changes the maths and is not implemented; allowed: 'silu'": {"hidden_act": "gelu"},
    "use_mrope=True": {"use_mrope": True},
    "quantization_config={'bits': 4}": {"quantization_config": {"bits": 4}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "rope type 'yarn' is not implemented; allowed: default, linear, llama3": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "rope type 'linear' needs exactly the fields": {"rope_scaling": {"type": "linear", "factor": 4.0, "attention_factor": 2.0}},
    "rope type 'llama3' needs exactly the fields": {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
    "field 'hidden_size' is missing": {"hidden_size": ...},
    "num_hidden_layers='many'": {"num_hidden_layers": "many"},
    "hidden_size=0 is not a positive integer": {"hidden_size": 0},
    "num_key_value_heads=3 does not divide num_attention_heads=16": {"num_key_value_heads": 3},
    "mlp_only_layers=[0] changes the maths": {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
    "decoder_sparse_step=2 changes the maths": {"model_type": "qwen3_moe", "decoder_sparse_step": 2},
    "num_experts_per_tok=9 is more than num_experts=8": {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 9},
    "moe_intermediate_size=0 is not a positive integer": {"model_type": "qwen3_moe", "moe_intermediate_size": 0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message):
    raw = PUBLISHED["Qwen3-0.6B"][1] | REFUSED[message]
    with pytest.raises(UserError) as error:
        from_hf({k: v for k, v in raw.items() if v is not ...}, where="some/config.json")
    assert message in str(error.value) and str(error.value).startswith("some/config.json: ") and "\n" not in str(error.value)


def test_to_hf_refuses_what_a_family_cannot_say():
    cfg = from_hf(PUBLISHED["Mistral-7B-v0.1"][1])
    with pytest.raises(UserError, match="family 'mistral' cannot express"):
        to_hf(dataclasses.replace(cfg, windows=(0, *cfg.windows[1:])))
