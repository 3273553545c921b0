"""AdamW with warm-up, decay to a schedule, global-norm clipping and a weight-decay mask."""

import jax
import optax

from opsa_jax.config import OptimConfig
from opsa_jax.models.params import Lora, Params, declare, map_weights


def schedule(cfg: OptimConfig, total: int) -> optax.Schedule:
    """Learning rate by update number, 0-based: linear warm-up to the peak, then cosine, linear or constant.

    The first update already has a positive rate: with 10 warm-up updates the rates are 1/10, 2/10, ..., 10/10 of the peak.
    """
    warmup = int(cfg.warmup) if cfg.warmup >= 1 else round(cfg.warmup * total)
    rest = max(total - warmup, 1)
    end = cfg.lr * cfg.final_lr
    after = {
        "constant": lambda: optax.constant_schedule(cfg.lr),
        "linear": lambda: optax.linear_schedule(cfg.lr, end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(cfg.lr, rest, alpha=cfg.final_lr),
    }[cfg.schedule]()
    if warmup == 0:
        return after
    rise = optax.linear_schedule(cfg.lr / warmup, cfg.lr, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def decay_mask(trainable: Params | dict[str, Lora], cfg) -> object:
    """True for weights that decay: matrices, and all adapter factors; False for norm scales and biases."""
    if isinstance(trainable, Params):
        return map_weights(lambda w: w.decays, declare(cfg))
    return jax.tree.map(lambda _: True, trainable)


def make_optimizer(cfg: OptimConfig, total: int, mask) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (decoupled decay). Moments have the dtype of the weights."""
    adamw = optax.adamw(schedule(cfg, total), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adamw) if cfg.clip_norm > 0 else adamw
