import json
from collections import Counter

import numpy as np
import pytest
import tiny_chat

from opsa_jax.data.pipeline import Example, Stream, encode_all
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError

NOTHING = np.zeros(1, np.int32)


def source(name: str, n: int) -> list[Example]:
    return [Example(i, NOTHING, NOTHING, Record(f"{name}{i}", "x", "benign", source=name)) for i in range(n)]


def take(stream: Stream, n: int) -> list[list[str]]:
    return [[e.id for e in next(stream)] for _ in range(n)]


def stream(**changes) -> Stream:
    return Stream(**{"sources": [source("a", 10), source("b", 7)], "weights": [1, 1], "batch": 4, "seed": 0} | changes)


def flat(batches) -> list[str]:
    return [i for batch in batches for i in batch]


def test_equal_weights_are_half_and_half_in_every_batch():
    for batch in take(stream(sources=[source("a", 50), source("b", 33)], batch=32), 20):
        assert Counter(i[0] for i in batch) == {"a": 16, "b": 16}


@pytest.mark.parametrize(
    ("weights", "counts"), [([3, 7], [3, 7]), ([0.3, 0.7], [3, 7]), ([1, 1, 2], [1, 1, 2]), ([0.1, 0.25, 0.65], [2, 5, 13])]
)
def test_other_weights_are_exact_in_every_period(weights, counts):
    names = "abc"[: len(weights)]
    sources = [source(n, 11) for n in names]
    for batch in take(stream(sources=sources, weights=weights, batch=sum(counts)), 12):
        assert Counter(i[0] for i in batch) == dict(zip(names, counts))


def test_every_example_once_per_epoch_in_a_new_order():
    ids = flat(take(stream(sources=[source("a", 12)], weights=[1], batch=4), 12))
    epochs = [ids[i : i + 12] for i in range(0, 48, 12)]
    assert all(sorted(e) == sorted(i.id for i in source("a", 12)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    # Sources of different lengths start over independently: 10 a's and 7 b's of the mixture are whole epochs of each.
    mixed = flat(take(stream(), 35))
    for name, n in (("a", 10), ("b", 7)):
        own = [i for i in mixed if i[0] == name]
        assert len(own) == 70 and all(len(set(own[i : i + n])) == n for i in range(0, 70, n))


def test_seeds_give_unrelated_orders():
    long = [source("a", 100)]

    def epochs(seed):
        ids = flat(take(stream(sources=long, weights=[1], batch=100, seed=seed), 3))
        return [tuple(ids[i : i + 100]) for i in (0, 100, 200)]

    assert len({e for seed in range(3) for e in epochs(seed)}) == 9  # above all, not (seed 0, epoch 1) == (seed 1, epoch 0)
    assert epochs(0) == epochs(0) and epochs(-1) == epochs(-1)


def test_without_shuffling_the_order_is_the_files():
    assert flat(take(stream(sources=[source("a", 5)], weights=[1], batch=4, shuffle=False), 3)) == [f"a{i % 5}" for i in range(12)]


def test_resume_at_every_step_goes_on_exactly():
    whole = take(stream(), 14)  # over three epochs of b
    for k in range(14):
        first = stream()
        take(first, k)
        state = json.loads(json.dumps(first.state()))
        second = stream()
        take(second, 3)  # a stream that has moved on is set back, too
        second.restore(state)
        assert take(second, 14 - k) == whole[k:], k


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"batch": 8}, {"weights": [1, 2]}, {"shuffle": False}, {"sources": [source("a", 10), source("b", 6)]}]
)
def test_a_state_of_other_data_is_refused(change):
    with pytest.raises(UserError, match="written with other prompts, weights, seed or batch size"):
        stream(**change).restore(stream().state())


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_same_global_batches(processes):
    whole = take(stream(batch=8), 9)
    shards = [stream(batch=8, process_index=p, process_count=processes) for p in range(processes)]
    parts = [take(s, 9) for s in shards]
    assert all(len(rows) == 8 // processes for part in parts for rows in part)
    assert [flat(rows) for rows in zip(*parts)] == whole
    # A run may go on with another number of processes.
    states = [s.state() for s in shards]
    assert all(s == states[0] for s in states)
    alone = stream(batch=8)
    alone.restore(states[0])
    expected = stream(batch=8)
    take(expected, 9)
    assert take(alone, 3) == take(expected, 3)


def test_length_in_batches():
    s = stream(sources=[source("a", 96), source("b", 96)], batch=32)
    assert [s.batches(e) for e in (1, 3, 0.5, 0.01, 1.01)] == [6, 18, 3, 1, 7]
    assert len(set(flat(take(s, s.batches(1))))) == 192


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sources": [], "weights": []}, "there are no prompts to train on"),
        ({"sources": [source("a", 3), []]}, "there are no prompts to train on"),
        ({"weights": [1, 0]}, "weights \\[1, 0\\] of 2 sources: each source needs one, at least 1e-06"),
        ({"weights": [1]}, "weights \\[1\\] of 2 sources"),
        ({"process_count": 3}, "a batch of 4 prompts cannot be split over 3 processes; use a multiple of 3"),
    ],
)
def test_what_cannot_be_streamed(change, says):
    with pytest.raises(UserError, match=says):
        stream(**change)


@pytest.mark.parametrize("two_tokenizers", [False, True])
def test_encode_all_is_encode_of_each(tmp_path, two_tokenizers):
    chat = tiny_chat.load(tmp_path, "qwen3")
    teacher = tiny_chat.load(tmp_path, "qwen3", thinking="off") if two_tokenizers else None
    records = [
        Record(str(i), f"Question {i}?", ("harmful", "benign")[i % 2], system="Be brief." * (i % 3 == 0), source="s") for i in range(1030)
    ]
    calls = []
    context, progress = lambda r: f"It is {r.label}.", lambda done, total: calls.append((done, total))
    examples = encode_all(records, chat, context, "system", teacher, progress=progress)
    assert calls == [(1024, 1030), (1030, 1030)]
    for i in (0, 1, 2, 1023, 1024, 1029):
        r, e = records[i], examples[i]
        assert e.record is r and e.id == r.id
        assert e.prompt_ids.tolist() == chat.encode(r.prompt, system=r.system)
        assert e.teacher_ids.tolist() == (teacher or chat).encode(r.prompt, f"It is {r.label}.", "system", r.system)


def test_keys_are_stable_and_tell_sources_apart(tmp_path):
    chat = tiny_chat.load(tmp_path, "qwen3")
    records = [Record(i, "x", "benign", source=s) for s in ("s", "t") for i in ("0", "1", "0")]
    keys = [e.key for e in encode_all(records, chat)]
    assert keys[0] == keys[2] and keys[3] == keys[5] and len(set(keys)) == 4 and all(0 <= k < 2**31 for k in keys)
    assert keys[:2] == [329524508, 1084044169]  # literal: the same in every process and version
