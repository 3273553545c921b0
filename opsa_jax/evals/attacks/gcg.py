"""Greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043, Algorithms 1 and 2): a suffix that makes the model start with a target.

    loss(suffix) = -mean_r log p(target_r | before, suffix, after, target_<r)

One step: the gradient of the loss in the one-hot vectors of the suffix tokens; per position, the k tokens it favours most; a batch of
suffixes with one of these substitutions each; the best of them by its true loss is the next suffix. Candidates are evaluated in one
compiled program of fixed shapes, a chunk at a time, and the logits of a chunk exist only in the chunks of `objectives.logp`.

The gradient needs no one-hot matrix: the row's embeddings are the table and the tokens their numbers, so dL/dx of the suffix comes from
autodiff, and dL/d(one-hot) = dL/dx @ embedding^T.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opsa_jax.evals.attacks.settings import GcgSettings
from opsa_jax.evals.attacks.suffix import Layout, Vocabulary
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params, head_weight
from opsa_jax.models.transformer import forward, prompt_inputs
from opsa_jax.objectives.logp import chunked_logp
from opsa_jax.parallel.mesh import current_shards, round_up
from opsa_jax.parallel.rules import constrain

_LOGIT_ROWS = 512  # target tokens whose logits exist at the same time


def _target_logp(params: Params, hidden_CTD, row_T, P: int, use_R):
    """Log-probabilities [C, R] of the target tokens, which follow column P - 1."""
    R, C = use_R.shape[0], hidden_CTD.shape[0]
    h_ND = hidden_CTD[:, P - 1 : P + R - 1].reshape(C * R, -1)
    ids_N, use_N = jnp.tile(row_T[P:], C), jnp.tile(use_R, C)
    logp_N, _ = chunked_logp(h_ND, head_weight(params), use_N, ids_N, chunk=min(C * R, _LOGIT_ROWS), train_head=False)
    return logp_N.reshape(C, R)


def _loss(logp_CR, use_R):
    return -jnp.sum(logp_CR, axis=1) / jnp.sum(use_R)


@functools.partial(jax.jit, static_argnames=("cfg", "P", "copies"))
def suffix_gradient(params: Params, cfg: DecoderConfig, P: int, row_T, mask_T, use_R, at, suffix_S, copies: int = 1):
    """The loss, and its gradient in the one-hot vectors of the suffix.

    Args:
        P: columns of the prompt, which ends in column P - 1; the target follows (static).
        row_T, mask_T: int32 tokens (those of the suffix do not matter) and 1 where there is a token.
        use_R: float32, 1 for tokens of the target, 0 for padding after it.
        at: first column of the suffix.
        suffix_S: int32 tokens of the suffix.
        copies: rows the batch axis of the mesh needs (static).

    Returns:
        loss, float32 scalar in nats; gradient_SV float32.
    """
    table_VD = params.embed_VD
    row_T = jax.lax.dynamic_update_slice(row_T, suffix_S, (at,))

    def loss_of(x_SD):
        x_TD = jax.lax.dynamic_update_slice(table_VD[row_T].astype(jnp.float32), x_SD, (at, 0))
        T = row_T.shape[0]
        x_ND, tokens_CT = jnp.tile(x_TD, (copies, 1)), jnp.arange(copies * T).reshape(copies, T)
        positions, segments = prompt_inputs(jnp.tile(mask_T[None], (copies, 1)))
        hidden = forward(params.replace(embed_VD=x_ND), cfg, tokens_CT, positions, segments).hidden_BTD
        return jnp.mean(_loss(_target_logp(params, hidden, row_T, P, use_R), use_R))

    loss, gradient_SD = jax.value_and_grad(loss_of)(table_VD[suffix_S].astype(jnp.float32))
    return loss, constrain(jnp.einsum("sd,vd->sv", gradient_SD, table_VD.astype(jnp.float32)), None, "vocab")


@functools.partial(jax.jit, static_argnames=("cfg", "P", "chunk"))
def suffix_losses(params: Params, cfg: DecoderConfig, P: int, row_T, mask_T, use_R, at, suffixes_BS, chunk: int):
    """Loss of every candidate [B], float32; B is a multiple of `chunk`. Otherwise as `suffix_gradient`."""
    B, S = suffixes_BS.shape

    def some(suffixes_CS):
        rows_CT = jax.vmap(lambda s: jax.lax.dynamic_update_slice(row_T, s, (at,)))(suffixes_CS)
        positions, segments = prompt_inputs(jnp.tile(mask_T[None], (chunk, 1)))
        hidden = forward(params, cfg, constrain(rows_CT, "batch", None), positions, segments).hidden_BTD
        return _loss(_target_logp(params, hidden, row_T, P, use_R), use_R)

    return jax.lax.map(some, suffixes_BS.reshape(B // chunk, chunk, S)).reshape(B)


@functools.partial(jax.jit, static_argnames=("cfg", "P", "copies"))
def target_is_greedy(params: Params, cfg: DecoderConfig, P: int, row_T, mask_T, use_R, at, suffix_S, copies: int = 1):
    """Whether greedy decoding gives the target: the one place with logits [R, V], of a single suffix."""
    row_T = jax.lax.dynamic_update_slice(row_T, suffix_S, (at,))
    positions, segments = prompt_inputs(jnp.tile(mask_T[None], (copies, 1)))
    hidden_TD = forward(params, cfg, jnp.tile(row_T[None], (copies, 1)), positions, segments).hidden_BTD[0]
    R = use_R.shape[0]
    head_DV = head_weight(params).astype(hidden_TD.dtype)
    logits_RV = jnp.einsum("rd,dv->rv", hidden_TD[P - 1 : P + R - 1], head_DV, preferred_element_type=jnp.float32)
    return jnp.all((jnp.argmax(logits_RV, axis=-1) == row_T[P:]) | (use_R == 0))


@functools.partial(jax.jit, static_argnames="k")
def _favoured(gradient_SV, allowed_V, suffix_S, k: int):
    """Ids [S, k] of allowed tokens with the most negative gradient, the token that is there left out."""
    V = gradient_SV.shape[1]
    usable_SV = allowed_V[None] & (jnp.arange(V)[None] != suffix_S[:, None])
    return jax.lax.top_k(jnp.where(usable_SV, -gradient_SV, -jnp.inf), k)[1]


@dataclass
class State:
    """An optimisation between two steps; JSON values only, so that it can be put down and taken up again."""

    suffix: list[int]
    best: list[int]
    best_loss: float = float("inf")
    step: int = 0
    active: int = 1
    """Prompts optimised on so far (universal)."""
    evaluations: int = 0
    """Candidates whose loss was computed, times prompts."""
    matched: bool = False
    """Greedy decoding gives the target, for all prompts."""
    stuck: bool = False
    """No substitution survives decoding and encoding."""
    losses: list[float] = field(default_factory=list)
    """Loss of the suffix before each step, a mean over the active prompts."""


class Search:
    """The model side: programs with fixed shapes for a set of layouts.

    Args:
        layouts: prompts with their targets (`suffix.Layout`); one program serves all of them.
    """

    def __init__(self, params: Params, cfg: DecoderConfig, vocabulary: Vocabulary, layouts: Sequence[Layout], settings: GcgSettings):
        self._params, self._cfg, self._vocabulary = params, cfg, vocabulary
        self.layouts, self.settings = list(layouts), settings
        self._shards = current_shards()
        self._chunk = round_up(min(settings.chunk, settings.candidates), self._shards)
        self.B = round_up(settings.candidates, self._chunk)
        """Rows of the program that evaluates candidates: `candidates`, and repeats of the first that fill the last chunk."""
        S = settings.suffix_tokens
        P = round_up(max(len(x.before) + S + len(x.after) for x in layouts), 32)
        R = round_up(max(len(x.target) for x in layouts), 8)  # few shapes, so few programs
        self._inputs = [(P, *x.row(S, P, R)) for x in layouts]
        self._allowed = jnp.asarray(np.pad(vocabulary.allowed_V, (0, max(0, cfg.vocab_size - len(vocabulary.allowed_V))))[: cfg.vocab_size])

    def gradients(self, suffix: Sequence[int], active: int):
        """Sum over prompts of the gradients [S, V], each scaled to unit norm per position (as the authors' code does); mean loss."""
        total, losses = 0.0, []
        for inputs in self._inputs[:active]:
            loss, g_SV = suffix_gradient(self._params, self._cfg, *inputs, np.asarray(suffix, np.int32), copies=self._shards)
            total = total + g_SV / jnp.maximum(jnp.linalg.norm(g_SV, axis=1, keepdims=True), 1e-30)
            losses.append(loss)
        return total, float(np.mean([float(x) for x in losses]))

    def losses(self, suffixes: Sequence[Sequence[int]], active: int) -> np.ndarray:
        """Mean loss over the active prompts of each suffix."""
        rows = np.asarray([*suffixes, *[suffixes[0]] * (self.B - len(suffixes))], np.int32)
        found = [suffix_losses(self._params, self._cfg, *inputs, rows, chunk=self._chunk) for inputs in self._inputs[:active]]
        return np.mean([np.asarray(x) for x in found], axis=0)[: len(suffixes)]

    def matched(self, suffix: Sequence[int], active: int) -> bool:
        ids = np.asarray(suffix, np.int32)
        return all(bool(target_is_greedy(self._params, self._cfg, *i, ids, copies=self._shards)) for i in self._inputs[:active])

    def propose(self, suffix: Sequence[int], gradient_SV, rng: np.random.Generator, active: int) -> list[list[int]]:
        """At most `candidates` different suffixes with one token replaced, each of which survives decoding and encoding."""
        S, allowed = len(suffix), np.flatnonzero(np.asarray(self._allowed))
        if self.settings.proposals == "random":
            options_SK = np.broadcast_to(allowed, (S, len(allowed)))
        else:
            k = min(self.settings.top_k, len(allowed) - 1)
            options_SK = np.asarray(_favoured(gradient_SV, self._allowed, np.asarray(suffix, np.int32), k))
        order, more = rng.permutation(options_SK.size), 2 * self.settings.candidates
        found: list[list[int]] = []
        for start in range(0, len(order), more):
            drawn = []
            for position, rank in zip(*np.unravel_index(order[start : start + more], options_SK.shape), strict=True):
                if options_SK[position, rank] != suffix[position]:
                    drawn.append([*suffix[:position], int(options_SK[position, rank]), *suffix[position + 1 :]])
            found += [s for s, good in zip(drawn, self._vocabulary.survive(drawn, self.layouts[:active]), strict=True) if good]
            if len(found) >= self.settings.candidates:
                break
        return found[: self.settings.candidates]


def optimise(search: Search, state: State, seed: Sequence[int], save: Callable[[State], None] = lambda state: None) -> State:
    """Algorithm 1, and with several layouts Algorithm 2: a prompt is added whenever the suffix works for all prompts so far.

    Every step draws from a generator of its own, so an interrupted search goes on exactly as it would have.

    Args:
        seed: numbers that, with the step, seed the proposals.
        save: called every `save_every` steps with the state.
    """
    settings, prompts = search.settings, len(search.layouts)
    if state.step == 0 and not state.losses:
        state.best_loss = float(search.losses([state.suffix], state.active)[0])
        state.matched = _grow(search, state, prompts)
    while state.step < settings.steps and not state.stuck and not (state.matched and settings.stop):
        rng = np.random.default_rng([*seed, state.step])
        random = settings.proposals == "random"
        gradient_SV, loss = (None, state.best_loss) if random else search.gradients(state.suffix, state.active)
        state.losses.append(loss)
        candidates = search.propose(state.suffix, gradient_SV, rng, state.active)
        if not candidates:
            state.stuck = True
            break
        losses = search.losses(candidates, state.active)
        best = int(np.argmin(losses))
        state.evaluations += len(candidates) * state.active
        # The gradient's step always moves on (Algorithm 1); random search keeps what it has until something is better.
        if not random or losses[best] < loss:
            state.suffix = candidates[best]
        if losses[best] < state.best_loss:
            state.best, state.best_loss = candidates[best], float(losses[best])
            state.matched = _grow(search, state, prompts)
        state.step += 1
        if state.step % settings.save_every == 0:
            save(state)
    return state


def _grow(search: Search, state: State, prompts: int) -> bool:
    """Whether the best suffix works for all prompts; while it works for the active ones, the next becomes active."""
    while search.matched(state.best, state.active):
        if state.active == prompts:
            return True
        state.active += 1
        state.suffix = list(state.best)
        state.best_loss = float(search.losses([state.best], state.active)[0])
    return False


def as_json(state: State) -> dict[str, Any]:
    return asdict(state)
