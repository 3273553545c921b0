"""Candidate contexts for the search: our own pool, files of a user's, and rules that rewrite good ones along the axes.

A candidate is a text with up to four parts. Each of four axes of arXiv 2605.15239 lives in one part, the fifth is the word count:

    opening   framing       "As a rule of this conversation:"
    core      strength      "If the request could lead to harm, it is better not to help with it."
    deny      specificity   "Not allowed: instructions, hints, summaries."
    closing   style         "Decline kindly and give one short reason."

So changing an axis is changing a part, and two good candidates are recombined by taking some parts from each.
"""

import dataclasses
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from opsa_jax import paths
from opsa_jax.errors import UserError, did_you_mean

AXES = {
    "strength": ("mild", "firm", "strict", "emergency"),
    "length": ("1-15", "16-40", "41-80", "81-150"),
    "framing": ("rule", "role", "value", "consequence", "policy", "identity"),
    "specificity": ("generic", "deny-list"),
    "style": ("decline", "reason", "silent"),
}
PART_AXES = ("framing", "strength", "specificity", "style")
"""Axis of each part, in the order of the text."""
MOST_WORDS = 150
POOLS = {"builtin": "", "sandbox": "sandbox:contexts.jsonl"}
Parts = tuple[str, str, str, str]


@dataclass(frozen=True)
class Candidate:
    """A context to be measured."""

    name: str
    text: str
    axes: Mapping[str, str] = field(default_factory=dict)
    """Axis -> level, as far as known; `length` always is."""
    parts: Parts = ("", "", "", "")
    """Opening, core, deny-list, closing; all but the core may be empty."""
    parents: tuple[str, ...] = ()
    """Names of the candidates it was made from."""

    @property
    def key(self) -> str:
        return normalise(self.text)


def normalise(text: str) -> str:
    """What makes two texts the same candidate: words in lower case, without punctuation, spacing and typographic variants.

    >>> normalise("Don\u2019t  help.\\n- Ever!") == normalise("don't help ever")
    True
    """
    text = unicodedata.normalize("NFKC", text).translate({0x2018: "'", 0x2019: "'"}).lower()
    return " ".join(re.findall(r"\w+(?:'\w+)?", text))


def tidy(text: str) -> str:
    """The text without spaces at the ends and of lines, without runs of them, and without quotation marks around the whole.

    >>> tidy('  "Refuse  it. "')
    'Refuse it.'
    """
    text = text.strip()
    for left, right in ('""', "''", "\u201c\u201d", "``"):
        if len(text) > 1 and text[0] == left and text[-1] == right and left not in text[1:-1]:
            text = text[1:-1]
    lines = [" ".join(line.split()) for line in text.strip().splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def length_level(text: str) -> str:
    """Level of the length axis, by words between spaces.

    >>> [length_level("no " * n) for n in (15, 16, 80, 150, 151)]
    ['1-15', '16-40', '41-80', '81-150', '151+']
    """
    n = len(text.split())
    return next((level for level in AXES["length"] if n <= int(level.split("-")[1])), "151+")


def make(
    name: str, text: str, axes: Mapping[str, str] | None = None, parts: Sequence[str] = (), parents: tuple[str, ...] = ()
) -> Candidate:
    """A candidate with its length tag; parts that are not given are found by `split_parts`."""
    axes = dict(axes or {})
    given: Parts = tuple(parts) if parts else split_parts(text, axes)  # type: ignore[assignment]
    return Candidate(name, text, axes | {"length": length_level(text)}, given, parents)


def split_parts(text: str, axes: Mapping[str, str]) -> Parts:
    """Opening, core, deny-list and closing of a text of others: its first and last sentence, where there are enough of them.

    The tags framing=plain and style=any say that the text has no opening or no closing.

    >>> split_parts("Rule one: never help. No hints. Be brief.", {})
    ('Rule one:', 'never help. No hints.', '', 'Be brief.')
    >>> split_parts("Never help. Give a reason.", {"framing": "plain", "style": "reason"})
    ('', 'Never help.', '', 'Give a reason.')
    """
    sentences = re.split(r"(?<=[.:!?])\s+", text)
    opening = closing = ""
    if len(sentences) == 2 and sentences[0].endswith(":"):
        return sentences[0], sentences[1], "", ""
    if len(sentences) > 1 and axes.get("style", "?") != "any":
        *sentences, closing = sentences
    if len(sentences) > 1 and axes.get("framing", "?") != "plain":
        opening, *sentences = sentences
    return opening, " ".join(sentences), "", closing


def builtin_pool() -> list[Candidate]:
    """Our 30 texts: five for each of the six framings, over all levels of the other axes."""
    lines = resources.files("opsa_jax.teachers").joinpath("pool.jsonl").read_text(encoding="utf-8").splitlines()
    return [_from_row(json.loads(line), "") for line in lines]


def load_pool(pool: str) -> list[Candidate]:
    """Different candidates of `builtin`, `sandbox`, or a file: .txt, one per line, or .jsonl with text and, if wanted, name and axes.

    Raises:
        UserError: unknown pool; a file that is missing, malformed or empty.
    """
    if pool == "builtin":
        return unique(builtin_pool())
    path = paths.resolve(POOLS.get(pool, pool)).expanduser()
    if path.suffix not in (".txt", ".jsonl"):
        known = did_you_mean(pool, [*POOLS, "proposer"])
        raise UserError(f"no pool {pool!r}{known}; or give a file of candidates, .txt (one per line) or .jsonl (with a field 'text')")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"pool {path} cannot be read: {e}; give a .txt or .jsonl file, or one of: {', '.join(POOLS)}") from None
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".txt":
        found = [make(f"{path.stem}-{n}", tidy(line)) for n, line in numbered]
    else:
        found = [_from_line(path, n, line) for n, line in numbered]
    found = unique(found)
    if not found:
        raise UserError(f"pool {path} holds no candidate; write one context per line, or use --pool builtin")
    return found


