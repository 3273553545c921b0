"""Pretraining of the embedded model: packed rows, Muon on the matrices (Jordan 2024), AdamW on the rest."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from optax.contrib import MuonDimensionNumbers, muon

from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params, declare, head_weight, init_params, map_weights
from opsa_jax.models.transformer import forward
from opsa_jax.sandbox.corpus import Example, examples

ROWS, LENGTH = 36, 144
PEAK_LR, WARMUP, FINAL, WEIGHT_DECAY = 4e-3, 50, 0.02, 0.05


def architecture(vocab_size: int) -> DecoderConfig:
    """A Qwen3 of about 0.85 M parameters."""
    return DecoderConfig(
        family="qwen3", vocab_size=vocab_size, d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=384,
        tie_embeddings=True, qk_norm=True, scan_unroll=4,
    )  # fmt: skip


@struct.dataclass
class Packed:
    """Rows of several examples each; examples of a row do not see each other."""

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray
    """1, 2, ... by example, 0 for padding."""
    trained_BT: np.ndarray
    """1 where the token is predicted in training: the response and its stop token."""


def encode(tokenizer, batch: list[Example]) -> list[tuple[np.ndarray, int]]:
    """(ids, number of leading ids that are given) of each example."""

    def prompt(e: Example) -> str:
        system = [{"role": "system", "content": e.system}] if e.system else []
        messages = [*system, {"role": "user", "content": e.user}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=e.thinking) + e.forced

    given = tokenizer([prompt(e) for e in batch], add_special_tokens=False)["input_ids"]
    answers = tokenizer([e.response + tokenizer.eos_token for e in batch], add_special_tokens=False)["input_ids"]
    return [(np.array(g + a, np.int32), len(g)) for g, a in zip(given, answers)]


def pack(encoded: list[tuple[np.ndarray, int]], rows: int, length: int = LENGTH) -> tuple[Packed, list[tuple[np.ndarray, int]]]:
    """First fit, longest first, into exactly `rows` rows; also returns what found no room."""
    tokens, positions, segments, trained = (np.zeros((rows, length), np.int32) for _ in range(4))
    used, count, left = np.zeros(rows, int), np.zeros(rows, int), []
    for ids, given in sorted(encoded, key=lambda e: -len(e[0])):
        fits = np.flatnonzero(used + len(ids) <= length)
        if not len(fits):
            left.append((ids, given))
            continue
        row = fits[0]
        span = slice(used[row], used[row] + len(ids))
        count[row] += 1
        tokens[row, span], positions[row, span], segments[row, span] = ids, np.arange(len(ids)), count[row]
        trained[row, span.start + given : span.stop] = 1
        used[row] = span.stop
    return Packed(tokens, positions, segments, trained), left


def batches(tokenizer, seed: int, chunk: int = 16) -> Iterator[Packed]:
    """Endless stream of ROWS rows, packed `chunk` batches at a time; an example that finds no room waits for the next chunk."""
    rng = np.random.default_rng(seed)
    stream, waiting = examples(rng), []
    while True:
        while sum(len(ids) for ids, _ in waiting) < chunk * ROWS * LENGTH:
            waiting += encode(tokenizer, list(itertools.islice(stream, 1000)))
        packed, waiting = pack(waiting, chunk * ROWS)
        for batch in rng.permutation(chunk * ROWS).reshape(chunk, ROWS):
            yield jax.tree.map(lambda x, batch=batch: x[batch], packed)


def optimizer(cfg: DecoderConfig, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_LR, min(WARMUP, steps // 4), steps, FINAL * PEAK_LR)

    def dimensions(w):
        if not (w.stack and w.decays):
            return None
        inputs = 2 if w.axes[1] == "heads" else 1
        return MuonDimensionNumbers(tuple(range(1, 1 + inputs)), tuple(range(1 + inputs, len(w.shape))))

    rule = muon(
        schedule, weight_decay=WEIGHT_DECAY, consistent_rms=0.2, adam_b2=0.95,
        muon_weight_dimension_numbers=map_weights(dimensions, declare(cfg)),
    )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(1.0), rule)


def loss(params: Params, cfg: DecoderConfig, rows: Packed) -> jax.Array:
    """Mean negative log-likelihood of the trained tokens; the token in column t is predicted from column t - 1."""
    hidden_BTD = forward(params, cfg, rows.tokens_BT, rows.positions_BT, rows.segments_BT).hidden_BTD
    logits_BTV = jnp.einsum("btd,dv->btv", hidden_BTD[:, :-1], head_weight(params), preferred_element_type=jnp.float32)
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, rows.tokens_BT[:, 1:])
    weight_BT = rows.trained_BT[:, 1:]
    return jnp.sum(nll_BT * weight_BT) / jnp.sum(weight_BT)


def pretrain(tokenizer, seed: int, steps: int, log: Callable[[str], None] = print) -> tuple[Params, DecoderConfig]:
    """Train from scratch. About half a second per step on two free cores."""
    cfg = architecture(len(tokenizer))
    params = init_params(cfg, jax.random.key(seed))
    rule = optimizer(cfg, steps)
    state = rule.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, rows):
        value, grads = jax.value_and_grad(loss)(params, cfg, rows)
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    start, stream = time.perf_counter(), batches(tokenizer, seed)
    for step in range(1, steps + 1):
        params, state, value = update(params, state, next(stream))
        if step % 25 == 0 or step == steps:
            log(f"step {step:4d}  loss {float(value):.3f}  {time.perf_counter() - start:.0f} s")
    return params, cfg
