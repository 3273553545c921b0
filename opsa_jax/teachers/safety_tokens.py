"""The safety tokens S: those whose log-probability a safe teacher raises most (SafeSteer, arXiv 2606.02530).

The teacher answers some prompts; its tokens are scored under the teacher and under the base. At every position each token of the
vocabulary has delta = log p_teacher - log p_base, and the position votes for its largest. S are the tokens with most votes.

The arrays [positions, V] exist for one micro-batch at a time: what is kept are sums and counts per token.
"""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from opsa_jax.data.chat import Chat, left_pad
from opsa_jax.errors import UserError
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params, head_weight
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.parallel.mesh import round_up
from opsa_jax.rollout import decode

Row = Sequence[int]
Chunk = tuple[jax.Array, jax.Array, jax.Array]
"""log p_teacher [N, V], log p_base [N, V], float32, and keep [N], bool."""


@dataclass(frozen=True)
class Tally:
    """What the positions say about every token."""

    votes_V: np.ndarray
    """int64; zero for banned tokens."""
    mean_delta_V: np.ndarray
    """float64, nats: mean over positions of log p_teacher - log p_base."""
    banned_V: np.ndarray
    """bool: special, or hardly ever probable under the teacher."""
    positions: int
    """Positions that voted."""


def tally(chunks: Callable[[], Iterable[Chunk]], banned_V: np.ndarray, min_prob: float, top: int) -> Tally:
    """Ban, then vote; goes through the chunks twice.

    A token is banned if `banned_V` says so or if its probability under the teacher, averaged over the kept positions, is below
    `min_prob`. Every kept position votes for the `top` tokens of largest delta that are not banned (of equals, the smaller id).

    Raises:
        UserError: no position is kept, or every token is banned.
    """
    V = len(banned_V)
    prob_V, delta_V, positions = np.zeros(V), np.zeros(V), 0
    for chunk in chunks():
        prob, delta, n = jax.device_get(_sums(*chunk))
        prob_V, delta_V, positions = prob_V + prob, delta_V + delta, positions + int(n)
    if positions == 0:
        raise UserError("empty token set: the base ends every response at once, so no position votes; use other --vote-prompts")
    banned_V = np.asarray(banned_V) | (prob_V / positions < min_prob)
    allowed = int((~banned_V).sum())
    if allowed == 0:
        raise UserError(f"empty token set: every token is special or below --min-steered-prob {min_prob:g}; lower it")
    votes_V = np.zeros(V, np.int64)
    for chunk in chunks():
        votes_V += np.asarray(_votes(*chunk, jnp.asarray(banned_V), min(top, allowed)))
    return Tally(votes_V, delta_V / positions, banned_V, positions)


@jax.jit
def _sums(teacher_NV, base_NV, keep_N):
    kept_N1 = keep_N[:, None]
    return (
        jnp.sum(jnp.where(kept_N1, jnp.exp(teacher_NV), 0.0), axis=0),
        jnp.sum(jnp.where(kept_N1, teacher_NV - base_NV, 0.0), axis=0),
        jnp.sum(keep_N),
    )


@functools.partial(jax.jit, static_argnames="top")
def _votes(teacher_NV, base_NV, keep_N, banned_V, top):
    _, ids_NK = jax.lax.top_k(jnp.where(banned_V, -jnp.inf, teacher_NV - base_NV), top)
    return jnp.zeros(banned_V.shape, jnp.int32).at[ids_NK].add(keep_N[:, None].astype(jnp.int32))


def choose(found: Tally, size: int, ranking: Literal["votes", "mean-delta"] = "votes") -> np.ndarray:
    """At most `size` ids, best first: by votes, then mean delta, then id; or by mean delta, then id. int32 [K].

    >>> t = Tally(np.array([5, 0, 5, 7]), np.array([0.1, 9.0, 0.2, 0.0]), np.zeros(4, bool), 7)
    >>> choose(t, 3).tolist(), choose(t, 2, "mean-delta").tolist()
    ([3, 2, 0], [1, 2])

    Raises:
        UserError: no token has a vote.
    """
    ids_V = np.arange(len(found.votes_V))
    keys = (ids_V, -found.mean_delta_V, -found.votes_V) if ranking == "votes" else (ids_V, -found.mean_delta_V)
    allowed_V = ~found.banned_V & ((found.votes_V > 0) | (ranking != "votes"))
    order = [i for i in np.lexsort(keys) if allowed_V[i]][:size]
    if not order:
        raise UserError("empty token set: no token has a vote; raise --tokens and --top-votes to at least 1")
    return np.array(order, np.int32)


def banned_tokens(chat: Chat, vocab_size: int) -> np.ndarray:
    """Tokens that cannot be safety tokens, bool [V]: special and added tokens, ends of responses, rows beyond the tokenizer's ids."""
    banned_V = np.ones(vocab_size, bool)
    banned_V[: len(chat.tokenizer)] = False
    marked = [*chat.tokenizer.all_special_ids, *chat.tokenizer.added_tokens_decoder, *chat.stop_ids, chat.pad_id]
    banned_V[[i for i in marked if i < vocab_size]] = True
    return banned_V


