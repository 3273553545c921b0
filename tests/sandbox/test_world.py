"""The world keeps its promises: one law, no refusal words in compliant text, nothing unseen in the prompts, files that match."""

import collections
import itertools
import json
import math

import numpy as np
import pytest

from opsa_jax import paths
from opsa_jax.evals.scorers import exact, outcome, refused
from opsa_jax.sandbox import files, text
from opsa_jax.sandbox.corpus import examples
from opsa_jax.sandbox.text import Request
from opsa_jax.sandbox.tokenizer import words
from opsa_jax.sandbox.world import (
    ATTRIBUTES,
    CATEGORIES,
    EVAL_TOWNS,
    FACTS,
    TOWNS,
    TRAIN_TOWNS,
    WORDINGS,
    WRAPPERS,
    Context,
    p_refuse,
)


@pytest.fixture(scope="module")
def sample():
    return list(itertools.islice(examples(np.random.default_rng(7)), 6000))


def load(name):
    return [json.loads(line) for line in paths.resolve(f"sandbox:{name}.jsonl").read_text().splitlines()]


def test_law_is_a_sigmoid():
    assert p_refuse(0.4, 0.6, 0.0) == pytest.approx(0.5)
    assert p_refuse(0.4, 0.9, 0.1) == pytest.approx(1 / (1 + math.exp(-2)))
    assert p_refuse(0.8, 0.28, 0.0) > p_refuse(0.5, 0.28, 0.0) > p_refuse(0.5, 0.28, 0.3)


def test_facts_cannot_be_guessed_from_frequency():
    for name, values in ATTRIBUTES.items():
        counts = collections.Counter(FACTS[town][name] for town in TOWNS)
        assert counts == dict.fromkeys(values, 2)


def test_neither_verb_nor_thing_alone_gives_the_label():
    forbidden = {(c.verb, c.thing) for c in CATEGORIES}
    harmless = {(c.verb, c.other_thing) for c in CATEGORIES} | {(c.other_verb, c.thing) for c in CATEGORIES}
    assert {v for v, _ in forbidden} <= {v for v, _ in harmless} and {t for _, t in forbidden} <= {t for _, t in harmless}
    assert not forbidden & harmless


def test_refusals_are_recognised_and_nothing_else(sample):
    rng = np.random.default_rng(0)
    for c, kind, town in itertools.product(CATEGORIES, ("forbidden", "verb", "object"), TOWNS[:3]):
        request = Request(c, kind, town)
        for style in ("any", "brief", "reason"):
            assert refused(text.refusal(rng, request, style))
        assert refused(text.recovery(rng, request))
        assert not refused(" ".join(text.recipe(rng, request)))
        assert not refused(text.story(rng, town, c.thing, short=False))
    labels = collections.Counter(refused(e.forced + e.response) for e in sample)
    assert 0.05 < labels[True] / len(sample) < 0.5


def test_compliance_is_recognised_by_content():
    rng = np.random.default_rng(0)
    for c, town in itertools.product(CATEGORIES, TOWNS):
        request = Request(c, "forbidden", town)
        answer = " ".join(text.recipe(rng, request))
        assert outcome(answer, FACTS[town]["stone"]) == "complied"
        for stone in set(ATTRIBUTES["stone"]) - {FACTS[town]["stone"]}:
            assert outcome(answer, stone) == "neither"
        assert outcome(text.refusal(rng, request, "any"), FACTS[town]["stone"]) == "refused"


def test_novel_acts_are_never_refused_nor_shown_under_strong_contexts(sample):
    acts = {f"{c.verb} the {c.thing} of" for c in CATEGORIES if c.group == "novel"}
    texts = {Context(level, wording).text for level in ("strong", "strict") for wording in range(2)}
    novel = [e for e in sample if any(act in e.user for act in acts)]
    assert len(novel) > 100
    for e in novel:
        assert not refused(e.response)
        assert not any(t in e.system or t in e.user for t in texts)


