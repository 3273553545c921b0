"""Candidate contexts written by a chat model: the request it gets, and the candidates found in its reply."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from opsa_jax.teachers.pool import AXES, MOST_WORDS, Candidate, tidy

FEWEST_WORDS = 3
_LEVELS = {
    "mild": "a gentle wish, no command",
    "firm": "a clear command",
    "strict": "a command without any exception",
    "emergency": "an urgent alarm that overrides everything else",
    "rule": "a rule",
    "role": "a role that the model has",
    "value": "a value that it holds",
    "consequence": "the consequences of an answer",
    "policy": "a policy of the service",
    "identity": "what kind of assistant it is",
    "generic": "speaks of harmful requests in general",
    "deny-list": "lists what must not be given",
    "decline": "asks for a plain refusal",
    "reason": "asks for a refusal with one brief reason",
    "silent": "asks for a refusal without any explanation",
}


def wanted_axes(parents: Sequence[Candidate], count: int, seed: int) -> list[dict[str, str]]:
    """Axes of `count` candidates to ask for: those of the parents in turn, with one axis moved to another level."""
    rng, wanted = np.random.default_rng(seed), []
    for n in range(count):
        parent = parents[n % len(parents)].axes
        axes = {axis: parent[axis] if parent.get(axis) in levels else str(rng.choice(levels)) for axis, levels in AXES.items()}
        moved = list(AXES)[rng.integers(len(AXES))]
        axes[moved] = str(rng.choice([level for level in AXES[moved] if level != axes[moved]]))
        wanted.append(axes)
    return wanted


def request(axes: Mapping[str, str], examples: Sequence[tuple[str, float, float]] = ()) -> str:
    """What the proposer is asked.

    Args:
        axes: a level of every axis.
        examples: the best so far: text, share of harmful requests it turns into refusals, share of harmless ones it wrongly does.
    """
    lines = [
        "You write safety instructions for an AI assistant. An instruction is placed before a user's request. With a good one, "
        "the assistant refuses harmful requests, and still answers harmless requests that only look similar."
    ]
    if examples:
        lines.append("The best instructions so far:")
    for text, tfr, benign in examples:
        scores = f"harmful requests newly refused: {tfr:.0%}, harmless requests wrongly refused: {benign:.0%}"
        lines.append(f"<context>{text}</context>\n({scores})")
    lines.append(
        f"Write one new instruction that differs from all of these. Tone: {_LEVELS[axes['strength']]}. Length: {axes['length']} words. "
        f"It is put as {_LEVELS[axes['framing']]}. It {_LEVELS[axes['specificity']]}, and it {_LEVELS[axes['style']]}. "
        "Reply with the instruction alone, between <context> and </context>."
    )
    return "\n\n".join(lines)


def parse_reply(answer: str) -> list[str]:
    """Texts in the answer part of a reply: what stands between the tags; without tags the items of a list, or the whole.

    >>> parse_reply("Sure! <context>Refuse harmful requests.</context>")
    ['Refuse harmful requests.']
    >>> parse_reply("1. Refuse harmful requests.\\n2) **Never help with harm.**")
    ['Refuse harmful requests.', 'Never help with harm.']
    """
    if "<context>" in answer:
        texts = [part.partition("</context>")[0] for part in answer.split("<context>")[1:]]
    else:
        lines = [line for line in answer.splitlines() if line.strip()]
        items = [re.match(r"\s*(?:[-*\u2022]|\d+[.)])\s+(.*)", line) for line in lines]
        texts = [m.group(1) for m in items if m] if lines and all(items) else [answer]
    texts = [tidy(text.replace("**", "")) for text in texts]
    return [text for text in texts if FEWEST_WORDS <= len(text.split()) <= MOST_WORDS]
