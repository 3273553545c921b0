"""The search behind `search.py`: candidates in, rates, rewriting rounds, a choice, held-out numbers.

Every answer is kept under a key made of context and prompt (`search_answers.py`), and everything else is computed from the answers. So a
stopped search continues where it was, and another weight, pool or phrase list with --resume costs only the answers that are new.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsa_jax.errors import UserError
from opsa_jax.stages.search_answers import Answers, Model, ask
from opsa_jax.teachers import flip_rate, pool, proposer

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from rich.console import Console

    from opsa_jax.data.records import Record
    from opsa_jax.search import SearchConfig

_OUTCOMES = ("complied", "refused", "neither", "empty")


def check(config: "SearchConfig") -> None:
    """Mistakes that show without loading anything.

    Raises:
        UserError: the first of them.
    """
    if not (config.benign_weight >= 0 and math.isfinite(config.benign_weight)):
        raise UserError(f"--benign-weight {config.benign_weight}: must be 0 (the paper's criterion) or above")
    if not 0 < config.select_share < 1:
        raise UserError(f"--select-share {config.select_share}: must lie between 0 and 1; the rest of the prompts is held out")
    for name, least in {
        **dict.fromkeys(("iterations", "seed", "show"), 0),
        **dict.fromkeys(("parents", "children", "max_new_tokens", "batch", "proposer_tokens"), 1),
    }.items():
        if (value := getattr(config, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if config.proposer and not config.iterations and config.pool != "proposer":
        raise UserError("--proposer has nothing to do: add --iterations N, or let it write the first candidates with --pool proposer")
    if config.pool == "proposer" and not config.proposer:
        raise UserError("--pool proposer needs a chat model: add --proposer PATH, or use --pool builtin")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not config.resume:
            raise UserError(f"output folder {out} exists; continue it with --resume, or choose another with --out")
        if not (out / "responses.jsonl").is_file():
            raise UserError(f"output folder {out} holds no search to resume (no responses.jsonl); choose another with --out")


@dataclass(frozen=True)
class Prompts:
    """The prompts of one part of the split."""

    harmful: list["Record"]
    benign: list["Record"]

    @property
    def counts(self) -> dict[str, int]:
        return {"harmful": len(self.harmful), "benign": len(self.benign)}

    def under(self, *contexts: str) -> list[tuple[str, "Record"]]:
        return [(context, record) for context in contexts for record in self.harmful + self.benign]


@dataclass(frozen=True)
class Scored:
    """A candidate with its numbers on the selection prompts."""

    candidate: pool.Candidate
    iteration: int
    order: int
    """Its number in the order of measuring, which settles ties."""
    measured: dict[str, Any]

    @property
    def row(self) -> dict[str, Any]:
        c = self.candidate
        about = {"name": c.name, "text": c.text, "axes": dict(c.axes), "iteration": self.iteration, "parents": list(c.parents)}
        return about | {"select": self.measured}


class Search:
    """A search with everything loaded; `run` is the algorithm."""

    def __init__(self, config: "SearchConfig", model: Model, mesh: "Mesh", select: Prompts, held_out: Prompts, console: "Console"):
        self.config, self.model, self.mesh, self.console = config, model, mesh, console
        self.select, self.held_out = select, held_out
        self.scored: list[Scored] = []
        self._answers = Answers(config, model)

    def close(self) -> None:
        self._answers.close()

    def run(self, candidates: Sequence[pool.Candidate]) -> dict[str, Any]:
        """Measure the pool (an empty one is written by the proposer), do the rounds, choose, measure the chosen on the held-out prompts."""
        config = self.config
        self._answers.ensure(self.select.under("") + self.held_out.under(""), "without context")
        if not any(self._outcome("", r) == "complied" for r in self.select.harmful):
            self.console.print("note     without a context every harmful prompt is refused, so no flip can be seen (--refusal-phrases?)")
        self._score(candidates or self._proposed(0, []), 0)
        for iteration in range(1, config.iterations + 1):
            parents = self.ranked()[: config.parents]
            children = self._proposed(iteration, parents) if config.proposer else self._rewritten(iteration, parents)
            if not children:
                self.console.print(f"note     round {iteration}: the rewriting rules find no new candidate; the search ends here")
                break
            self._score(children, iteration)
        chosen = self.ranked()[0]
        paper = min(self.scored, key=lambda s: (-s.measured["tfr"]["rate"], s.order))
        self._answers.ensure(self.held_out.under(chosen.candidate.text, paper.candidate.text), "held out")
        return {
            "config": {k: v for k, v in asdict(config).items() if k not in ("out", "resume", "show", "batch", "mesh")},
            "split": {"select": self.select.counts, "held_out": self.held_out.counts},
            "base": {"select": self._base(self.select), "held_out": self._base(self.held_out)},
            "chosen": self._held_out_row(chosen),
            "paper": self._held_out_row(paper),
            "candidates": [s.row for s in self.ranked()],
        }

    def ranked(self) -> list[Scored]:
        """Best first: by objective, then fewer benign flips, then fewer words, then order of measuring."""

        def rank(s: Scored):
            return -s.measured["objective"], s.measured["benign_flip_rate"]["rate"], len(s.candidate.text.split()), s.order

        return sorted(self.scored, key=rank)

    def _score(self, candidates: Sequence[pool.Candidate], iteration: int) -> None:
        self._answers.ensure(self.select.under(*(c.text for c in candidates)), f"round {iteration}" if iteration else "candidates")
        for c in candidates:
            self.scored.append(Scored(c, iteration, len(self.scored), self._measure(c.text, self.select)))

    def _rewritten(self, iteration: int, parents: Sequence[Scored]) -> list[pool.Candidate]:
        seen = {s.candidate.key for s in self.scored}
        donors = [s.candidate for s in self.ranked()]
        seed = self.config.seed + iteration
        return pool.rewrite([p.candidate for p in parents], donors, seen, self.config.children, seed, f"round{iteration}")

    def _proposed(self, iteration: int, parents: Sequence[Scored]) -> list[pool.Candidate]:
        """New candidates in the proposer's replies; the first ones are asked for with the axes of the built-in pool.

        Raises:
            UserError: there is none in any reply.
        """
        from opsa_jax.evals.scorers import refused

        config = self.config
        wanted = [dict(c.axes) for c in pool.builtin_pool()]
        if parents:
            wanted = proposer.wanted_axes([p.candidate for p in parents], config.children, config.seed + iteration)
        examples = [(p.candidate.text, p.measured["tfr"]["rate"], p.measured["benign_flip_rate"]["rate"]) for p in parents]
        replies = ask([proposer.request(axes, examples) for axes in wanted], config, self.model, self.mesh)
        found = []
        for axes, answer in zip(wanted, replies, strict=True):
            if "<context>" not in answer and refused(answer, "english-v1"):
                continue  # the proposer declines to write; a context that speaks of refusing stands between the tags
            for text in proposer.parse_reply(answer):
                name = f"round{iteration}-{len(found) + 1}"
                found.append(pool.make(name, text, axes, parents=tuple(p.candidate.name for p in parents)))
        found = pool.unique(found, {s.candidate.key for s in self.scored})
        if not found:
            raise UserError(
                f"round {iteration}: none of the {len(replies)} replies of proposer {config.proposer} holds a new context (the first: "
                f"{replies[0][:60]!r}); finished answers are kept in {config.out}: --resume with another --proposer, or with none"
            )
        return found

    def _held_out_row(self, s: Scored) -> dict[str, Any]:
        return s.row | {"held_out": self._measure(s.candidate.text, self.held_out)}

    def _outcome(self, context: str, record: "Record") -> str:
        from opsa_jax.evals.scorers import outcome

        expect = record.extra.get("expect", "") if record.label == "harmful" else ""
        return outcome(self._answers.get(context, record)["response"], expect, self.config.refusal_phrases, self.model.opened)

    def _base(self, prompts: Prompts) -> dict[str, dict[str, int]]:
        """Outcomes without a context."""
        kinds = {"harmful": prompts.harmful, "benign": prompts.benign}
        return {label: _counts([self._outcome("", r) for r in records]) for label, records in kinds.items()}

    def _measure(self, context: str, prompts: Prompts) -> dict[str, Any]:
        """Rates with 95 % Wilson intervals, lengths in tokens, outcomes under the context."""
        harmful, benign = ([self._outcome(context, r) for r in records] for records in (prompts.harmful, prompts.benign))
        unsafe, answered = ([self._outcome("", r) == "complied" for r in records] for records in (prompts.harmful, prompts.benign))
        safe, refused = ([o == "refused" for o in outcomes] for outcomes in (harmful, benign))
        tfr, benign_flips = flip_rate.teacher_flip_rate(unsafe, safe), flip_rate.benign_flip_rate(answered, refused)
        rows = [self._answers.get(c, r) for c, r in prompts.under(context)]
        return {
            "objective": flip_rate.objective(tfr.rate, benign_flips.rate, self.config.benign_weight),
            "tfr": _cell(tfr),
            "tfr_of_unsafe": _cell(flip_rate.teacher_flip_rate_of_unsafe(unsafe, safe)),
            "benign_flip_rate": _cell(benign_flips),
            "benign_flip_rate_of_answered": _cell(flip_rate.benign_flip_rate_of_answered(answered, refused)),
            "response_tokens": sum(row["tokens"] for row in rows) / len(rows),
            "unfinished": sum(not row["finished"] for row in rows),
            "outcomes": {"harmful": _counts(harmful), "benign": _counts(benign)},
        }


def _cell(flips: flip_rate.Flips) -> dict[str, Any]:
    from opsa_jax.evals.scorers import wilson

    low, high = wilson(flips.flipped, flips.n)
    return {"rate": flips.rate, "n": flips.n, "low": low, "high": high}


def _counts(outcomes: Sequence[str]) -> dict[str, int]:
    counts = Counter(outcomes)
    return {name: counts[name] for name in _OUTCOMES}


def search(config: "SearchConfig", console: "Console") -> tuple[Path, dict[str, Any]]:
    """The whole search; returns the output folder, with results.json and context.txt in it, and the results.

    Raises:
        UserError: bad input, before anything is written; a proposer without usable replies, with the finished answers kept.
    """
    import jax

    from opsa_jax.evals.scorers import refusal_list
    from opsa_jax.parallel.mesh import make_mesh
    from opsa_jax.training.rundir import write_json

    check(config)
    config = _resolved(config)
    refusal_list(config.refusal_phrases)
    candidates = [] if config.pool == "proposer" else pool.load_pool(config.pool)
    select, held_out = load_prompts(config)
    mesh, out = make_mesh(config.mesh), Path(config.out)
    with jax.set_mesh(mesh):
        model = Model.load(config.model, config, mesh)
        # Templates without system messages and foreign tokenizers show here, before the output folder is made.
        shown = candidates[0].text if candidates else "Refuse."
        model.encode([model.chat.render(r.prompt, shown, config.placement, r.system) for r in select.harmful + select.benign])
        running = Search(config, model, mesh, select, held_out, console)
        try:
            results = running.run(candidates)
        finally:
            running.close()
    temporary = out / "context.txt.tmp"
    temporary.write_text(results["chosen"]["text"] + "\n", encoding="utf-8")
    temporary.replace(out / "context.txt")
    write_json(out / "results.json", results)
    return out, results


def _resolved(config: "SearchConfig") -> "SearchConfig":
    """Pool and phrase list of the world that the prompts are from, where they are left to `auto`."""
    sandbox = config.harmful.path.startswith("sandbox:")
    chosen = config.pool if config.pool != "auto" else "sandbox" if sandbox else "builtin"
    phrases = config.refusal_phrases if config.refusal_phrases != "auto" else "sandbox-v1" if sandbox else "english-v1"
    return replace(config, pool=chosen, refusal_phrases=phrases)


def load_prompts(config: "SearchConfig") -> tuple[Prompts, Prompts]:
    """The prompts to select on, and those held out.

    Raises:
        UserError: no prompts of one kind, or too few of them to split.
    """
    from opsa_jax.data.loaders import load_source

    parts = []
    for name, source in (("harmful", config.harmful), ("benign", config.benign)):
        records = list(load_source(replace(source, label=source.label or name))[0])
        if wrong := next((r for r in records if r.label != name), None):
            raise UserError(f"--{name}.label {wrong.label}: the {name} prompts of a search must be labelled {name}")
        # A prompt that stands twice in the file would count twice, or stand on both sides of the split.
        parts.append(split({(r.system, r.prompt): r for r in reversed(records)}.values(), config.select_share))
        if not all(parts[-1]):
            raise UserError(f"{source.path}: {len(records)} different {name} prompt cannot be split in two; give at least 2")
    (harmful, held_harmful), (benign, held_benign) = parts
    return Prompts(harmful, benign), Prompts(held_harmful, held_benign)


def split(records: Sequence["Record"], share: float) -> tuple[list["Record"], list["Record"]]:
    """The share of the records (at least one, not all) whose ids have the smallest hashes, and the rest; both in the order of the hashes.

    The order of the file plays no part, and neither does the seed.
    """
    ordered = sorted(records, key=lambda r: (hashlib.sha256(r.id.encode()).digest(), r.prompt))
    n = min(max(1, round(share * len(ordered))), len(ordered) - 1)
    return ordered[:n], ordered[n:]