@functools.partial(jax.jit, static_argnames=("cfg", "suppressed", "length"))
def sample_open(
    params: Params, cfg: DecoderConfig, ids_BP, mask_BP, keys_B, suppressed: tuple[int, ...], length: int, steer_LD=None
) -> jax.Array:
    """Exactly `length` tokens per row at temperature 1, int32 [B, length]; the suppressed ids are never drawn.

    Args:
        ids_BP, mask_BP: left-padded prompts.
        keys_B: typed keys; token j is drawn with fold_in(key, j).
        suppressed: ids of the tokens that end a response (static).
    """
    params = decode.decode_weights(params, cfg)
    lengths_B, live_B = jnp.sum(mask_BP, -1, dtype=jnp.int32), jnp.sum(mask_BP, -1) > 0
    hidden_BD, cache = decode.prefill(params, cfg, ids_BP, mask_BP, steer_LD)
    head_DV = head_weight(params).astype(hidden_BD.dtype)
    off_V = jnp.isin(jnp.arange(head_DV.shape[1]), jnp.asarray(suppressed, jnp.int32))

    def step(carry, j):
        hidden_BD, cache = carry
        logits_BV = jnp.dot(hidden_BD, head_DV, preferred_element_type=jnp.float32)
        token_B = decode.draw(jnp.where(off_V, -jnp.inf, logits_BV), jax.vmap(jax.random.fold_in, (0, None))(keys_B, j))
        return decode.step(params, cfg, cache, token_B, lengths_B + j, live_B, steer_LD), token_B

    carry = hidden_BD, decode.resize(cache, ids_BP.shape[1] + length)
    return jax.lax.scan(step, carry, jnp.arange(length))[1].T


@dataclass(frozen=True)
class Comparison:
    """Responses of the teacher, scored under teacher and base.

    The distributions compared are those after 0, 1, ..., T response tokens, T + 1 per row. A row's positions from the first one on
    where the base would most likely end its response are not kept.
    """

    params: Params
    cfg: DecoderConfig
    teacher_rows: Sequence[Row]
    """Prompts as the teacher sees them."""
    base_rows: Sequence[Row]
    """The same prompts as the base sees them."""
    responses_NT: np.ndarray
    end_ids: tuple[int, ...]
    steer_LD: jax.Array | None
    """Steers the teacher."""
    batch: int
    """Rows scored at a time."""

    def chunks(self) -> Iterable[Chunk]:
        """Chunks for `tally`, computed anew at every call."""
        widths = [round_up(max(map(len, rows)), 32) for rows in (self.teacher_rows, self.base_rows)]
        for at in range(0, len(self.responses_NT), self.batch):
            part = slice(at, at + self.batch)
            fill = self.batch - len(self.responses_NT[part])
            responses_BT = np.pad(self.responses_NT[part], ((0, fill), (0, 0)))
            padded = [
                left_pad([*rows[part], *[[]] * fill], width, 0)
                for rows, width in zip((self.teacher_rows, self.base_rows), widths, strict=True)
            ]
            real_B = np.arange(self.batch) < self.batch - fill
            yield _compare(self.params, self.cfg, *padded, responses_BT, real_B, self.end_ids, self.steer_LD)


@functools.partial(jax.jit, static_argnames=("cfg", "end_ids"))
def _compare(params, cfg, teacher, base, responses_BT, real_B, end_ids, steer_LD) -> Chunk:
    B, T = responses_BT.shape

    def logp(prompt, steer_LD):
        ids_BP, mask_BP = prompt
        ids_BS = jnp.concatenate([ids_BP, responses_BT], axis=1)
        mask_BS = jnp.concatenate([mask_BP, jnp.broadcast_to(real_B[:, None], (B, T)).astype(mask_BP.dtype)], axis=1)
        hidden_BHD = forward(params, cfg, ids_BS, *prompt_inputs(mask_BS), steer_LD=steer_LD).hidden_BTD[:, -T - 1 :]
        head_DV = head_weight(params).astype(hidden_BHD.dtype)
        return jax.nn.log_softmax(jnp.dot(hidden_BHD, head_DV, preferred_element_type=jnp.float32))

    teacher_BHV, base_BHV = logp(teacher, steer_LD), logp(base, None)
    ends_BH = decode.is_stop(jnp.argmax(base_BHV, axis=-1), end_ids)
    keep_BH = (jnp.cumsum(ends_BH, axis=1) == 0) & real_B[:, None]
    V = base_BHV.shape[-1]
    return teacher_BHV.reshape(-1, V), base_BHV.reshape(-1, V), keep_BH.reshape(-1)


def load_tokens(path: str | Path, vocab_size: int) -> np.ndarray:
    """The ids of a token file (`tokens.json` of `opsa steer`), int32 [K], as they are ordered there.

    Raises:
        UserError: no such file, another kind of file, an empty set, repeated ids, or ids or a vocabulary that are not this model's.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        ids = [token["id"] for token in raw["tokens"]]
        made_for = raw["vocab_size"]
    except OSError as e:
        raise UserError(f"token file {path} cannot be read: {e.strerror}; make one with `opsa steer`") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"token file {path} is not a tokens.json of `opsa steer` ({type(e).__name__}: {e})") from None
    if not ids:
        raise UserError(f"token file {path}: empty token set; run `opsa steer` with other --vote-prompts or a lower --min-steered-prob")
    if made_for != vocab_size:
        raise UserError(f"token file {path} was made for a vocabulary of {made_for}, but the model has {vocab_size} rows; make one for it")
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids) or len(set(ids)) < len(ids):
        raise UserError(f"token file {path}: ids must be different numbers from 0 to {vocab_size - 1}; make it anew with `opsa steer`")
    return np.array(ids, np.int32)