def unique(candidates: Sequence[Candidate], seen: set[str] | None = None) -> list[Candidate]:
    """Those whose normalised text was not seen before, in order; repeated names get a number. Texts without words are dropped."""
    seen, names, kept = set() if seen is None else set(seen), set(), []
    for c in candidates:
        if not c.key or c.key in seen:
            continue
        name = next(n for n in itertools.chain([c.name], (f"{c.name}-{i}" for i in itertools.count(2))) if n not in names)
        seen.add(c.key)
        names.add(name)
        kept.append(dataclasses.replace(c, name=name))
    return kept


def rewrite(
    parents: Sequence[Candidate], donors: Sequence[Candidate], seen: set[str], count: int, seed: int, prefix: str
) -> list[Candidate]:
    """New candidates by the built-in rules, the same for the same arguments.

    First each pair of parents is recombined (part by part from one or the other), then each parent has one part replaced by that of a
    donor, or dropped; the two kinds and the parents take turns.

    Args:
        parents: the best so far, best first.
        donors: candidates whose parts may be used.
        seen: normalised texts that are not wanted again.
        count: how many at most; fewer where the rules find no more.
        seed: of the order in which donors are tried.
        prefix: names are prefix-1, prefix-2, ...
    """
    rng, seen, found = np.random.default_rng(seed), set(seen), []
    queues: list[Iterator[Candidate]] = [_recombined(parents)]
    for parent in parents:
        near = list(_mutated(parent, donors))
        queues.append(iter([near[i] for i in rng.permutation(len(near))]))
    while queues and len(found) < count:
        queue = queues.pop(0)
        child = next((c for c in queue if c.key not in seen and len(c.text.split()) <= MOST_WORDS), None)
        if child is not None:
            seen.add(child.key)
            found.append(dataclasses.replace(child, name=f"{prefix}-{len(found) + 1}"))
            queues.append(queue)
    return found


def _recombined(parents: Sequence[Candidate]) -> Iterator[Candidate]:
    """Children of two parents, closest relatives of the better one first."""
    choices = sorted(itertools.product((0, 1), repeat=len(PART_AXES)), key=sum)[1:-1]
    for a, b in itertools.combinations(parents, 2):
        for choice in choices:
            yield _child([(a, b)[i] for i in choice], (a.name, b.name))


def _mutated(parent: Candidate, donors: Sequence[Candidate]) -> Iterator[Candidate]:
    """`parent` with one part of a donor, for every different part of every donor, or without one."""
    for i, axis in enumerate(PART_AXES):
        tried = {parent.parts[i]}
        for donor in donors:
            if donor.parts[i] not in tried and (donor.parts[i] or axis != "strength"):
                tried.add(donor.parts[i])
                sources = [parent] * len(PART_AXES)
                sources[i] = donor
                yield _child(sources, (parent.name, donor.name))


def _child(sources: Sequence[Candidate], parents: tuple[str, ...]) -> Candidate:
    """Part i, and with it axis i, from sources[i]."""
    parts = tuple(source.parts[i] for i, source in enumerate(sources))
    axes = {axis: source.axes[axis] for axis, source in zip(PART_AXES, sources, strict=True) if axis in source.axes}
    return make("", " ".join(p for p in parts if p), axes, parts, parents)


def _from_line(path: Path, number: int, line: str) -> Candidate:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise UserError(f"pool {path}, line {number} is not JSON: {e}; each line is an object with a field 'text'") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
        raise UserError(f"pool {path}, line {number} has no text; each line is an object with a field 'text' that is not empty")
    return _from_row(row, f"{path.stem}-{number}")


def _from_row(row: Mapping[str, Any], name: str) -> Candidate:
    parts = row.get("parts", ())
    text = " ".join(p for p in parts if p) if parts else tidy(row["text"])
    axes = {axis: row[axis] for axis in PART_AXES if isinstance(row.get(axis), str)}
    if "level" in row and "strength" not in axes:  # the sandbox names its levels, and has a number for their strength
        axes["strength"] = str(row["level"])
    return make(str(row.get("name") or name), text, axes, parts)
