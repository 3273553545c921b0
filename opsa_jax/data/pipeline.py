"""The stream of training batches: encode once, mix by weight, reshuffle every epoch, shard by process, resume exactly.

    records --encode_all--> examples of each source --Stream--> batch 0, batch 1, ...

The global batch k is a function of the data, the weights, the seed and k alone. Process p of n holds rows [p*B/n, (p+1)*B/n) of it.
"""

import functools
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import grain
import numpy as np

from opsa_jax.data.chat import Chat, Placement
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """A record ready for the device."""

    key: int
    """Stable 31-bit hash of source and id, for `jax.random.fold_in`: the same on every host, in every run."""
    prompt_ids: np.ndarray
    """[length] int32, the student's templated prompt. It never holds a context."""
    teacher_ids: np.ndarray
    """[length] int32, the teacher's templated prompt, with its context."""
    record: Record
    """What it was made from: id, label, category, teacher route, given response."""
    answers: tuple[np.ndarray, ...] = ()
    """[length] int32 each: given responses with their stop token, where the run trains on given responses."""

    @property
    def id(self) -> str:
        return self.record.id


def encode_all(
    records: Sequence[Record],
    chat: Chat,
    context: Callable[[Record], str] = lambda record: "",
    placement: Placement = "system",
    teacher_chat: Chat | None = None,
    answers: Callable[[Record], tuple[str, ...]] = lambda record: (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Example]:
    """Both prompts of every record.

    Args:
        records: Records of one source.
        chat: The student's tokenizer and template.
        context: What the teacher sees besides the record; OPSA chooses it by `record.label`, COPSD by `record.category`.
        placement: Where the context goes, see `Chat.render`.
        teacher_chat: The teacher's template, where it is not the student's.
        answers: Given responses of a record, which get the student's stop token.
        progress: Called with (records done, records in all) now and then.

    Raises:
        UserError: the template cannot hold a system message that is needed.
    """
    teacher_chat = teacher_chat or chat
    examples: list[Example] = []
    for start in range(0, len(records), _CHUNK):
        chunk = records[start : start + _CHUNK]
        ours = [chat.render(r.prompt, system=r.system) for r in chunk]
        theirs = [teacher_chat.render(r.prompt, context(r), placement, r.system) for r in chunk]
        if teacher_chat is chat:  # in one call, so that the pieces both prompts share are tokenised once
            ids = chat.encode_texts(ours + theirs)
        else:
            ids = chat.encode_texts(ours) + teacher_chat.encode_texts(theirs)
        n = len(chunk)
        given = [chat.encode_answers(answers(r)) for r in chunk]
        examples += [Example(_key(r), ids[i], ids[n + i], r, given[i]) for i, r in enumerate(chunk)]
        progress(start + n, len(records))
    return examples


class Stream(Iterator[list[Example]]):
    """An endless iterator over this process's rows of the global batches.

    Sources are interleaved exactly by weight (equal weights: one from each in turn, so 16 + 16 in every batch of 32). Each source starts
    over when it is used up, in a new order, independently of the others; batches run across that border, so nothing is dropped.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Example]],
        weights: Sequence[float],
        batch: int,
        seed: int,
        shuffle: bool = True,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """
        Args:
            sources: Examples of each source.
            weights: Share of each source, relative to the others.
            batch: Rows of the GLOBAL batch.
            seed: Of the order; other seeds, sources and epochs give unrelated orders.
            shuffle: Reshuffle each source in every epoch; otherwise keep its order.
            process_index, process_count: `jax.process_index()` and `jax.process_count()`.

        Raises:
            UserError: an empty source, a weight that is not positive, a batch that the processes cannot share equally.
        """
        if not sources or not all(sources):
            raise UserError("there are no prompts to train on; give --data.sources at least one source with records")
        if len(weights) != len(sources) or not all(w >= _SMALLEST_WEIGHT and math.isfinite(w) for w in weights):
            raise UserError(f"weights {list(weights)} of {len(sources)} sources: each source needs one, at least {_SMALLEST_WEIGHT}")
        if batch < 1 or batch % process_count:
            raise UserError(f"a batch of {batch} prompts cannot be split over {process_count} processes; use a multiple of {process_count}")
        self._size = sum(map(len, sources))
        self._batch = batch
        self._digest = _digest(sources, weights, batch, seed, shuffle)
        order = _Order([len(examples) for examples in sources], weights, seed, shuffle)
        mixed = grain.MapDataset.select_from_datasets([grain.MapDataset.source(examples) for examples in sources], order)
        rows = mixed.batch(batch // process_count, batch_fn=list)[process_index::process_count]
        # No prefetch: the examples are in memory, and a thread would only take time from the interpreter.
        self._iterator = iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def __next__(self) -> list[Example]:
        return next(self._iterator)

    def batches(self, epochs: float) -> int:
        """Batches that show as many examples as `epochs` passes over all sources together, rounded up.

        With weights in proportion to the sizes of the sources, these are true passes; otherwise small sources are seen more often.
        """
        return max(1, math.ceil(epochs * self._size / self._batch))

    def state(self) -> dict[str, Any]:
        """Where the stream is, for a checkpoint: plain JSON, the same on every process and for any number of them."""
        return {"data": self._digest, "iterator": self._iterator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after the last batch taken before `state()`.

        Raises:
            UserError: the state belongs to other data, weights, seed or batch size.
        """
        if state["data"] != self._digest:
            raise UserError(
                "the checkpoint was written with other prompts, weights, seed or batch size; "
                "resume with the data settings of the run, or start a new run directory"
            )
        self._iterator.set_state(state["iterator"])


class _Order:
    """Position in the endless stream -> (source, index in that source): a selection map for grain.

    The mixture is exact in every period of the weights, and each source is permuted anew in every epoch. (grain's own `mix` rounds
    ratios to 1/100 of the smallest weight, so 3:7 becomes 100:233; its own `shuffle` takes milliseconds per element on small sets.)

    >>> order = _Order([2, 5], weights=[2, 1], seed=0, shuffle=False)
    >>> [order[k] for k in range(6)]
    [(0, 0), (0, 1), (1, 0), (0, 0), (0, 1), (1, 1)]
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool):
        shares = [Fraction(w).limit_denominator(round(1 / _SMALLEST_WEIGHT)) for w in weights]
        scale = math.lcm(*(s.denominator for s in shares))
        self._shares = [int(s * scale) for s in shares]
        self._sizes, self._seed, self._shuffle = sizes, seed, shuffle
        self._permutation = functools.lru_cache(2 * len(sizes))(self._permute)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> tuple[int, int]:
        source, place = self._mix(k)
        epoch, index = divmod(place, self._sizes[source])
        return source, int(self._permutation(source, epoch)[index]) if self._shuffle else index

    def _mix(self, k: int) -> tuple[int, int]:
        """Position k -> (source, how many positions before k are that source's)."""
        # Of the positions before `before`, `before * later // rest` go to the sources after this one; position k is this
        # source's own when counting it does not raise that number.
        before, rest = k, sum(self._shares)
        for i, share in enumerate(self._shares[:-1]):
            later = rest - share
            passed = before * later // rest
            if (before + 1) * later // rest == passed:
                return i, before - passed
            before, rest = passed, later
        return len(self._shares) - 1, before

    def _permute(self, source: int, epoch: int) -> np.ndarray:
        # Raw bits of Philox are the same in every numpy version; Generator.permutation need not be.
        bits = np.random.Philox(np.random.SeedSequence([self._seed % 2**32, source, epoch])).random_raw(self._sizes[source])
        return np.argsort(bits, kind="stable")


_CHUNK = 1024  # records encoded between two calls of the progress callback
_SMALLEST_WEIGHT = 1e-6


def _key(record: Record) -> int:
    digest = hashlib.blake2b(f"{record.source}\0{record.id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def _digest(sources: Sequence[Sequence[Example]], weights: Sequence[float], *settings: Any) -> str:
    digest = hashlib.blake2b(repr((list(map(float, weights)), *settings)).encode(), digest_size=8)
    for examples in sources:
        digest.update(np.asarray([len(examples), *(e.key for e in examples)], np.int64).tobytes())
    return digest.hexdigest()
