"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W x becomes W x + (alpha / rank) B A x, stored in the layout of PEFT."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opsa_jax.config import LoraConfig
from opsa_jax.errors import UserError, did_you_mean
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Lora, Params, Weight, declare, map_weights
from opsa_jax.models.tensors import load_tree, new_folder, save_tree, scan
from opsa_jax.parallel.rules import named

# Our name of a projection: its field of Layers, how many of its leading dimensions (after L) are inputs, its name in PEFT.
TARGETS = {
    "q": ("wq_LDNH", 1, "q_proj"),
    "k": ("wk_LDKH", 1, "k_proj"),
    "v": ("wv_LDKH", 1, "v_proj"),
    "o": ("wo_LNHD", 2, "o_proj"),
    "gate": ("gate_LDF", 1, "gate_proj"),
    "up": ("up_LDF", 1, "up_proj"),
    "down": ("down_LFD", 1, "down_proj"),
}
CONFIG, STEM = "adapter_config.json", "adapter_model"


def declare_lora(cfg: DecoderConfig, lora: LoraConfig) -> dict[str, Lora]:
    """The adapters' declarations: a [L, inputs..., r] and b [L, r, outputs...] of each target, sharded like the weight they add to.

    PEFT stores lora_A as [r, in] and lora_B as [out, r].

    Raises:
        UserError: an unknown target, one that the architecture does not have, or rank below 1.
    """
    if lora.rank < 1:
        raise UserError(f"LoRA rank {lora.rank} is not valid; allowed: 1 and above")
    layers, r = declare(cfg).layers, lora.rank
    declared = {}
    for target in lora.targets:
        if target not in TARGETS:
            raise UserError(f"no LoRA target {target!r}{did_you_mean(target, TARGETS)}")
        field, inputs, _ = TARGETS[target]
        w: Weight | None = getattr(layers, field)
        if w is None:
            there = [t for t, (f, *_) in TARGETS.items() if getattr(layers, f) is not None]
            raise UserError(f"LoRA target {target!r}: feed-forwards of experts have no adapters; allowed: {', '.join(there)}")
        split = 1 + inputs
        key = "base_model.model." + w.hf_key.removesuffix("weight")
        a_in, b_out = w.shape[1:split], w.shape[split:]
        declared[target] = Lora(
            a=Weight(
                shape=(w.shape[0], *a_in, r),
                axes=(*w.axes[:split], "rank"),
                hf_key=f"{key}lora_A.weight",
                split=(r, *a_in),
                perm=(*range(1, len(a_in) + 1), 0),
                init="kaiming",
            ),
            b=Weight(
                shape=(w.shape[0], r, *b_out),
                axes=("layers", "rank", *w.axes[split:]),
                hf_key=f"{key}lora_B.weight",
                split=(*b_out, r),
                perm=(len(b_out), *range(len(b_out))),
                init="zeros",
            ),
            scale=lora.alpha / r,
        )
    return declared


def init_lora(cfg: DecoderConfig, lora: LoraConfig, key: jax.Array, mesh: Mesh | None = None) -> dict[str, Lora]:
    """New adapters, float32, that change nothing yet: a uniform in ±1/sqrt(inputs) (PEFT's kaiming_uniform with a=sqrt(5)), b zero.

    The values depend on the key and the target only, not on the mesh or the other targets.
    """
    declared = declare_lora(cfg, lora)

    def make(key):
        def one(target: str, adapter: Lora) -> Lora:
            bound = 1 / math.sqrt(math.prod(adapter.a.shape[1:-1]))
            own = jax.random.fold_in(key, list(TARGETS).index(target))
            return adapter.replace(a=jax.random.uniform(own, adapter.a.shape, minval=-bound, maxval=bound), b=jnp.zeros(adapter.b.shape))

        return {target: one(target, adapter) for target, adapter in declared.items()}

    shardings = None if mesh is None else map_weights(lambda w: named(mesh, *w.axes), declared)
    return jax.jit(make, out_shardings=shardings)(key)


def attach(params: Params, adapters: dict[str, Lora] | None) -> Params:
    """The same weights with these adapters; None removes them."""
    return params.replace(layers=params.layers.replace(lora=adapters))


def merge(params: Params) -> Params:
    """Plain weights that compute what weights and adapters did: W + scale * a @ b in float32, cast to the dtype of W."""
    layers = params.layers
    merged = {TARGETS[t][0]: _add(getattr(layers, TARGETS[t][0]), adapter) for t, adapter in (layers.lora or {}).items()}
    return params.replace(layers=layers.replace(lora=None, **merged))


@jax.jit
def _add(w_L, lora: Lora):
    """One layer at a time, so that only one float32 product exists."""

    def layer(arrays):
        w, a, b = arrays
        delta = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), axes=1, precision="highest")
        return (w.astype(jnp.float32) + lora.scale * delta).astype(w.dtype)

    return jax.lax.map(layer, (w_L, lora.a, lora.b))


def save_adapter(adapters: dict[str, Lora], cfg: DecoderConfig, lora: LoraConfig, folder: Path, base_name: str) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads: adapter_model.safetensors (float32) and adapter_config.json.

    All processes call it; the first one writes.

    Args:
        base_name: the checkpoint the adapter belongs to, as PEFT should find it (base_model_name_or_path).

    Raises:
        UserError: the folder exists.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [TARGETS[t][2] for t in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(folder) as partial:
        save_tree(declare_lora(cfg, lora), adapters, partial, "float32", STEM)
        if jax.process_index() == 0:
            (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: Path, cfg: DecoderConfig, mesh: Mesh, dtype: str = "float32") -> tuple[dict[str, Lora], LoraConfig]:
    """Read a PEFT LoRA adapter of a model with this architecture, and the configuration it has.

    Raises:
        UserError: no adapter, a kind of adapter that is not plain LoRA, or tensors that do not fit the model.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}; an adapter is a folder with {CONFIG} and {STEM}.safetensors")
    try:
        lora = _from_peft(json.loads((folder / CONFIG).read_text(encoding="utf-8")), str(folder / CONFIG))
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder / CONFIG} is damaged ({type(e).__name__}: {e})") from None
    stored = scan([folder / f"{STEM}.safetensors"])
    return load_tree(stored, declare_lora(cfg, lora), dtype, mesh, folder), lora


_PEFT_NO_EFFECT = {
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "task_type", "lora_dropout"),
    *("megatron_core", "qalora_group_size", "r", "lora_alpha", "target_modules", "peft_type"),
}


def _from_peft(config: dict, where: str) -> LoraConfig:
    """Every field is read, without effect, or off; what changes the maths otherwise (DoRA, rank patterns, ...) is refused by name."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {config.get('peft_type')!r} is not supported; allowed: LORA")
    for name, value in config.items():
        plain = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian")}.get(name, ())
        if name not in _PEFT_NO_EFFECT and value not in plain and value not in (None, False, {}, []):
            raise UserError(f"{where}: {name}={value!r} is not implemented; merge the adapter with PEFT and import the merged model")
    ours = {peft: target for target, (_, _, peft) in TARGETS.items()}
    names = config["target_modules"]
    if not isinstance(names, list) or not set(names) <= set(ours):
        raise UserError(f"{where}: target_modules={names!r}; allowed: a list of {', '.join(ours)}")
    targets = tuple(sorted((ours[name] for name in names), key=list(TARGETS).index))
    return LoraConfig(rank=int(config["r"]), alpha=float(config["lora_alpha"]), targets=targets)
