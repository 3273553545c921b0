"""The decoder's forward pass: pure, one code for all families, layers under `lax.scan`."""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from opsa_jax.models.attention import Visibility, attention
from opsa_jax.models.cache import KVCache
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.experts import experts_forward
from opsa_jax.models.layers import project, rms_norm, rope_tables, rotate
from opsa_jax.models.params import Layers, Params, declare, map_weights
from opsa_jax.parallel.rules import GATHERED, constrain, gather, mesh_shape


@struct.dataclass
class Output:
    """What a forward pass gives."""

    hidden_BTD: jax.Array
    """Final hidden states after the last norm, compute dtype. Logits are hidden @ head; the objective makes them in chunks."""
    cache: KVCache | None = None
    captured_LBCD: jax.Array | None = None
    """Block inputs (before steering, after ablation) at the captured columns, compute dtype."""


def forward(
    params: Params,
    cfg: DecoderConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    cache: KVCache | None = None,
    steer_LD: jax.Array | None = None,
    capture_C: jax.Array | None = None,
    ablate_D: jax.Array | None = None,
) -> Output:
    """Run the decoder.

    With left padding, for the prompt `a b` in a bucket of four columns:

        tokens     pad pad  a   b
        positions   0   0   0   1
        segments    0   0   1   1

    Args:
        params: weights; adapters in `params.layers.lora` are applied.
        cfg: architecture and execution (static).
        tokens_BT: int32 token ids.
        positions_BT: int32 positions for the rotary embedding.
        segments_BT: int32, 0 for padding; a column attends to earlier columns of the same segment.
        cache: keys and values so far; the T columns are written at `cache.length`.
        steer_LD: added to the input of each block at every position (zero rows leave a block as it is).
        capture_C: columns at which block inputs are returned.
        ablate_D: a unit vector that is projected out of every block input and of what every attention and feed-forward adds
            (directional ablation, arXiv 2406.11717, Eq. 4).

    Returns:
        `Output`; its cache is None when none was given.
    """
    x_BTD = constrain(params.embed_VD[tokens_BT].astype(cfg.compute_dtype), "batch", None, None)
    tables = rope_tables(cfg, positions_BT)
    T = tokens_BT.shape[1]
    columns_T, k_segments = jnp.arange(T), segments_BT
    if cache is not None:
        columns_T = cache.length + columns_T
        k_segments = jax.lax.dynamic_update_slice(cache.segments_BS, segments_BT.astype(jnp.int32), (0, cache.length))
    visible = Visibility(segments_BT, k_segments, columns_T)

    static = {"cfg": cfg, "gathers": cache is None}  # who decodes has gathered the weights once (rollout/decode.py)
    block = _checkpointed(functools.partial(_block, tables=tables, visible=visible, ablate_D=ablate_D, **static), cfg.remat)
    layer_inputs = {
        "layer": params.layers,
        "index": jnp.arange(cfg.n_layers),
        "window": jnp.asarray(cfg.windows, jnp.int32) if cfg.windows else None,
        "steer_D": steer_LD,
    }

    def step(carry, inputs):
        x, kv = carry
        x = _without(x, ablate_D)
        captured = None if capture_C is None else x[:, capture_C]
        return block(x, kv, **inputs), captured

    kv = None if cache is None else (cache.k_LBKSH, cache.v_LBKSH, cache.length)
    (x_BTD, kv), captured = jax.lax.scan(step, (x_BTD, kv), layer_inputs, unroll=cfg.scan_unroll)
    if cache is not None:
        cache = KVCache(k_LBKSH=kv[0], v_LBKSH=kv[1], segments_BS=k_segments, length=cache.length + T)
    return Output(rms_norm(x_BTD, params.final_norm_D, cfg.norm_eps), cache, captured)


def _checkpointed(block, remat: str):
    policies = jax.checkpoint_policies
    if remat == "none":
        if mesh_shape().get("fsdp", 1) == 1:
            return block
        # Gathered weights are gathered again for the backward pass, or every device would keep all of them.
        return jax.checkpoint(block, policy=policies.save_anything_except_these_names(GATHERED))
    policy = policies.nothing_saveable if remat == "full" else policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(block, policy=policy)


