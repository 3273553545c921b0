"""Log-likelihoods of given continuations: multiple choice, and what lm-eval asks for."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from opsa_jax.data.chat import Chat, left_pad
from opsa_jax.data.records import Record
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params, head_weight
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.objectives.logp import chunked_logp
from opsa_jax.parallel.mesh import current_shards, round_up

_CHUNK = 1024  # tokens whose logits exist at the same time
_CUE = "The answer is"


@dataclass(frozen=True)
class Scored:
    """A continuation under the model."""

    logp_T: np.ndarray
    """float32, nats, one per continuation token."""
    greedy: bool
    """Every token is the most likely one."""

    @property
    def total(self) -> float:
        return float(self.logp_T.astype(np.float64).sum())


def score_continuations(
    params: Params,
    cfg: DecoderConfig,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Scored]:
    """Log-probability of each continuation after its context, at temperature 1 over the whole vocabulary.

    Args:
        pairs: (ids of the context, at least one; ids of the continuation).
        batch: rows at a time; similar lengths go together.

    Returns:
        In the order of the pairs. An empty continuation has total 0 and is greedy.
    """
    batch = round_up(batch, current_shards())
    order = sorted((i for i, (_, c) in enumerate(pairs) if len(c)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    found = [Scored(np.zeros(0, np.float32), True) for _ in pairs]
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        texts = [[*pairs[i][0], *pairs[i][1]] for i in rows]
        W = _size(max(len(pairs[i][1]) for i in rows))
        T = _size(max(W + 1, *map(len, texts)))
        fill = [[0]] * (batch - len(rows))
        ids_BT, mask_BT = left_pad([*texts, *fill], T, 0)
        use_BW = np.zeros((batch, W), np.float32)
        for b, i in enumerate(rows):
            use_BW[b, W - len(pairs[i][1]) :] = 1
        logp_BW, top_BW = jax.device_get(_score(params, cfg, ids_BT, mask_BT, use_BW))
        for b, i in enumerate(rows):
            n = len(pairs[i][1])
            found[i] = Scored(logp_BW[b, W - n :].copy(), bool(top_BW[b, W - n :].all()))
        progress(min(start + batch, len(order)), len(order))
    return found


def _size(n: int) -> int:
    """Few shapes, so few compilations: powers of two and the middles between them, from 8."""
    power = max(8, 1 << (n - 1).bit_length())
    return power * 3 // 4 if n <= power * 3 // 4 and power > 8 else power


@functools.partial(jax.jit, static_argnames="cfg")
def _score(params: Params, cfg: DecoderConfig, ids_BT, mask_BT, use_BW):
    """Rows end in the last column, so the continuations' tokens are in the last W columns, and what predicts them one before."""
    B, W = use_BW.shape
    T = ids_BT.shape[1]
    positions_BT, segments_BT = prompt_inputs(mask_BT)
    out = forward(params, cfg, ids_BT, positions_BT, segments_BT)
    h_ND = out.hidden_BTD[:, T - W - 1 : T - 1].reshape(B * W, -1)
    ids_N, head_DV = ids_BT[:, T - W :].reshape(-1), head_weight(params)[:, : cfg.vocab_size].astype(h_ND.dtype)
    logp_N, _ = chunked_logp(h_ND, head_DV, use_BW.reshape(-1), ids_N, chunk=_CHUNK, train_head=False)

    def is_top(rows):
        h_CD, ids_C = rows
        logits_CV = jnp.dot(h_CD, head_DV, preferred_element_type=jnp.float32)
        return jnp.take_along_axis(logits_CV, ids_C[:, None], 1)[:, 0] >= logits_CV.max(-1)

    C = min(_CHUNK, B * W)
    h_ND, ids_N = (jnp.pad(x, [(0, -(B * W) % C)] + [(0, 0)] * (x.ndim - 1)) for x in (h_ND, ids_N))
    top_N = jax.lax.map(is_top, (h_ND.reshape(-1, C, h_ND.shape[1]), ids_N.reshape(-1, C)))
    return logp_N.reshape(B, W), top_N.reshape(-1)[: B * W].reshape(B, W)


def choice_pairs(chat: Chat, record: Record, prompt: Sequence[int], opened: bool) -> list[tuple[list[int], list[int]]]:
    """(context, option) for each option of a multiple-choice record: the letters after "The answer is", in the assistant's turn.

    Where the prompt opens a think block, it is closed first: the letter is asked for at once.
    """
    cue = chat.encode_texts([("\n\n</think>\n\n" if opened else "") + _CUE])[0].tolist()
    letters = chat.encode_texts([f" {letter}" for letter in "ABCDEFGHIJ"[: record.extra["options"]]])
    return [([*prompt, *cue], ids.tolist()) for ids in letters]


def best_option(scores: Sequence[Scored]) -> tuple[str, list[float]]:
    """The letter whose continuation is the most likely (the first of equals), and all log-likelihoods, in nats."""
    totals = [s.total for s in scores]
    return "ABCDEFGHIJ"[int(np.argmax(totals))], totals
