"""Adapters against PEFT, the library whose files they are."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_hf import batch, imported, one_device, torch_model
from transformers import AutoModelForCausalLM

from opsa_jax.config import LoraConfig, MeshConfig
from opsa_jax.errors import UserError
from opsa_jax.models.lora import TARGETS, attach, declare_lora, init_lora, load_adapter, merge, save_adapter
from opsa_jax.models.params import head_weight, map_weights
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.parallel.mesh import make_mesh
from opsa_jax.parallel.rules import named

LORA = LoraConfig(rank=4, alpha=6.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch_model("qwen2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(base):
    return imported(base)


def random_adapters(cfg, lora=LORA):
    """Adapters whose b is not zero."""
    noise = np.random.default_rng(5)
    return map_weights(lambda w: jnp.asarray(0.3 * noise.standard_normal(w.shape, np.float32)), declare_lora(cfg, lora))


@jax.jit(static_argnums=1)
def _logits(params, cfg, tokens):
    positions, segments = prompt_inputs(jnp.ones_like(tokens))
    return forward(params, cfg, tokens, positions, segments).hidden_BTD @ head_weight(params)


def logits_of(params, cfg):
    return np.asarray(_logits(params, cfg, jnp.asarray(batch()[0])))


def peft_logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(batch()[0])).logits.numpy()


def test_our_adapter_in_peft(base, model, tmp_path):
    params, cfg = model
    adapters = random_adapters(cfg)
    save_adapter(adapters, cfg, LORA, tmp_path / "adapter", str(base))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    ours, plain = logits_of(attach(params, adapters), cfg), logits_of(params, cfg)
    np.testing.assert_allclose(ours, peft_logits(theirs), atol=1e-4)
    assert np.abs(ours - plain).max() > 0.1
    # The same tensors that PEFT itself would write.
    theirs.save_pretrained(tmp_path / "again")
    a, b = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "again"))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    # Merged weights compute the same, in our code and in theirs.
    np.testing.assert_allclose(logits_of(merge(attach(params, adapters)), cfg), ours, atol=1e-4)
    np.testing.assert_allclose(peft_logits(theirs.merge_and_unload()), ours, atol=1e-4)


def test_adapter_of_peft_here(base, model, tmp_path):
    params, cfg = model
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["down_proj", "o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    theirs.save_pretrained(tmp_path / "adapter")
    adapters, lora = load_adapter(tmp_path / "adapter", cfg, one_device())
    assert lora == LoraConfig(rank=3, alpha=5.0, targets=("o", "down"))
    ours = logits_of(attach(params, adapters), cfg)
    np.testing.assert_allclose(ours, peft_logits(theirs), atol=1e-4)
    assert np.abs(ours - logits_of(params, cfg)).max() > 0.1


def test_new_adapters_change_nothing_and_are_drawn_like_those_of_peft(base, model):
    params, cfg = model
    adapters = init_lora(cfg, LoraConfig(rank=3, alpha=5.0, targets=("o", "down")), jax.random.key(3))
    np.testing.assert_array_equal(logits_of(attach(params, adapters), cfg), logits_of(params, cfg))
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=3, target_modules=["o_proj", "down_proj"]))
    state = theirs.state_dict()
    for target, name in (("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
        a = np.asarray(adapters[target].a)
        peer = torch.stack([state[f"base_model.model.model.layers.{l}.{name}.lora_A.default.weight"] for l in range(3)]).numpy()
        bound = np.prod(a.shape[1:-1]) ** -0.5
        assert a.size == peer.size
        for draw in (a, peer):
            assert 0.95 * bound < np.abs(draw).max() <= bound and abs(draw.std() - bound / 3**0.5) < 0.1 * bound
        assert not np.array_equal(a[0], a[1]) and (np.asarray(adapters[target].b) == 0).all()


def test_values_do_not_depend_on_other_targets_or_on_the_mesh(model):
    _, cfg = model
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    together = init_lora(cfg, LoraConfig(rank=4, targets=("up", "o")), jax.random.key(3))
    sharded = init_lora(cfg, LoraConfig(rank=4, targets=("o",)), jax.random.key(3), mesh)
    np.testing.assert_array_equal(together["o"].a, sharded["o"].a)
    assert sharded["o"].a.sharding == named(mesh, "layers", "heads", "head_dim", "rank")
    assert sharded["o"].b.sharding == named(mesh, "layers", "rank", "embed")


def test_sharded_adapter_round_trip(model, tmp_path):
    _, cfg = model
    given = LoraConfig(rank=4, alpha=2.5, targets=("o", "gate"))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    save_adapter(random_adapters(cfg, given), cfg, given, tmp_path / "adapter", "org/base")
    sharded, lora = load_adapter(tmp_path / "adapter", cfg, mesh)
    assert lora == given and json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    save_adapter(sharded, cfg, given, tmp_path / "again", "org/base")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_merge_adds_in_float32(model):
    """W + scale a b of a bfloat16 model against numpy in float64, rounded once."""
    _, cfg = model
    noise = np.random.default_rng(1)
    lora = LoraConfig(rank=4, alpha=6.0, targets=("o",))
    adapters = random_adapters(cfg, lora)
    w = jnp.asarray(noise.standard_normal((3, 4, 16, 32)), jnp.bfloat16)
    params = model[0].replace(layers=model[0].layers.replace(wo_LNHD=w))
    merged = merge(attach(params, adapters)).layers
    a, b = (np.asarray(x, np.float64) for x in (adapters["o"].a, adapters["o"].b))
    expected = np.asarray(w, np.float64) + 1.5 * np.einsum("lnhr,lrd->lnhd", a, b)
    assert merged.lora is None and merged.wo_LNHD.dtype == jnp.bfloat16
    assert (np.asarray(merged.wo_LNHD) == expected.astype(jnp.bfloat16)).mean() > 0.999  # float32 sums may round the other way
    assert merged.gate_LDF is params.layers.gate_LDF


def test_user_mistakes(model, tmp_path):
    _, cfg = model
    with pytest.raises(UserError, match="no LoRA target 'q_proj'; allowed: down, gate, k, o, q, up, v"):
        declare_lora(cfg, LoraConfig(rank=4, targets=("q_proj",)))
    experts = dataclasses.replace(cfg, n_experts=4, experts_per_token=2)
    with pytest.raises(UserError, match="LoRA target 'up': feed-forwards of experts have no adapters; allowed: q, k, v, o"):
        declare_lora(experts, LoraConfig(rank=4, targets=("q", "up")))
    assert declare_lora(experts, LoraConfig(rank=4, targets=("q", "o"))).keys() == {"q", "o"}
    with pytest.raises(UserError, match="rank 0 is not valid"):
        declare_lora(cfg, LoraConfig(rank=0))
    with pytest.raises(UserError, match=r"has no adapter_config.json"):
        load_adapter(tmp_path, cfg, one_device())
    folder = tmp_path / "adapter"
    save_adapter(random_adapters(cfg), cfg, LORA, folder, "base")
    with pytest.raises(UserError, match="exists"):
        save_adapter(random_adapters(cfg), cfg, LORA, folder, "base")
    good = json.loads((folder / "adapter_config.json").read_text())
    bad = {
        "use_dora=True is not implemented": {"use_dora": True},
        "use_rslora=True is not implemented": {"use_rslora": True},
        "alpha_pattern={'q': 1} is not implemented": {"alpha_pattern": {"q": 1}},
        "init_lora_weights='pissa' is not implemented": {"init_lora_weights": "pissa"},
        "bias='all' is not implemented": {"bias": "all"},
        "peft_type 'IA3' is not supported": {"peft_type": "IA3"},
        "target_modules=.'lm_head'.; allowed": {"target_modules": ["lm_head"]},
        "tensor .*lora_A.weight has shape": {"r": 8},
        "not part of the architecture": {"target_modules": ["q_proj"]},
        "is damaged": {"r": None},
    }
    for message, change in bad.items():
        (folder / "adapter_config.json").write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=message):
            load_adapter(folder, cfg, one_device())
    (folder / "adapter_config.json").write_text(json.dumps(good))
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(TARGETS) * cfg.n_layers
    tensors.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"missing from the checkpoint: base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"):
        load_adapter(folder, cfg, one_device())
