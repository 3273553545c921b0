"""Our decoder against transformers on tiny random models of each family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_hf import MODELS, batch, imported, torch_model

from opsa_jax.models.cache import init_cache
from opsa_jax.models.params import head_weight
from opsa_jax.models.transformer import forward, prompt_inputs


def reference(model, tokens, mask):
    """Logits [B, T, V] and hidden states: L block inputs, then the normed output, each [B, T, D]."""
    positions = np.clip(np.cumsum(mask, 1) - 1, 0, None)
    args = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        out = model(**{k: torch.from_numpy(v) for k, v in args.items()}, output_hidden_states=True)
    return out.logits.numpy(), [h.numpy() for h in out.hidden_states]


jitted = jax.jit(forward, static_argnames="cfg")


def run(params, cfg, tokens, mask, **kwargs):
    positions, segments = prompt_inputs(jnp.asarray(mask))
    out = jitted(params, cfg, jnp.asarray(tokens), positions, segments, **kwargs)
    return np.asarray(out.hidden_BTD @ head_weight(params)), out


@pytest.fixture(scope="module", params=MODELS)
def twins(request, tmp_path_factory):
    model = torch_model(request.param)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return model, *imported(folder)


def test_logits_and_every_hidden_state(twins):
    model, params, cfg = twins
    tokens, mask = batch()
    logits, hidden = reference(model, tokens, mask)
    ours, out = run(params, cfg, tokens, mask, capture_C=jnp.arange(tokens.shape[1]))
    real = mask == 1
    for l in range(cfg.n_layers):
        np.testing.assert_allclose(np.asarray(out.captured_LBCD[l])[real], hidden[l][real], atol=1e-4, err_msg=f"input of block {l}")
    np.testing.assert_allclose(np.asarray(out.hidden_BTD)[real], hidden[-1][real], atol=1e-4)
    np.testing.assert_allclose(ours[real], logits[real], atol=1e-4)
    assert np.std(logits[real]) > 0.3  # the tolerance is small against what is compared


def decode(params, cfg, tokens, mask, columns):
    """Logits computed with a cache (longer than needed), some columns at a time."""
    positions, segments = prompt_inputs(jnp.asarray(mask))
    cache = init_cache(cfg, batch=len(tokens), length=16)
    hidden = []
    for c in columns:
        out = jitted(params, cfg, jnp.asarray(tokens[:, c]), positions[:, c], segments[:, c], cache=cache)
        cache = out.cache
        hidden.append(out.hidden_BTD)
    return np.asarray(jnp.concatenate(hidden, axis=1) @ head_weight(params))


@pytest.mark.parametrize("twins", ["qwen3-windows", "llama3"], indirect=True)
def test_cache_in_two_chunks(twins):
    model, params, cfg = twins
    tokens, mask = batch()
    logits, _ = reference(model, tokens, mask)
    ours = decode(params, cfg, tokens, mask, [slice(0, 6), slice(6, 12)])
    np.testing.assert_allclose(ours[mask == 1], logits[mask == 1], atol=1e-4)


@pytest.mark.parametrize("twins", ["qwen3-tied", "mistral-window", "qwen3-moe"], indirect=True)
def test_one_token_at_a_time(twins):
    model, params, cfg = twins
    tokens, mask = batch()
    logits, _ = reference(model, tokens, mask)
    ours = decode(params, cfg, tokens, mask, [slice(t, t + 1) for t in range(12)])
    np.testing.assert_allclose(ours[mask == 1], logits[mask == 1], atol=1e-4)


def test_steering_equals_a_hook_on_every_block(tmp_path):
    model = torch_model("qwen3-tied")
    model.save_pretrained(tmp_path)
    params, cfg = imported(tmp_path)
    steer = np.random.default_rng(2).standard_normal((cfg.n_layers, cfg.d_model)).astype(np.float32)
    for block, vector in zip(model.model.layers, torch.from_numpy(steer)):
        block.register_forward_pre_hook(lambda _, args, vector=vector: (args[0] + vector, *args[1:]))
    tokens, mask = batch()
    logits, _ = reference(model, tokens, mask)
    ours, _ = run(params, cfg, tokens, mask, steer_LD=jnp.asarray(steer))
    np.testing.assert_allclose(ours[mask == 1], logits[mask == 1], atol=1e-4)
