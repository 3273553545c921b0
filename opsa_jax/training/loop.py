"""The training loop, in the order it runs:

    next prompts -> rollout -> updates -> metrics of the PREVIOUS rollout -> validation when due -> checkpoint when due

The host never waits for a step it has just launched: metrics are read one rollout batch late. With several processes all run this
loop and take the same decisions; the first one writes and shows.
"""

import contextlib
from pathlib import Path

import jax
import numpy as np

from opsa_jax.data.pipeline import Example
from opsa_jax.errors import Preempted
from opsa_jax.evals.scorers import refused
from opsa_jax.parallel.mesh import local_rows, whole
from opsa_jax.recipes import to_dict
from opsa_jax.rollout.sampler import Rollout
from opsa_jax.training.checkpoint import Checkpoints
from opsa_jax.training.clock import DeviceClock
from opsa_jax.training.display import Display, Sample
from opsa_jax.training.metrics import MetricWriter, ratios
from opsa_jax.training.preempt import Preemption
from opsa_jax.training.setup import Run
from opsa_jax.training.state import TrainState
from opsa_jax.training.validation import Validation


def run_updates(
    run: Run, state: TrainState, folder: Path, checkpoints: Checkpoints, preemption: Preemption, validation: Validation | None = None
) -> TrainState:
    """All updates from `state` to the last one, with a checkpoint at the end. Returns the final state.

    Raises:
        Preempted: it was time to stop; the updates up to then are saved.
    """
    config, total = run.config, run.total_updates
    done = int(state.step)
    pending = None
    clock = DeviceClock()
    first = jax.process_index() == 0
    writer = MetricWriter(folder, config.log, to_dict(config), start=done) if first else None
    with jax.set_mesh(run.mesh), Display(total, done, config.log.progress and first) as display, contextlib.closing(writer or _Nothing()):
        while done < total:
            draws = run.next_draws()
            rollout, batch = run.rollout(state, draws, round_number=done // run.updates_per_rollout)
            clock.mark(done, "rollout", rollout.finished_B)
            launched = []
            for u in range(min(run.updates_per_rollout, total - done)):
                state, metrics = run.update(state, run.frozen, batch, np.int32(u))
                clock.mark(done, "update", metrics)
                launched.append(metrics)
            if pending is not None:
                _report(run, display, writer, clock, *pending)
            pending = (done, launched, draws, _readable(run, rollout))
            done += len(launched)
            if validation is not None and validation.due(done, len(launched)):
                validation.score(done, state)
            stop = preemption.due() and done < total
            if stop or _save_due(config.train.save_every, done, len(launched), total):
                # What a checkpoint holds is in metrics.jsonl before it: a run killed after the save resumes without a gap.
                _report(run, display, writer, clock, *pending)
                pending = None
                checkpoints.save(done, state, run.place())
            if stop:
                checkpoints.close()
                raise Preempted(f"preempted: update {done} of {total} is saved; the same command with --resume goes on from there")
    return state


class _Nothing:
    """Stands for the writer of the processes that have none."""

    def close(self) -> None:
        pass


def _readable(run: Run, rollout: Rollout) -> Rollout:
    """The rollout with the responses of all rows on every process (launched, not waited for)."""
    names = ("response_ids_BR", "response_mask_BR", "finished_B")
    return rollout.replace(**whole(run.mesh, {name: getattr(rollout, name) for name in names}))


def _save_due(every: int, done: int, launched: int, total: int) -> bool:
    """At the end, and whenever a multiple of `every` was passed by the updates just launched."""
    return done == total or (every > 0 and done // every > (done - launched) // every)


def _report(
    run: Run, display: Display, writer: MetricWriter | None, clock: DeviceClock, first: int, launched, draws, rollout: Rollout
) -> None:
    """Read the metrics of one rollout batch (this waits for it, on every process) and show them."""
    if writer is None:
        clock.take(first)
        return
    host, texts = jax.device_get(launched), run.texts(rollout)
    mask, finished = local_rows(rollout.response_mask_BR), local_rows(rollout.finished_B)
    seconds = clock.take(first)
    spent = sum(seconds.values()) or 1.0
    samples = [_sample(run, e, t) for (e, _), t in zip(draws, texts, strict=True)]
    common = {
        "response_tokens": float(mask.sum(1).mean()),
        "finished": float(finished.mean()),
        "tokens_per_second": float(mask.sum()) / spent,
        "share_rollout": seconds.get("rollout", 0.0) / spent,
        "share_update": seconds.get("update", 0.0) / spent,
    }
    for label in ("harmful", "benign"):
        chosen = [s.refused for s in samples if s.label == label]
        if chosen:
            common[f"refused_{label}"] = sum(chosen) / len(chosen)
    for i, metrics in enumerate(host):
        step = first + i + 1
        row = ratios(metrics) | common
        writer.write(step, row)
        display.update(step, row)
    every = run.config.log.samples_every
    if every and (first == 0 or first // every != (first + len(host)) // every):
        _show_samples(run, display, first + 1, samples)


def _show_samples(run: Run, display: Display, step: int, samples: list[Sample]) -> None:
    """A few rows, labels in turn."""
    harmful, benign = ([s for s in samples if s.label == label] for label in ("harmful", "benign"))
    mixed = [s for pair in zip(harmful, benign, strict=False) for s in pair] or samples
    display.samples(step, mixed[: run.config.log.samples], run.config.log.show_harmful)


def _sample(run: Run, example: Example, response: str) -> Sample:
    return Sample(example.record.label, example.record.prompt, response, refused(response, run.config.evals.refusal_phrases))
