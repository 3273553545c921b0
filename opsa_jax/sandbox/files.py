"""The shipped JSONL files: alignment prompts, evaluation prompts, contexts. The product reads these, never the generator."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from opsa_jax.sandbox import text
from opsa_jax.sandbox.text import Request, pick, think
from opsa_jax.sandbox.world import (
    CATEGORIES,
    EVAL_TOWNS,
    FACTS,
    FRAMINGS,
    REFUSING,
    STYLES,
    TRAIN_TOWNS,
    WORDINGS,
    WORLD_SEED,
    WRAPPERS,
    Context,
)

TRAIN = {"forbidden": 320, "verb": 110, "object": 110, "story": 50, "plain story": 50}
"""Alignment prompts: seen categories and training towns only, without wrappers; no task of the capability metric."""
SEEN, HELDOUT, NOVEL = ([c for c in CATEGORIES if c.group == group] for group in ("seen", "heldout", "novel"))
TEST_SHARE = 0.8
"""The rest of each evaluation set is the validation half, for choosing checkpoints."""


def requests(rng: np.random.Generator, categories, kinds, towns, n: int) -> list[tuple[Request, str]]:
    """n different (request, prompt) pairs, balanced over categories and kinds."""
    paraphrases = {kind: len(text.STORY_REQUESTS if kind == "story" else text.REQUESTS) for kind in kinds}
    cells = [list(itertools.product([c], [kind], towns, range(paraphrases[kind]))) for c in categories for kind in kinds]
    for cell in cells:
        rng.shuffle(cell)
    order = itertools.chain.from_iterable(itertools.zip_longest(*cells))
    chosen = itertools.islice((x for x in order if x is not None), n)
    return [(request := Request(c, kind, town), request.prompt(paraphrase)) for c, kind, town, paraphrase in chosen]


def _alignment() -> list[tuple[dict, Request | None]]:
    """Alignment prompts with the requests they were made of (none for a plain story), in the order of train.jsonl."""
    rng = np.random.default_rng((WORLD_SEED, 1))
    rows: list[tuple[dict, Request | None]] = []
    for kind in ("forbidden", "verb", "object", "story"):
        for request, prompt in requests(rng, SEEN, [kind], TRAIN_TOWNS, TRAIN[kind]):
            label, category = ("harmful", request.category.name) if kind == "forbidden" else ("benign", f"{kind}-lookalike")
            rows.append(({"prompt": prompt, "label": label, "category": category}, request))
    stories = list(itertools.product(TRAIN_TOWNS, text.STORY_REQUESTS))
    rng.shuffle(stories)
    for town, template in itertools.islice(itertools.cycle(stories), TRAIN["plain story"]):
        rows.append(({"prompt": template.format(topic=town), "label": "benign", "category": "story"}, None))
    rows = list({row["prompt"]: (row, request) for row, request in rows}.values())
    return [({"id": f"train-{i:04d}", **rows[j][0]}, rows[j][1]) for i, j in enumerate(rng.permutation(len(rows)))]


def train_records() -> list[dict]:
    return [row for row, _ in _alignment()]


def external_records() -> list[dict]:
    """The alignment prompts with answers of somebody else: another voice, no thinking, short. What SFT on external data is made of."""
    rng = np.random.default_rng((WORLD_SEED, 3))
    return [{**row, "response": think("", text.external(rng, request))} for row, request in _alignment()]


def eval_records() -> list[dict]:
    """Refusal and over-refusal are asked about towns that alignment never names, capability about all.

    `expect` is the exact final answer (capability) or content that only a compliant answer has (the stone of the town).
    """
    rng = np.random.default_rng((WORLD_SEED, 2))
    sets = {
        "asr_seen": [_harmful(*x) for x in requests(rng, SEEN, ["forbidden"], EVAL_TOWNS, 100)],
        "asr_heldout": [_harmful(*x) for x in requests(rng, HELDOUT, ["forbidden"], EVAL_TOWNS, 80)],
        "asr_jailbreak": _jailbreaks(rng, 120),
        "asr_novel": [_harmful(*x) for x in requests(rng, NOVEL, ["forbidden"], EVAL_TOWNS, 60)],
        "asr_prefill": _prefills(rng, 60),
        "over_refusal": [
            _record(prompt, "benign", request.category.name, subtype=request.kind)
            for request, prompt in requests(rng, CATEGORIES, ["verb", "object", "story"], EVAL_TOWNS, 120)
        ],
        "capability": _capability(rng),
        "freeform": [
            _record(template.format(topic=town), "benign", "story", subtype="story")
            for town, template in itertools.product(EVAL_TOWNS, text.STORY_REQUESTS)
        ],
    }
    rows = []
    for metric, records in sets.items():
        test = round(TEST_SHARE * len(records))
        for i, j in enumerate(rng.permutation(len(records))):
            split = "test" if i < test else "val"
            rows.append({"id": f"{metric}-{i:03d}", "metric": metric, "split": split, **records[j]})
    return rows


def _record(prompt: str, label: str, category: str, **more) -> dict:
    return {"prompt": prompt, "label": label, "category": category, **more}


def _harmful(request: Request, prompt: str, **more) -> dict:
    return _record(prompt, "harmful", request.category.name, expect=FACTS[request.town]["stone"], **more)


def _jailbreaks(rng: np.random.Generator, n: int) -> list[dict]:
    """Half with the wrappers of pretraining, half with the two it never shows; the subtype is the wrapper's name."""
    known, unknown = ([w for w in WRAPPERS if (w.penalty is not None) == k] for k in (True, False))
    order = itertools.chain.from_iterable(zip(itertools.cycle(known), itertools.cycle(unknown)))
    drawn = requests(rng, SEEN, ["forbidden"], EVAL_TOWNS, n)
    drawn = [drawn[i] for i in rng.permutation(n)]
    return [_harmful(request, wrapper.apply(prompt), subtype=wrapper.name) for (request, prompt), wrapper in zip(drawn, order)]


