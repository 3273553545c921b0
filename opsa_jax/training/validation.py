"""Evaluation while training, and the checkpoint that is kept.

A small fixed sub-sample of the suite's VALIDATION split is scored every so often; what is reported at the end is the test split, which
nothing here reads. The rule is stated once: among the scored checkpoints whose over-refusal and capability are within limits of the
base's, the one with the lowest mean attack success rate; of equals, the earliest.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from opsa_jax.config import ValidationConfig
from opsa_jax.data.records import Record
from opsa_jax.evals.runner import respond
from opsa_jax.evals.suite import judge, load_suite, summarise
from opsa_jax.models.params import Params
from opsa_jax.parallel import distributed
from opsa_jax.training import rundir
from opsa_jax.training.checkpoint import Checkpoints
from opsa_jax.training.setup import Run
from opsa_jax.training.state import TrainState, student_params

Row = dict[str, Any]


def load_records(cfg: ValidationConfig) -> list[Record]:
    """The validation prompts, `limit` of each metric.

    Raises:
        UserError: the suite has no validation split.
    """
    return load_suite(cfg.suite, split="val", limit=cfg.limit)


def mean_asr(row: Row) -> float:
    """Mean of the attack success rates of a row.

    >>> mean_asr({"asr_seen": 0.5, "asr_jailbreak": 0.0, "capability": 1.0})
    0.25
    """
    rates = [v for k, v in row.items() if k.startswith("asr_")]
    return sum(rates) / len(rates) if rates else 0.0


def best_row(cfg: ValidationConfig, rows: list[Row]) -> Row | None:
    """The row that the rule chooses; the first row is the base model's and is never chosen. None where no row is within limits.

    >>> base = {"step": 0, "asr_seen": 0.9, "over_refusal": 0.0, "capability": 1.0}
    >>> early, late = base | {"step": 5, "asr_seen": 0.1}, base | {"step": 9, "asr_seen": 0.0, "over_refusal": 0.5}
    >>> best_row(ValidationConfig(), [base, early, late])["step"]
    5
    """
    base, *later = rows

    def within(row: Row) -> bool:
        more = row.get("over_refusal", 0.0) - base.get("over_refusal", 0.0)
        less = base.get("capability", 0.0) - row.get("capability", 0.0)
        return more <= cfg.max_over_refusal and less <= cfg.max_capability_loss

    return min(filter(within, later), key=lambda row: (mean_asr(row), row["step"]), default=None)


class Validation:
    """Scores a run while it trains. With several processes all make the same calls."""

    def __init__(self, run: Run, folder: Path, say: Callable[[str], None]):
        """
        Args:
            say: gets a line per evaluation.
        """
        self._run, self._say, self._cfg = run, say, run.config.validation
        self._file = folder / "evals" / "validation.jsonl"
        self._records = load_records(self._cfg)
        self._prompts = [run.chat.encode(r.prompt, system=r.system) for r in self._records]
        self._best = Checkpoints(folder / "best", keep=1) if self._cfg.keep_best else None
        self.rows: list[Row] = []

    def begin(self, state: TrainState) -> None:
        """Score the base, or take up the rows of a run that goes on from `state`; what came after it is forgotten."""
        done = int(state.step)
        self.rows = [row for row in distributed.from_first("validation rows", self._read) if row["step"] <= done]
        self._write()
        if self._best is not None:
            self._best.drop_after(done)
        if not self.rows:
            self._score(0, student_params(state, self._run.frozen))

    def due(self, done: int, launched: int) -> bool:
        """Whenever a multiple of `every` was passed by the updates just launched, and at the end."""
        every = self._cfg.every
        return done == self._run.total_updates or done // every > (done - launched) // every

    def score(self, done: int, state: TrainState) -> None:
        """Score the state after `done` updates, and save it where it is the best so far."""
        self._score(done, student_params(state, self._run.frozen))
        best = best_row(self._cfg, self.rows)
        if self._best is not None and best is self.rows[-1]:
            self._best.save(done, state, self._run.place())

    def chosen(self, state: TrainState) -> TrainState:
        """The state to export and report: the best by the rule, or `state` where none is kept or none is within limits."""
        if self._best is None:
            return state
        best = best_row(self._cfg, self.rows)
        if best is None:
            limits = f"over-refusal +{self._cfg.max_over_refusal:g}, capability -{self._cfg.max_capability_loss:g}"
            self._say(f"warning: no checkpoint is within the limits ({limits}); the last one is kept")
            return state
        self._say(f"best     update {best['step']}: validation ASR {mean_asr(best):.3f}")
        return self._best.restore(state)[0]

    def close(self) -> None:
        if self._best is not None:
            self._best.close()

    def _score(self, step: int, params: Params) -> None:
        run, evals = self._run, self._run.config.evals
        with jax.set_mesh(run.mesh):
            responses = respond(params, run.student.cfg, run.chat, self._records, self._prompts, evals, run.config.seed)
        outcomes = [judge(r, text, evals.refusal_phrases) for r, text in zip(self._records, responses, strict=True)]
        results = summarise(self._records, responses, outcomes)
        row = {"step": step} | {name: cell["rate"] for name, cell in results.items()}
        self.rows.append(row)
        self._write()
        shown = "  ".join(f"{name} {row[name]:.3f}" for name in row if name.startswith(("asr_", "over_refusal")) or name == "capability")
        self._say(f"validate update {step}: {shown}")

    def _read(self) -> list[Row]:
        return [json.loads(line) for line in self._file.read_text().splitlines()] if self._file.is_file() else []

    def _write(self) -> None:
        if jax.process_index() == 0:
            rundir.write_text(self._file, "".join(json.dumps(row) + "\n" for row in self.rows))