def _block(x_BTD, kv, layer: Layers, index, window, steer_D, *, cfg: DecoderConfig, gathers: bool, tables, visible: Visibility, ablate_D):
    """One block: pre-norm attention and pre-norm gated feed-forward, each added to the residual stream."""
    if steer_D is not None:
        x_BTD = x_BTD + steer_D.astype(x_BTD.dtype)
    lora, layer = layer.lora or {}, _gathered(layer, cfg) if gathers else layer
    h_BTD = rms_norm(x_BTD, layer.attn_norm_LD, cfg.norm_eps)
    q_BTNH = project(h_BTD, layer.wq_LDNH, 1, layer.bq_LNH, lora.get("q"))
    k_BTKH = project(h_BTD, layer.wk_LDKH, 1, layer.bk_LKH, lora.get("k"))
    v_BTKH = project(h_BTD, layer.wv_LDKH, 1, layer.bv_LKH, lora.get("v"))
    if cfg.qk_norm:
        q_BTNH = rms_norm(q_BTNH, layer.q_norm_LH, cfg.norm_eps)
        k_BTKH = rms_norm(k_BTKH, layer.k_norm_LH, cfg.norm_eps)
    q_BTNH, k_BTKH = rotate(q_BTNH, tables), rotate(k_BTKH, tables)
    q_BTNH = constrain(q_BTNH, "batch", None, "heads", None)
    k_BKSH, v_BKSH = (constrain(a.transpose(0, 2, 1, 3), "batch", "kv_heads", None, None) for a in (k_BTKH, v_BTKH))
    if kv is not None:
        k_all, v_all, length = kv
        at = (index, 0, 0, length, 0)
        k_all = jax.lax.dynamic_update_slice(k_all, k_BKSH[None].astype(k_all.dtype), at)
        v_all = jax.lax.dynamic_update_slice(v_all, v_BKSH[None].astype(v_all.dtype), at)
        k_BKSH, v_BKSH = k_all[index], v_all[index]
        kv = (k_all, v_all, length)
    backend = {"backend": cfg.attention, "windows": cfg.windows}
    out_BTNH = attention(q_BTNH, k_BKSH, v_BKSH, visible, 0 if window is None else window, **backend)
    out_BTD = constrain(project(out_BTNH, layer.wo_LNHD, 2, layer.bo_LD, lora.get("o")), "batch", None, None)
    x_BTD = x_BTD + _without(out_BTD, ablate_D)

    h_BTD = rms_norm(x_BTD, layer.mlp_norm_LD, cfg.norm_eps)
    out_BTD = experts_forward(h_BTD, layer, cfg) if cfg.n_experts else _feed_forward(h_BTD, layer, lora)
    return x_BTD + _without(constrain(out_BTD, "batch", None, None), ablate_D), kv


def _feed_forward(h_BTD, layer: Layers, lora: dict):
    gate_BTF = project(h_BTD, layer.gate_LDF, 1, layer.b_gate_LF, lora.get("gate"))
    up_BTF = project(h_BTD, layer.up_LDF, 1, layer.b_up_LF, lora.get("up"))
    h_BTF = constrain(jax.nn.silu(gate_BTF) * up_BTF, "batch", None, "ffn")
    return project(h_BTF, layer.down_LFD, 1, layer.b_down_LD, lora.get("down"))


def _gathered(layer: Layers, cfg: DecoderConfig) -> Layers:
    """The weights of one block, whole over fsdp (ZeRO-3): matrices in the compute dtype, so that half the bytes are moved in bfloat16."""

    def one(w, x):
        return gather(x.astype(cfg.compute_dtype) if w.decays else x, *w.axes[1:])

    declared = declare(cfg).layers
    return map_weights(one, declared, layer.replace(lora=None))


def _without(x_BTD, unit_D):
    """x minus its component along a unit vector, computed in float32; x itself where there is none."""
    if unit_D is None:
        return x_BTD
    x32, unit_D = x_BTD.astype(jnp.float32), unit_D.astype(jnp.float32)
    return (x32 - (x32 @ unit_D)[..., None] * unit_D).astype(x_BTD.dtype)


def prompt_inputs(mask_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions and segments of padded rows from their masks (1 = token, 0 = padding); padding may be on either side.

    >>> import jax.numpy as jnp
    >>> positions, segments = prompt_inputs(jnp.array([[0, 0, 1, 1]]))
    >>> positions.tolist(), segments.tolist()
    ([[0, 0, 0, 1]], [[0, 0, 1, 1]])
    """
    segments_BP = mask_BP.astype(jnp.int32)
    return jnp.maximum(jnp.cumsum(segments_BP, axis=-1) - 1, 0), segments_BP
