"""GCG as attacks: a suffix per prompt, or one for all; finished suffixes and the state of the one under way are kept on disk."""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsa_jax.data.records import Record
from opsa_jax.evals.attacks.base import Attempt, Rounds, fill, slots
from opsa_jax.evals.attacks.frames import wrap
from opsa_jax.evals.attacks.gcg import Search, State, as_json, optimise
from opsa_jax.evals.attacks.settings import GcgSettings
from opsa_jax.evals.attacks.suffix import Layout, Vocabulary
from opsa_jax.evals.attacks.texts import Texts
from opsa_jax.rollout.rows import RowFile
from opsa_jax.training.rundir import write_json

if TYPE_CHECKING:
    from opsa_jax.evals.attacks.runner import Target

_FREE = ("chunk", "save_every")
"""Settings that do not change the suffixes."""


class Gcg:
    """Suffixes optimised on the attacked model itself. Suffixes are rows of NAME.suffixes.jsonl: id, text, ids, losses, steps, matched.

    Args:
        universal: one suffix for all records, optimised on the first `universal_prompts` of them; the variants `optimised` and
            `transfer` tell on which records it was.
        seed: of the proposals.
        out: folder of the files; None keeps nothing.
        resume: go on with the files there.
        context: what else determines the suffixes (model); checked when resuming.
    """

    def __init__(
        self,
        target: "Target",
        settings: GcgSettings,
        own: Texts,
        seed: int = 0,
        universal: bool = False,
        out: Path | None = None,
        resume: bool = False,
        context: dict[str, Any] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.name = "gcg-universal" if universal else "gcg"
        self._target, self._settings, self._own, self._seed, self._universal = target, settings, own, seed, universal
        self._out, self._resume, self._context, self._say = out, resume, context or {}, say
        self.found: dict[str, dict[str, Any]] = {}
        """Suffix rows by record id (universal: under its one id)."""

    def settings(self) -> dict[str, Any]:
        mine = {k: v for k, v in asdict(self._settings).items() if k not in _FREE}
        if not self._universal:
            del mine["universal_prompts"]
        return {"gcg": mine, "own_target": [self._own.think[0], self._own.answer[0]]}

    def target_text(self, record: Record) -> str:
        """What the answer should start with: the setting, the record's field `target`, or the first of our own openings in its place."""
        text = self._settings.target or str(record.extra.get("target") or "")
        if text:
            return fill(text, slots(record))
        place = "think" if self._target.kind in ("inside", "before") else "plain"
        opening = self._own.think[0] if place == "think" else self._own.answer[0]
        return wrap(fill(opening, slots(record)), place, self._target.kind)

    def rounds(self, records: Sequence[Record]) -> Rounds:
        vocabulary = Vocabulary(self._target.chat, self._target.cfg.vocab_size, self._settings.ascii)
        layouts = [Layout.of(self._target.chat, r.prompt, self.target_text(r), r.system) for r in records]
        rows = self._open()
        try:
            if self._universal:
                count = min(self._settings.universal_prompts, len(records))
                row = self._suffix("universal", vocabulary, layouts[:count], rows)
                texts = [row["text"]] * len(records)
                variants = ["optimised" if i < count else "transfer" for i in range(len(records))]
            else:
                texts = [self._suffix(r.id, vocabulary, [x], rows)["text"] for r, x in zip(records, layouts, strict=True)]
                variants = [""] * len(records)
        finally:
            if rows is not None:
                rows.close()
        yield [Attempt(r.id, 0, r.prompt + t, r.system, "", v) for r, t, v in zip(records, texts, variants, strict=True)]

    def _open(self) -> RowFile | None:
        if self._out is None:
            return None
        path = self._out / f"{self.name}.suffixes.jsonl"
        rows = RowFile(path, self._context | self.settings() | {"seed": self._seed}, self._resume)
        self.found = {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        return rows

    def _suffix(self, name: str, vocabulary: Vocabulary, layouts: list[Layout], rows: RowFile | None) -> dict[str, Any]:
        """The suffix of one record (or the universal one): from the file, or optimised from where it was left."""
        if name in self.found:
            return self.found[name]
        number = zlib.crc32(name.encode())
        search = Search(self._target.params, self._target.cfg, vocabulary, layouts, self._settings)
        saved = None if self._out is None else self._out / f"{self.name}.state.json"
        state = _saved_state(saved, name)
        if state is None:
            first = vocabulary.first(self._settings.suffix_tokens, layouts, self._seed)
            state = State(suffix=first, best=first)

        def save(s: State) -> None:
            if saved is not None:
                write_json(saved, {"id": name, "state": as_json(s)})

        optimise(search, state, (self._seed, number), save)
        row = {"id": name, "sample": 0, "text": vocabulary.text(state.best), "ids": state.best, "loss": state.best_loss}
        row |= {"first_loss": state.losses[0] if state.losses else state.best_loss, "steps": state.step, "matched": state.matched}
        row |= {"evaluations": state.evaluations, "prompts": state.active, "losses": [round(x, 5) for x in state.losses]}
        self.found[name] = row
        if rows is not None:
            rows.append(row)
        self._say(f"{self.name:10s} {name}: target loss {row['first_loss']:.3f} -> {row['loss']:.3f} in {state.step} steps")
        return row


def _saved_state(path: Path | None, name: str) -> State | None:
    """The state of an interrupted suffix of this name."""
    if path is None or not path.is_file():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    return State(**saved["state"]) if saved["id"] == name else None
