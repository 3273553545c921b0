"""Many prompts through a fixed number of slots: when responses end, their slots are refilled (continuous batching).

All slots share one column counter, as in the sampler. A new prompt is written so that it ends at the current column, so no row needs
a write index of its own; what a slot held before is cut off by its segments. With prompts of two and three tokens, responses in
capitals, and slot 0 refilled at column 6:

    column    0 1 2 3 4 5 | 6 7
    slot 0    . . . x y z | Q R      (before: . a b C D <stop>)
    slot 1    . c d E F G | H I

When the counter reaches the end of the cache, all rows are moved left by what the longest living one leaves free, and the cache
grows by buckets if that is not enough. Keys are rotated by their own positions, so moving a row changes nothing.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from opsa_jax.data.chat import left_pad
from opsa_jax.models.cache import KVCache, init_cache
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params
from opsa_jax.parallel.mesh import current_shards, round_up
from opsa_jax.parallel.rules import constrain
from opsa_jax.rollout import decode
from opsa_jax.rollout.filters import Sampling

_SLACK = 32  # columns that moving the rows leaves free at least, so that it is rare
_SMALLEST_CACHE = 256


@dataclass(frozen=True)
class Response:
    """One sampled response."""

    ids: np.ndarray
    """int32, the stop token included."""
    logp: np.ndarray
    """float32, log-probability of each id under the model itself (temperature 1, nothing filtered)."""
    finished: bool
    """Ended by a stop token, not by the room."""


@dataclass
class Stats:
    """What the engine did since it was made."""

    prompts: int = 0
    tokens: int = 0
    """Response tokens, stop tokens included."""
    finished: int = 0
    """Responses ended by a stop token."""
    seconds: float = 0.0
    slot_steps: int = 0
    """Decode steps times slots."""
    programs: set = field(default_factory=set)
    """Shapes that were compiled for (or found compiled)."""

    @property
    def wasted(self) -> float:
        """Share of slot steps spent on slots without a living response."""
        return 1 - self.tokens / max(self.slot_steps, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def prompts_per_second(self) -> float:
        return self.prompts / max(self.seconds, 1e-9)


@struct.dataclass
class _Slots:
    """Everything on the device that decoding changes."""

    cache: KVCache
    hidden_BD: jax.Array
    """Predicts the next token of each slot."""
    keys_B: jax.Array
    position_B: jax.Array
    """Position of the next token."""
    count_B: jax.Array
    """Response tokens drawn so far."""
    live_B: jax.Array
    finished_B: jax.Array
    ids_BR: jax.Array
    logp_BR: jax.Array


class Engine:
    """Samples responses to any number of prompts. A response is the one that `sampler.sample` gives for the same prompt and key
    (up to rounding, which in bfloat16 can depend on shapes).

    Under a mesh (`jax.set_mesh`), slots are split over data and fsdp. With several processes all call it with the same arguments.

    Args:
        stop_ids: ids that end a response.
        max_new_tokens: room for a response.
        slots: responses decoded at the same time; rounded up to what the mesh divides.
        steer_LD: added to every block input at every position.
    """

    def __init__(
        self,
        params: Params,
        cfg: DecoderConfig,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        max_new_tokens: int,
        slots: int = 64,
        steer_LD: jax.Array | None = None,
    ):
        self._params = jax.jit(decode.decode_weights, static_argnums=1)(params, cfg)
        self._cfg, self._sampling, self._stop_ids, self._room = cfg, sampling, stop_ids, max_new_tokens
        self._slots, self._steer_LD = slots, steer_LD
        self.stats = Stats()

    def run(
        self, prompts: Sequence[Sequence[int]], keys_N: jax.Array, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Response]:
        """All responses in the order of the prompts. `progress` is called with (responses done, prompts) now and then."""
        found: dict[int, Response] = {}
        for i, response in self.stream(prompts, keys_N):
            found[i] = response
            progress(len(found), len(prompts))
        return [found[i] for i in range(len(prompts))]

    def stream(self, prompts: Sequence[Sequence[int]], keys_N: jax.Array) -> Iterator[tuple[int, Response]]:
        """(number of the prompt, response) as responses end.

        Args:
            prompts: ids, at least one each.
            keys_N: one typed key per prompt (`sampler.row_keys`).
        """
        if not prompts:
            return
        batch = _Batch(self, prompts, np.asarray(jax.random.key_data(keys_N)))
        while batch.busy:
            start = time.perf_counter()
            batch.refill()
            batch.decode()
            ended = batch.collect()
            self.stats.seconds += time.perf_counter() - start
            yield from ended


class _Batch:
    """One call of the engine: what the host knows about the slots, and the decisions it takes from it."""

    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], key_data_NK: np.ndarray):
        self.engine, self.prompts, self.key_data_NK = engine, prompts, key_data_NK
        # Short ones first: the cache starts small.
        self.queue = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
        shards = current_shards()
        self.B = round_up(min(engine._slots, 1 << (len(prompts) - 1).bit_length()), shards)
        # Slots refilled at a time: more wait longer, fewer make small prefills.
        self.group = round_up(max(1, self.B // 8), shards)
        self.owner_B = np.full(self.B, -1)
        """Number of the prompt in each slot, -1 when free."""
        self.used_B = np.zeros(self.B, np.int64)
        """Columns each living row occupies."""
        longest = len(prompts[self.queue[-1]])
        self.largest = _bucket(longest) + engine._room + _SLACK
        self.column = _bucket(len(prompts[self.queue[0]]))
        self.columns = self._size(self.column + _SLACK)
        self.slots = _empty(engine._cfg, self.B, self.columns, engine._room, self.column)

    @property
    def busy(self) -> bool:
        return bool(self.queue) or bool((self.owner_B >= 0).any())

    def refill(self) -> None:
        """Prompts into free slots, a group at a time, while there are enough of both."""
        free = np.flatnonzero(self.owner_B < 0)
        while self.queue and len(free) >= min(self.group, len(self.queue)):
            chosen = [self.queue.popleft() for _ in range(min(self.group, len(self.queue)))]
            rows, free = free[: len(chosen)], free[len(chosen) :]
            self._insert(chosen, rows)

    def _insert(self, chosen: list[int], rows: np.ndarray) -> None:
        engine, fill = self.engine, self.group - len(chosen)
        lengths = [len(self.prompts[i]) for i in chosen]
        P = _bucket(max(lengths))
        self._make_room(P)
        ids_GP, mask_GP = left_pad([*(self.prompts[i] for i in chosen), *[[]] * fill], P, 0)
        source_B = np.full(self.B, -1, np.int32)
        source_B[rows] = np.arange(len(chosen))
        keys_GK = self.key_data_NK[chosen + chosen[:1] * fill]
        self._note("prefill", self.group, P)
        hidden_GD, cache = _prefill(engine._params, engine._cfg, ids_GP, mask_GP, engine._steer_LD)
        self._note("insert", P, self.B, self.columns)
        lengths_G = np.array(lengths + [0] * fill, np.int32)
        self.slots = _insert(self.slots, hidden_GD, cache, keys_GK, lengths_G, source_B)
        self.owner_B[rows], self.used_B[rows] = chosen, lengths

    def decode(self) -> None:
        """Until a group of slots is free (with nothing left to insert: until all are), or the cache is full."""
        engine = self.engine
        self._make_room(0)
        self._note("decode", self.B, self.columns)
        wanted = min(self.group, len(self.queue)) if self.queue else self.B
        static = (engine._cfg, engine._sampling, engine._stop_ids)
        self.slots = _decode(engine._params, *static, self.slots, np.int32(wanted), engine._steer_LD)

    def collect(self) -> list[tuple[int, Response]]:
        """The responses that have ended; their slots become free."""
        state = jax.device_get(_view(self.slots))
        steps, self.column = int(state["length"]) - self.column, int(state["length"])
        ended_B = (self.owner_B >= 0) & ~state["live_B"]
        self.used_B = np.where(state["live_B"], self.used_B + steps, 0)
        ended = []
        for b in np.flatnonzero(ended_B):
            n = int(state["count_B"][b])
            response = Response(state["ids_BR"][b, :n].copy(), state["logp_BR"][b, :n].copy(), bool(state["finished_B"][b]))
            ended.append((int(self.owner_B[b]), response))
        self.owner_B[ended_B] = -1
        stats = self.engine.stats
        stats.slot_steps += steps * self.B
        stats.prompts += len(ended)
        stats.tokens += sum(len(r.ids) for _, r in ended)
        stats.finished += sum(r.finished for _, r in ended)
        return ended

    def _make_room(self, P: int) -> None:
        """Move rows so that P columns lie before the current one and at least one after it."""
        if self.column >= P and self.column < self.columns:
            return
        used = max(P, int(self.used_B.max()))
        columns = max(self.columns, self._size(used + _SLACK))
        self._note("move", self.B, self.columns, columns)
        self.slots = _move(self.slots, columns, np.int32(self.column - used))
        self.column, self.columns = used, columns

    def _size(self, columns: int) -> int:
        """Sizes of the cache double up to the largest that can be needed."""
        return min(self.largest, max(_SMALLEST_CACHE, 1 << (columns - 1).bit_length()))

    def _note(self, *program) -> None:
        self.engine.stats.programs.add(program)


def _bucket(n: int) -> int:
    """Prompt lengths are rounded up to 32, 48, 64, 96, 128, 192, ...

    >>> [_bucket(n) for n in (1, 33, 48, 65, 97, 200)]
    [32, 48, 48, 96, 128, 256]
    """
    power = max(32, 1 << (n - 1).bit_length())
    return power * 3 // 4 if n <= power * 3 // 4 and power > 32 else power


@functools.partial(jax.jit, static_argnames=("cfg", "B", "columns", "R"))
def _empty(cfg: DecoderConfig, B: int, columns: int, R: int, length) -> _Slots:
    def zeros(*shape, dtype=jnp.int32):
        return constrain(jnp.zeros(shape, dtype), "batch", *[None] * (len(shape) - 1))

    return _Slots(
        cache=init_cache(cfg, B, columns).replace(length=jnp.asarray(length, jnp.int32)),
        hidden_BD=zeros(B, cfg.d_model, dtype=cfg.compute_dtype),
        keys_B=jax.vmap(jax.random.key)(zeros(B)),
        position_B=zeros(B),
        count_B=zeros(B),
        live_B=zeros(B, dtype=bool),
        finished_B=zeros(B, dtype=bool),
        ids_BR=zeros(B, R),
        logp_BR=zeros(B, R, dtype=jnp.float32),
    )


_prefill = functools.partial(jax.jit, static_argnames="cfg")(decode.prefill)


@functools.partial(jax.jit, donate_argnames="slots")
def _insert(slots: _Slots, hidden_GD, new: KVCache, key_data_GK, lengths_G, source_B) -> _Slots:
    """Slot b takes prefilled row source_B[b], or stays as it is where that is negative. Prompts end before the current column."""
    take_B, row_B = source_B >= 0, jnp.maximum(source_B, 0)
    P = new.segments_BS.shape[1]
    start = slots.cache.length - P

    def merged(old, rows, axis=0):
        """`rows`, already one per slot along `axis`, where a slot is taken."""
        return jnp.where(jnp.expand_dims(take_B, [a for a in range(old.ndim) if a != axis]), rows, old)

    def columns(old_LBKSH, new_LGKPH):
        shape = (*old_LBKSH.shape[:3], P, old_LBKSH.shape[4])
        at = (0, 0, 0, start, 0)
        rows = merged(jax.lax.dynamic_slice(old_LBKSH, at, shape), new_LGKPH[:, row_B], axis=1)
        return jax.lax.dynamic_update_slice(old_LBKSH, rows, at)

    own_BS = jax.lax.dynamic_update_slice(jnp.zeros_like(slots.cache.segments_BS), new.segments_BS[row_B], (0, start))
    cache = KVCache(
        k_LBKSH=columns(slots.cache.k_LBKSH, new.k_LBKSH),
        v_LBKSH=columns(slots.cache.v_LBKSH, new.v_LBKSH),
        segments_BS=merged(slots.cache.segments_BS, own_BS),
        length=slots.cache.length,
    )
    return slots.replace(
        cache=cache,
        hidden_BD=merged(slots.hidden_BD, hidden_GD[row_B]),
        keys_B=merged(slots.keys_B, jax.random.wrap_key_data(key_data_GK)[row_B]),
        position_B=merged(slots.position_B, lengths_G[row_B]),
        count_B=jnp.where(take_B, 0, slots.count_B),
        live_B=slots.live_B | take_B,
        finished_B=slots.finished_B & ~take_B,
    )


@functools.partial(jax.jit, static_argnames=("cfg", "sampling", "stop_ids"), donate_argnames="slots")
def _decode(params: Params, cfg: DecoderConfig, sampling: Sampling, stop_ids: tuple[int, ...], slots: _Slots, wanted, steer_LD) -> _Slots:
    """Steps of all slots until `wanted` of them are free or the cache is full."""
    B, R = slots.ids_BR.shape
    columns = slots.cache.segments_BS.shape[1]

    def step(s: _Slots) -> _Slots:
        token_B, logp_B = decode.next_token(params, sampling, s.hidden_BD, s.keys_B, s.count_B)
        hidden_BD, cache = decode.step(params, cfg, s.cache, token_B, s.position_B, s.live_B, steer_LD)
        stop_B = decode.is_stop(token_B, stop_ids)
        at = jnp.arange(B), jnp.where(s.live_B, s.count_B, R)  # R is out of range: dropped
        return s.replace(
            cache=cache,
            hidden_BD=hidden_BD,
            position_B=s.position_B + 1,
            count_B=s.count_B + s.live_B,
            live_B=s.live_B & ~stop_B & (s.count_B + 1 < R),
            finished_B=s.finished_B | (s.live_B & stop_B),
            ids_BR=s.ids_BR.at[at].set(token_B, mode="drop"),
            logp_BR=s.logp_BR.at[at].set(logp_B, mode="drop"),
        )

    return jax.lax.while_loop(lambda s: (jnp.sum(~s.live_B) < wanted) & (s.cache.length < columns), step, slots)


@functools.partial(jax.jit, static_argnames="columns")
def _move(slots: _Slots, columns: int, by) -> _Slots:
    """All rows `by` columns to the left (negative: to the right), in a cache of this many columns. What comes round the end is free."""
    cache = decode.resize(slots.cache, columns)
    cache = KVCache(
        k_LBKSH=jnp.roll(cache.k_LBKSH, -by, axis=3),
        v_LBKSH=jnp.roll(cache.v_LBKSH, -by, axis=3),
        segments_BS=jnp.roll(cache.segments_BS, -by, axis=1),
        length=cache.length - by,
    )
    return slots.replace(cache=cache)


@jax.jit
def _view(slots: _Slots) -> dict[str, jax.Array]:
    """What the host reads, whole on every process."""
    found = {name: getattr(slots, name) for name in ("live_B", "count_B", "finished_B", "ids_BR", "logp_BR")}
    return {name: constrain(x, *[None] * x.ndim) for name, x in found.items()} | {"length": slots.cache.length}