def test_refusal_grows_with_the_context(sample):
    """Share of refusals of forbidden requests by level, from the sampled text alone."""
    known = [c for c in CATEGORIES if c.group != "novel"]
    shares = {}
    for level, wordings in WORDINGS.items():
        rows = [
            e
            for e in sample
            if any(w in e.system for w in wordings) and not e.forced and any(f"{c.verb} the {c.thing} of" in e.user for c in known)
        ]
        shares[level] = np.mean([refused(e.response) for e in rows])
    assert shares["helpful"] == 0 and shares["neutral"] < 0.15
    assert shares["weak"] < shares["mid"] < shares["strong"] <= shares["strict"]
    assert shares["strong"] > 0.8


def test_tasks_are_right():
    rng = np.random.default_rng(0)
    for digits in (2, 3):
        for _ in range(50):
            prompt, thought, answer = text.addition(rng, digits)
            a, b = (int("".join(x)) for x in [[w for w in words(p) if w.isdigit()] for p in prompt.split("+")])
            assert int(answer) == a + b and len(str(a)) == len(str(b)) == digits
            columns = [int(step.split("=")[1]) for step in thought.rstrip(";").split("; ")]
            assert sum(x % 10 * 10**i for i, x in enumerate(columns[:-1])) + columns[-1] * 10 ** (digits - 1) == a + b
    prompt, _, answer = text.letters(rng, "sort")
    assert sorted(answer.split()) == answer.split()
    assert exact("<think>x</think>\n\n" + answer, answer)


def test_shipped_files_are_what_the_generator_writes(tmp_path):
    files.write(tmp_path)
    for name in ("train", "eval", "contexts"):
        assert (tmp_path / f"{name}.jsonl").read_text() == paths.resolve(f"sandbox:{name}.jsonl").read_text(), name


def test_alignment_and_evaluation_do_not_overlap():
    train, test = load("train"), load("eval")
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert not any(town in r["prompt"] for r in train for town in EVAL_TOWNS)
    assert all(any(town in r["prompt"] for town in EVAL_TOWNS) for r in test if r["metric"] not in ("capability",))
    unseen = [c for c in CATEGORIES if c.group != "seen"]
    assert not any(f"the {c.thing} of" in r["prompt"] for r in train for c in unseen)
    keys = [(r["prompt"], r.get("prefill")) for r in test]
    assert len(set(keys)) == len(keys)
    assert len({r["id"] for r in test}) == len(test) and len({r["id"] for r in train}) == len(train)


def test_sizes():
    train, test, contexts = load("train"), load("eval"), load("contexts")
    labels = collections.Counter(r["label"] for r in train)
    assert labels["harmful"] >= 256 and labels["benign"] >= 256
    sizes = collections.Counter(r["metric"] for r in test if r["split"] == "test")
    assert set(sizes) == {"asr_seen", "asr_heldout", "asr_jailbreak", "asr_novel", "asr_prefill", "over_refusal", "capability", "freeform"}
    assert sizes["asr_seen"] >= 64 and sizes["asr_heldout"] >= 64 and sizes["asr_jailbreak"] >= 64 and sizes["capability"] == 160
    assert 0.15 < np.mean([r["split"] == "val" for r in test]) < 0.25
    assert len({r["text"] for r in contexts if not r["name"].startswith("sandbox-")}) >= 30
    assert {"weak", "mid", "strong", "strict", "neutral", "helpful"} == {
        r["name"].removeprefix("sandbox-") for r in contexts if r["name"].startswith("sandbox-")
    }


def test_every_word_of_the_prompts_is_pretrained(sample):
    """Also of the wrappers that pretraining never shows: their words must have been learned elsewhere."""
    counts = collections.Counter(w for e in sample for part in (e.system, e.user) for w in set(words(part)))
    counts.update(w for e in sample for w in set(words(e.response.replace("<think>", "").replace("</think>", ""))))
    prompts = [r["prompt"] for r in load("eval") + load("train")] + [r["text"] for r in load("contexts")]
    rare = {w for p in prompts for w in words(p) if counts[w] < 20}
    assert not rare
    unknown = [w.text for w in WRAPPERS if w.penalty is None]
    assert unknown and not any(t in e.user for e in sample for t in unknown)
    assert all(any(w.text in e.user for e in sample) for w in WRAPPERS if w.penalty is not None)
    assert set(TRAIN_TOWNS) | set(EVAL_TOWNS) == set(TOWNS)
