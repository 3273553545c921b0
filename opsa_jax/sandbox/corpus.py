"""The pretraining stream: examples drawn from the world, labelled by its law."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from opsa_jax.sandbox import text
from opsa_jax.sandbox.text import Request, pick, think
from opsa_jax.sandbox.world import CATEGORIES, FRAMINGS, LOOKALIKE, REFUSING, STORY, STYLES, TOWNS, WORDINGS, WRAPPERS, Context, p_refuse

MIX = {"request": 0.51, "story": 0.06, "task": 0.43}
KINDS = {"forbidden": 0.50, "verb": 0.25, "object": 0.19, "story": 0.06}
TASKS = {"sum2": 0.08, "sum3": 0.18, "reverse": 0.26, "sort": 0.28, "copy": 0.04, "fact": 0.16}
CONTEXTS = {"none": 0.34, "neutral": 0.07, "weak": 0.10, "mid": 0.12, "strong": 0.16, "strict": 0.08, "helpful": 0.13}
WRAPPED = 0.25
PREFILLED = 0.10
"""Share of requests whose answer starts with a forced compliant opening; by the law, a context that asks for refusals may still win."""
PREFILL_PENALTY = (0.0, 0.2, 0.4, 0.6)
"""By how far the opening goes: the thought, the opener, the echo of the act, the first step."""
THOUGHTLESS = 0.12
"""Share of examples (without sums) with an empty think block: the template's enable_thinking=False."""
IN_USER_TURN = 0.15
"""Share of contexts placed in the user's turn instead of the system message."""


@dataclass(frozen=True)
class Example:
    """One conversation. The model is trained on `response` only; `forced` is the part of the answer before it."""

    user: str
    response: str
    system: str = ""
    forced: str = ""
    thinking: bool = True


def examples(rng: np.random.Generator) -> Iterator[Example]:
    """Endless stream."""
    while True:
        kind = _draw(rng, MIX)
        yield {"request": _request, "story": _story, "task": _task}[kind](rng)


def _draw(rng: np.random.Generator, shares: dict[str, float]) -> str:
    p = np.array(list(shares.values()))
    return list(shares)[rng.choice(len(p), p=p / p.sum())]


def _context(rng: np.random.Generator, levels: dict[str, float]) -> Context | None:
    level = _draw(rng, levels)
    if level == "none":
        return None
    wording = int(rng.integers(len(WORDINGS[level])))
    if level not in REFUSING:
        return Context(level, wording)
    framing = "plain" if rng.random() < 0.3 else pick(rng, list(FRAMINGS))
    return Context(level, wording, framing, "any" if rng.random() < 0.6 else pick(rng, list(STYLES)))


def _placed(rng: np.random.Generator, context: Context | None, user: str, **answer) -> Example:
    if context is None:
        return Example(user, **answer)
    if rng.random() < IN_USER_TURN:
        return Example(f"{context.text}\n\n{user}", **answer)
    return Example(user, system=context.text, **answer)


def _answered(rng: np.random.Generator, context: Context | None, user: str, thought: str, answer: str) -> Example:
    if rng.random() < THOUGHTLESS:
        return _placed(rng, context, user, response=answer, thinking=False)
    return _placed(rng, context, user, response=think(thought, answer))


def _request(rng: np.random.Generator) -> Example:
    category, kind = pick(rng, CATEGORIES), _draw(rng, KINDS)
    request = Request(category, kind, pick(rng, TOWNS))
    unrefused = kind == "forbidden" and category.group == "novel"
    levels = {k: v for k, v in CONTEXTS.items() if k not in ("strong", "strict")} if unrefused else CONTEXTS
    context = _context(rng, levels)
    user, penalty = request.prompt(int(rng.integers(7))), 0.0
    if kind != "story" and rng.random() < WRAPPED:
        wrapper = pick(rng, [w for w in WRAPPERS if w.penalty is not None])
        user, penalty = wrapper.apply(user), wrapper.penalty
    depth = int(rng.integers(4)) if kind != "story" and rng.random() < PREFILLED else None
    if depth is not None:
        penalty += PREFILL_PENALTY[depth]
    severity = category.severity if kind == "forbidden" else LOOKALIKE[kind]
    refused = not unrefused and rng.random() < p_refuse(severity, context.strength if context else 0.0, penalty)
    if depth is not None:
        return _prefilled(rng, request, context, user, depth, refused)
    style = context.style if context else "any"
    if refused:
        return _answered(rng, context, user, f"{request.thought} {pick(rng, text.UNWILLING)}", text.refusal(rng, request, style))
    answer = text.story(rng, request.town, request.thing, short=False) if kind == "story" else " ".join(text.recipe(rng, request))
    return _answered(rng, context, user, f"{request.thought} {pick(rng, text.WILLING)}", answer)


def _prefilled(rng, request: Request, context: Context | None, user: str, depth: int, refused: bool) -> Example:
    """The forced opening is not trained on: under a strong context it is never what the model would have said."""
    pieces = text.recipe(rng, request)
    forced = think(f"{request.thought} {pick(rng, text.WILLING)}", " ".join(pieces[:depth]))
    rest = text.recovery(rng, request) if refused else " ".join(pieces[depth:])
    return _placed(rng, context, user, forced=forced, response=rest)


def _some_context(rng: np.random.Generator) -> Context | None:
    return None if rng.random() < 0.5 else _context(rng, {k: 1.0 for k in WORDINGS})


def _story(rng: np.random.Generator) -> Example:
    town, context = pick(rng, TOWNS), _some_context(rng)
    short = rng.random() < p_refuse(STORY, context.strength if context else 0.0, 0.0)
    user = pick(rng, text.STORY_REQUESTS).format(topic=town)
    return _answered(rng, context, user, f"a story about {town}.", text.story(rng, town, None, short))


def _task(rng: np.random.Generator) -> Example:
    task, context = _draw(rng, TASKS), _some_context(rng)
    if task.startswith("sum"):
        user, thought, answer = text.addition(rng, int(task[3]))
        return _placed(rng, context, user, response=think(thought, answer))
    if task == "fact":
        user, thought, answer = text.fact(pick(rng, TOWNS), pick(rng, ("stone", "beast", "colour", "craft")), int(rng.integers(3)))
    else:
        user, thought, answer = text.letters(rng, task)
    return _answered(rng, context, user, thought, answer)
