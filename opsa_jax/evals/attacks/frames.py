"""Attacks that are only text: prefilling, templates, many-shot."""

import json
from typing import Any

import numpy as np

from opsa_jax.data.records import Record
from opsa_jax.errors import UserError, did_you_mean
from opsa_jax.evals.attacks.base import Attempt, Static, fill, read_text, slots
from opsa_jax.evals.attacks.settings import ManyShotSettings, PrefillSettings, TemplateSettings
from opsa_jax.evals.attacks.texts import Texts

_TURN_TYPES = ("think", "answer", "plain")


def direct() -> Static:
    """The prompts as they are."""
    return Static("direct", lambda r: [Attempt(r.id, 0, r.prompt, r.system)], {})


def opening_kind(opening: str, thinks: bool) -> str:
    """Where an answer starts: `inside` an opened think block, `after` a closed one, `before` one (the model opens it), or `none`.

    >>> opening_kind("<|assistant|><think>\\n", True), opening_kind("<|assistant|>", True), opening_kind("<|assistant|>", False)
    ('inside', 'before', 'none')

    Args:
        opening: what the template writes before the first response token (`Chat.opening`).
        thinks: whether the tokenizer knows <think> as one token.
    """
    if opening.rstrip().endswith("<think>"):
        return "inside"
    if "</think>" in opening:
        return "after"
    return "before" if thinks else "none"


def wrap(text: str, place: str, kind: str, closed: str = "") -> str:
    """The prefill that puts an opening at a place, given where the template leaves off.

    >>> wrap("Sure,", "answer", "before"), wrap("Sure,", "answer", "inside")
    ('<think>\\n\\n</think>\\n\\nSure,', '\\n</think>\\n\\nSure,')
    >>> wrap("Okay.", "think", "before"), wrap("Sure,", "plain", "none")
    ('<think>\\nOkay.', 'Sure,')
    """
    if place == "plain" or kind in ("after", "none"):
        return text
    if place == "think":
        return text if kind == "inside" else f"<think>\n{text}"
    block = f"{closed}\n</think>\n\n{text}"
    return block if kind == "inside" else f"<think>\n{block}"


def places(wanted: tuple[str, ...], kind: str) -> list[str]:
    """The places meant by `auto`, and those that make no sense here left out."""
    auto = ("think", "answer") if kind in ("inside", "before") else ("plain",)
    named = [p for w in wanted for p in (auto if w == "auto" else (w,))]
    if kind in ("after", "none") and "think" in named:
        raise UserError("--prefill.places think: the model's template leaves no think block open; use plain, or --thinking on")
    return list(dict.fromkeys(named))


def prefill(settings: PrefillSettings, own: Texts, kind: str) -> Static:
    """Forced openings (arXiv 2406.05946, Section 2; 2605.15239 forces them inside the think block)."""
    where = places(settings.places, kind)
    openings = _openings(settings.file) if settings.file else [
        (f"{place}-{i}", place, text)
        for place, texts in (("think", own.think), ("answer", own.answer), ("plain", own.answer))
        for i, text in enumerate(texts)
    ]  # fmt: skip

    def variants(r: Record) -> list[Attempt]:
        values = slots(r)
        found = [
            Attempt(r.id, 0, r.prompt, r.system, wrap(fill(text, values), place, kind, fill(own.closed, values)), name)
            for place in where
            for name, at, text in openings
            if at == place or (not at and place in _TURN_TYPES)
        ]
        given = r.extra.get("prefill", "")
        return found + [Attempt(r.id, 0, r.prompt, r.system, given, "record")] * bool("record" in where and given)

    return Static("prefill", variants, {"openings": openings, "places": where, "kind": kind, "closed": own.closed})


def _openings(file: str) -> list[tuple[str, str, str]]:
    """(name, place or empty for all, text) of a user's file."""
    if file.endswith(".jsonl"):
        rows = _rows(file, "openings")
    else:
        rows = [{"text": line} for line in read_text(file, "openings").splitlines() if line.strip()]
    found = []
    for i, row in enumerate(rows):
        place = row.get("place", "")
        if place and place not in _TURN_TYPES:
            raise UserError(f"file {file} of openings, entry {i + 1}: place {place!r}{did_you_mean(str(place), _TURN_TYPES)}")
        found.append((row.get("name") or f"file-{i}", place, row["text"]))
    return found


def template(settings: TemplateSettings, own: Texts) -> Static:
    """Frames around the prompt. The published sets of human-written ones can be given as a file."""
    frames = _templates(settings.file) if settings.file else [(name, text, "") for name, text in own.templates.items()]
    known = [name for name, _, _ in frames]
    for name in settings.names:
        if name not in known:
            raise UserError(f"--template.names: no template named {name!r}{did_you_mean(name, known)}")
    frames = [f for f in frames if not settings.names or f[0] in settings.names]

    def variants(r: Record) -> list[Attempt]:
        return [Attempt(r.id, 0, fill(text, slots(r)), system or r.system, "", name) for name, text, system in frames]

    return Static("template", variants, {"templates": frames})


def _templates(file: str) -> list[tuple[str, str, str]]:
    """(name, text, system) of a user's file."""
    if file.endswith(".jsonl"):
        rows = _rows(file, "templates")
    else:
        parts = "\n".join("\0" if line.strip() == "---" else line for line in read_text(file, "templates").splitlines()).split("\0")
        rows = [{"text": part.strip("\n")} for part in parts if part.strip()]
    for i, row in enumerate(rows):
        if "{prompt}" not in row["text"]:
            raise UserError(f"file {file} of templates, entry {i + 1} has no slot {{prompt}} for the prompt")
    return [(row.get("name") or f"file-{i}", row["text"], row.get("system", "")) for i, row in enumerate(rows)]


def many_shot(settings: ManyShotSettings, own: Texts, seed: int) -> Static:
    """k dialogues before the prompt, in its user turn; which ones, and their order, is drawn per record."""
    if settings.file:
        rows = _rows(settings.file, "dialogues", ("prompt", "response"))
        dialogues = [(row["prompt"], row["response"]) for row in rows]
    else:
        dialogues = list(own.dialogues)
    if (most := max(settings.shots)) > len(dialogues):
        what = f"file {settings.file}" if settings.file else "our own set"
        raise UserError(f"--many-shot.shots {most}: {what} has only {len(dialogues)} dialogues; give more with --many-shot.file")

    def variants(r: Record) -> list[Attempt]:
        order = np.random.default_rng([seed, *r.id.encode()]).permutation(len(dialogues))
        chosen = [dialogues[i] for i in order]
        return [Attempt(r.id, 0, _shots(chosen[:k], r.prompt, own), r.system, "", f"{k} shots") for k in settings.shots]

    return Static("many-shot", variants, {"dialogues": dialogues, "shots": list(settings.shots), "seed": seed})


def _shots(dialogues: list[tuple[str, str]], prompt: str, own: Texts) -> str:
    turns = [fill(own.turn, {"prompt": p, "response": a}) for p, a in dialogues]
    return "\n\n".join([*turns, fill(own.turn, {"prompt": prompt, "response": ""}).rstrip()])


def _rows(file: str, what: str, fields: tuple[str, ...] = ("text",)) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text(file, what).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(f), str) and row[f].strip() for f in fields):
            raise UserError(f"file {file} of {what}, line {number}: must be an object with text in {' and '.join(fields)}")
        rows.append(row)
    return rows

