"""Cross-SFT data (COPSD stage 1, arXiv 2606.03089): `python -m opsa_jax.answers cross`.

    harmful prompts   sources under the constitution -> faults dropped -> pairwise judge -> rewritten by the model -> length-matched
    benign prompts    the model's own answers
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opsa_jax.analysis.lengths import ks_distance, match_lengths
from opsa_jax.answers import row
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.evals.endpoint import Ask, Endpoint
from opsa_jax.evals.judges import EndpointPairwise, Pair, PairwiseJudge, RulePairwise, answer_words, best
from opsa_jax.evals.scorers import strip_thinking
from opsa_jax.stages.answers import Prompt, Response, Shop, fit, opened, spread
from opsa_jax.teachers.constitution import load_constitution

if TYPE_CHECKING:
    from opsa_jax.answers import Cross

REWRITE = """\
Below are a request and a good answer to it. Write this answer again as you would put it yourself: in your own style, at your usual length.
Keep what it decides, its reason, its warnings and what it offers. Add no help with the request that it does not give.
Do not mention that there was an answer before. Write only the new answer.

Request:
{prompt}

Answer:
{answer}"""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An acceptable answer to a harmful prompt."""

    writer: str
    """The source it is from."""
    text: str


def cross(cfg: "Cross") -> str:
    """Do it; returns a one-line summary.

    Raises:
        UserError: bad input, a constitution without a needed category, an endpoint that does not answer, nothing left.
    """
    stage = _Cross(cfg)
    shop, counts = stage.shop, stage.counts
    own = stage.own()
    target = [r.text for record in (stage.harmful if cfg.lengths == "harmful" else shop.records) if shop.whole(r := own[record.id])]
    rows: dict[str, Candidate] = {}
    for record in shop.with_label("benign"):
        fault = shop.fault(record, own[record.id])
        counts["benign"][fault or "kept"] += 1
        if not fault:
            rows[record.id] = Candidate("own", own[record.id].text)
    candidates = stage.candidates()
    served = [r for r in stage.harmful if candidates[r.id]]
    winners = stage.choose(served, candidates, stage.judge(target))
    variants = stage.rewritten(served, winners)
    texts = stage.matched(served, variants, target)
    rows |= {r.id: Candidate(winners[r.id].writer, texts[r.id]) for r in served}
    return shop.finish([stage.line(r, rows[r.id]) for r in shop.records if r.id in rows], counts, stage.more)