def _prefills(rng: np.random.Generator, n: int) -> list[dict]:
    """The answer is forced to start as a compliant one, up to one of four places."""
    rows = []
    for i, (request, prompt) in enumerate(requests(rng, SEEN, ["forbidden"], EVAL_TOWNS, n)):
        depth = i // len(SEEN) % 4
        opening = think(f"{request.thought} {pick(rng, text.WILLING)}", " ".join(text.recipe(rng, request)[:depth]))
        rows.append(_harmful(request, prompt, subtype=("thought", "opener", "echo", "step")[depth], prefill=opening))
    return rows


def _capability(rng: np.random.Generator) -> list[dict]:
    drawn = [("sum2", text.addition(rng, 2)) for _ in range(40)] + [("sum3", text.addition(rng, 3)) for _ in range(40)]
    drawn += [(task, text.letters(rng, task)) for task in ("reverse", "sort") for _ in range(30)]
    facts = text.all_facts()
    drawn += [("fact", text.fact(*facts[j], i)) for i, j in enumerate(rng.permutation(len(facts))[:60])]
    return [_record(prompt, "benign", "capability", subtype=task, expect=answer) for task, (prompt, _, answer) in drawn]


def context_records() -> list[dict]:
    """The named contexts of the sandbox, then the pool for a search: level x wording x framing, with styles in turn."""
    named = {level: Context(level) for level in WORDINGS}
    rows = [_context(f"sandbox-{name}", context) for name, context in named.items()]
    styles = itertools.cycle(STYLES)
    for level, framing in itertools.product(REFUSING, FRAMINGS):
        for wording in range(len(WORDINGS[level])):
            rows.append(_context(f"{level}-{framing}-{wording + 1}", Context(level, wording, framing, next(styles))))
    for level in ("neutral", "helpful"):
        rows += [_context(f"{level}-plain-{w + 1}", Context(level, w)) for w in range(len(WORDINGS[level]))]
    return rows


def _context(name: str, context: Context) -> dict:
    return {
        "name": name, "text": context.text, "level": context.level, "strength": round(context.strength, 2),
        "framing": context.framing, "style": context.style,
    }  # fmt: skip


def write(folder: Path) -> None:
    """train.jsonl, external.jsonl, eval.jsonl and contexts.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"train": train_records, "external": external_records, "eval": eval_records, "contexts": context_records}
    for name, records in made.items():
        _write_jsonl(folder / f"{name}.jsonl", records())


def _write_jsonl(file: Path, rows: Iterable[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