class _Cross:
    """The stages, in the order of `cross`. Everything that can be wrong about the input is found while this is made."""

    def __init__(self, cfg: "Cross"):
        self.cfg = cfg
        constitution = load_constitution(cfg.constitution)
        self._given = {s: read_answers(Path(s.removeprefix("file:"))) for s in check_sources(cfg.sources) if s.startswith("file:")}
        for source, ok in (("--sources endpoint", "endpoint" not in cfg.sources or cfg.endpoint.url),
                           ("--judge endpoint", cfg.judge != "endpoint" or cfg.judge_endpoint.url or cfg.endpoint.url)):  # fmt: skip
            if not ok:
                raise UserError(f"{source} needs --endpoint.url and --endpoint.model (a judge: or --judge-endpoint.url and .model)")
        self.shop = Shop(cfg)
        records = self.shop.records
        self.harmful = self.shop.with_label("harmful")
        for source, answers in self._given.items():
            if not any(r.id in answers for r in self.harmful):
                raise UserError(f"--sources {source}: none of its {len(answers)} ids is that of a harmful prompt of {cfg.prompts}")
        self.systems = dict(zip((r.id for r in records), constitution.texts(records, cfg.general), strict=True))
        self._writer = Endpoint(cfg.endpoint, self.shop.parts / "endpoint.jsonl") if "endpoint" in cfg.sources else None
        self._judge = None
        if cfg.judge == "endpoint":
            asked = cfg.judge_endpoint if cfg.judge_endpoint.url else dataclasses.replace(cfg.endpoint, temperature=0.0)
            self._judge = Endpoint(asked, self.shop.parts / "judge.jsonl")
        for source in cfg.sources:
            if source.startswith("checkpoint:"):
                self.shop.open(source.removeprefix("checkpoint:"))
        self.counts = {"harmful": Counter(), "benign": Counter()}
        self.more: dict[str, Any] = {}
        """What the report says besides."""

    def own(self) -> dict[str, Response]:
        """The model's own answers, without a constitution: what benign prompts are trained on, and the lengths that are native to it."""
        shop = self.shop
        return {i: rs[0] for i, rs in shop.sample("own", shop.prompts(shop.records, [""] * len(shop.records)), 1).items()}

    def candidates(self) -> dict[str, list[Candidate]]:
        """Acceptable answers to each harmful prompt, in the order of the sources; why others were dropped is counted."""
        found: dict[str, list[Candidate]] = {r.id: [] for r in self.harmful}
        faults: dict[str, Counter] = {r.id: Counter() for r in self.harmful}
        for source in self.cfg.sources:
            theirs = opened(self.shop.open(source.removeprefix("checkpoint:"))) if source.startswith("checkpoint:") else False
            theirs = self.shop.opened if source == "self" else theirs
            answers = self._answers(source)
            for record in self.harmful:
                for given in answers.get(record.id, []):
                    response = Response(fit(given.text, theirs, self.shop.opened), given.finished)
                    if fault := self.shop.fault(record, response):
                        faults[record.id][fault] += 1
                    else:
                        found[record.id].append(Candidate(source, response.text))
        for i, candidates in found.items():
            # A prompt that is lost is counted under the commonest fault of its answers.
            reason = "kept" if candidates else faults[i].most_common(1)[0][0] if faults[i] else "no answer given"
            self.counts["harmful"][reason] += 1
        return found

    def _answers(self, source: str) -> Mapping[str, list[Response]]:
        if source in self._given:
            return self._given[source]
        if source == "endpoint":
            return self._asked()
        contexts = [self.systems[r.id] for r in self.harmful]
        if source == "self":
            return self.shop.sample("self", self.shop.prompts(self.harmful, contexts), self.cfg.samples)
        path = source.removeprefix("checkpoint:")
        prompts = self.shop.prompts(self.harmful, contexts, self.shop.open(path))
        number = [s for s in self.cfg.sources if s.startswith("checkpoint:")].index(source)
        return self.shop.sample(f"checkpoint-{number}", prompts, self.cfg.samples, path)

    def _asked(self) -> dict[str, list[Response]]:
        """Answers of the endpoint, `samples` for each harmful prompt."""
        asks = [Ask(self._messages(r), k) for r in self.harmful for k in range(self.cfg.samples)]
        with self.shop.bar("endpoint", len(asks)) as progress:
            replies = iter(self._writer.ask(asks, progress))
        return {r.id: [Response(a.text, a.finished) for a in islice(replies, self.cfg.samples)] for r in self.harmful}

    def _messages(self, record: Record) -> tuple[dict[str, str], ...]:
        system, prompt = self._placed(record)
        return tuple([{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": prompt}])

    def _placed(self, record: Record) -> tuple[str, str]:
        """(system message, user's text) with the constitution in its place, as `Chat.render` puts it."""
        text = self.systems[record.id]
        if self.cfg.placement == "user":
            return record.system, f"{text}\n\n{record.prompt}" if text else record.prompt
        return "\n\n".join(t for t in (text, record.system) if t), record.prompt

    def judge(self, native: Sequence[str]) -> PairwiseJudge:
        """Args: native: the model's own answers, whose mean length breaks ties of the rule."""
        opened = self.shop.opened
        if self._judge:
            return EndpointPairwise(self._judge, opened=opened)
        words = float(np.mean([answer_words(t, opened) for t in native])) if native else None
        return RulePairwise(self.cfg.refusal_phrases, opened, words)

    def choose(self, records: Sequence[Record], candidates: Mapping[str, list[Candidate]], judge: PairwiseJudge) -> dict[str, Candidate]:
        """The best candidate of each record."""

        def pair(i: int, first: str, second: str) -> Pair:
            return Pair(records[i].prompt, first, second, "harmful", records[i].category)

        with self.shop.bar("judge", len(records)) as progress:
            chosen = best([[c.text for c in candidates[r.id]] for r in records], pair, judge, progress)
        winners = {r.id: candidates[r.id][k] for r, k in zip(records, chosen, strict=True)}
        self.more |= {"judge": dict(judge.report), "winners": dict(Counter(c.writer for c in winners.values()))}
        return winners

    def rewritten(self, records: Sequence[Record], winners: Mapping[str, Candidate]) -> dict[str, list[str]]:
        """Rewritten answers of each record: those nearest in manner to the winner; where all of them have faults, the winner itself."""
        shop, how = self.shop, self.cfg.rewrite
        if how == "auto":
            how = "resample" if self._too_small_to_rewrite() else "prompt"
        self.more["rewrite"] = how
        if how == "none":
            return {r.id: [winners[r.id].text] for r in records}
        if how == "prompt":
            asked = [_fill(r.prompt, strip_thinking(winners[r.id].text, shop.opened)[0]) for r in records]
            prompts = [Prompt(r.id, shop.chat.render(text, system=r.system)) for r, text in zip(records, asked, strict=True)]
        else:
            prompts = shop.prompts(records, [self.systems[r.id] for r in records])
        found = shop.sample(f"rewrite-{how}", prompts, self.cfg.rewrites)
        rank = RulePairwise(self.cfg.refusal_phrases, shop.opened).rank
        variants, failed = {}, 0
        for r in records:
            good = [x.text for x in found[r.id] if not shop.fault(r, x)]
            off = [abs(rank(t, "harmful") - rank(winners[r.id].text, "harmful")) for t in good]
            variants[r.id] = [t for t, d in zip(good, off, strict=True) if d == min(off)] or [winners[r.id].text]
            failed += not good
        self.more["rewriting failed, answer kept"] = failed
        return variants

    def _too_small_to_rewrite(self) -> bool:
        tokenizer = self.shop.chat.tokenizer
        return tokenizer.unk_token_id is not None and tokenizer.unk_token_id in self.shop.chat.encode(REWRITE)

    def matched(self, records: Sequence[Record], variants: Mapping[str, list[str]], native: Sequence[str]) -> dict[str, str]:
        """One variant of each record, so that lengths in tokens are distributed like those of the model's own answers."""
        texts = [variants[r.id] for r in records]
        if not native or not records:
            return {r.id: ts[0] for r, ts in zip(records, texts, strict=True)}
        target = self.shop.tokens(native)
        flat = iter(self.shop.tokens([t for ts in texts for t in ts]))
        lengths = [[next(flat) for _ in ts] for ts in texts]
        chosen = match_lengths(lengths, target)
        after = [ls[k] for ls, k in zip(lengths, chosen, strict=True)]
        before = [ls[0] for ls in lengths]
        self.more["tokens, own answers"] = _rounded(target)
        for name, values in (("first rewritten", before), ("length-matched", after)):
            self.more[f"tokens, {name}"] = _rounded(values) | {"KS distance": round(ks_distance(values, target), 3)}
        return {r.id: ts[k] for r, ts, k in zip(records, texts, chosen, strict=True)}

    def line(self, record: Record, answer: Candidate) -> dict[str, Any]:
        """A row: the constitution is in its input."""
        system, prompt = self._placed(record)
        placed = dataclasses.replace(record, system=system, prompt=prompt)
        return row(placed, answer.text) | {"writer": answer.writer}


def _rounded(values: Sequence[float]) -> dict[str, float]:
    return {k: round(v, 1) for k, v in spread(values).items()}


def _fill(prompt: str, answer: str) -> str:
    # One after the other would replace what looks like a placeholder inside the prompt.
    head, _, tail = REWRITE.partition("{prompt}")
    return head + prompt + tail.replace("{answer}", answer)


def check_sources(sources: Sequence[str]) -> Sequence[str]:
    """Raises UserError for none, one twice, or one of an unknown kind."""
    for s in sources:
        kind, _, rest = s.partition(":")
        if not (s in ("self", "endpoint") or (kind in ("checkpoint", "file") and rest)):
            raise UserError(f"--sources {s!r}: allowed: self, checkpoint:PATH, endpoint, file:PATH")
    if not sources or len(set(sources)) < len(sources):
        raise UserError("--sources: name at least one writer of answers, and none twice")
    return sources


def read_answers(path: Path) -> dict[str, list[Response]]:
    """Answers by id from JSON lines with `id` and `response` (and `finished`, as `generate` writes it).

    Raises:
        UserError: unreadable, or a line without them.
    """
    found: dict[str, list[Response]] = {}
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"file of answers {path} cannot be read: {e}") from None
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or "id" not in line or not isinstance(line.get("response"), str):
            raise UserError(f"file of answers {path}, line {number}: needs the fields id (of the prompt) and response (text)")
        found.setdefault(str(line["id"]), []).append(Response(line["response"], line.get("finished", True) is not False))
    return found
