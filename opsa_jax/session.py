"""A whole training run: prepare, evaluate the base, train, export, evaluate the result, show the difference."""

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from opsa_jax.analysis.plots import plot_run
from opsa_jax.config import RunConfig
from opsa_jax.data.loaders import write_jsonl
from opsa_jax.errors import Preempted, UserError
from opsa_jax.evals.runner import evaluate, results_table
from opsa_jax.models import hf, lora
from opsa_jax.models.params import Params
from opsa_jax.parallel import distributed
from opsa_jax.recipes import config_hash
from opsa_jax.training import rundir
from opsa_jax.training.checkpoint import Checkpoints, check_place, place_of
from opsa_jax.training.loop import run_updates
from opsa_jax.training.preempt import Preemption
from opsa_jax.training.setup import Run, prepare
from opsa_jax.training.state import student_params
from opsa_jax.training.validation import Validation, load_records


def train(config: RunConfig) -> Path:
    """Run `config` from start to end, or from its last checkpoint with `resume`. Returns the run directory.

    Files: config.json (resolved config, hash, versions, command), metrics.jsonl, checkpoints/, results.json, evals/ (every scored
    response), plot.png and plot.svg, hf/ (the trained model in Hugging Face format).

    Raises:
        UserError: bad input, before anything is written.
        Preempted: stopped by SIGTERM or a maintenance notice, with everything saved.
    """
    console = _console()
    resuming = distributed.from_first("run directory", lambda: _check(config))
    distributed.check_same("config", config_hash(config), "config")
    if config.validation.every:
        load_records(config.validation)  # a suite without a validation split is told before anything is loaded
    with Preemption() as preemption:
        run, state = prepare(config, console.print)
        folder = Path(config.out)
        if jax.process_index() == 0 and not resuming:
            rundir.create(config)
        _check_shared(config)
        checkpoints = Checkpoints(place_of(config), config.train.keep, Path(config.out) / "checkpoints")
        before = _evaluate(run, student_params(state, run.frozen), folder, "base", console, preemption)
        if checkpoints.latest is not None:
            state, place = checkpoints.restore(state)
            run.prompts.stream.restore(place["stream"])
            console.print(f"resume   from update {int(state.step)} of {run.total_updates}")
        with _validation(run, folder, console) as validation:
            if validation is not None:
                validation.begin(state)
            state = run_updates(run, state, folder, checkpoints, preemption, validation)
            checkpoints.close()
            state = validation.chosen(state) if validation is not None else state
        params = student_params(state, run.frozen)
        if config.export.enabled:
            export(run, params, folder / "hf", console)
        after = _evaluate(run, params, folder, "trained", console, preemption)
    if jax.process_index() == 0:
        _finish(folder, {"base": before, "trained": after} if before else {}, console)
    return folder


def _validation(run: Run, folder: Path, console: Console):
    """The evaluation while training, closed at the end; None where none is asked for."""
    return contextlib.closing(Validation(run, folder, console.print)) if run.config.validation.every else contextlib.nullcontext()


def _console() -> Console:
    """Where the run says what it does: the first process only."""
    return Console(highlight=False, soft_wrap=True, quiet=jax.process_index() != 0)


def _check(config: RunConfig) -> bool:
    """Run directory and place of the checkpoints; whether there is a run to continue."""
    resuming = rundir.check(config)
    check_place(config, resuming)
    return resuming


def _check_shared(config: RunConfig) -> None:
    """Every process writes its part of a checkpoint, so all must see the folder.

    Raises:
        UserError: this process does not, although the first one has made it.
    """
    place = place_of(config)
    distributed.from_first("made", lambda: True)  # not before the first process has made it
    sign = Path(place) if config.train.checkpoints and "://" not in place else Path(config.out) / "config.json"
    for _ in range(10):  # network file systems may show new files late
        if place.startswith("gs://") or sign.exists():
            return
        time.sleep(1)
    raise UserError(
        f"process {jax.process_index()} does not see {sign}, which process 0 has made: processes on several machines need a shared "
        "folder or an object store for checkpoints (--train.checkpoints gs://BUCKET/FOLDER)"
    )


def _finish(folder: Path, results: dict[str, Any], console: Console) -> None:
    """Results and plot, once the model is trained."""
    if results:
        rundir.write_json(folder / "results.json", results)
        console.print(results_table(results))
    console.print(f"plot     {plot_run(folder)}")


def export_run(folder: Path, out: Path, dtype: str = "auto") -> None:
    """Write the model of a run's last checkpoint as a Hugging Face folder (or its adapter, as the run's config says).

    Raises:
        UserError: no run or no checkpoint there, or `out` exists.
    """
    config = rundir.saved_config(folder)
    config = dataclasses.replace(config, export=dataclasses.replace(config.export, dtype=dtype))
    if out.exists():
        raise UserError(f"{out} exists; choose another folder with --out")
    run, state = prepare(config)
    config = dataclasses.replace(config, out=str(folder))  # where the run is now, if it was moved
    checkpoints = Checkpoints(place_of(config), config.train.keep, Path(config.out) / "checkpoints")
    state, _ = checkpoints.restore(state)
    checkpoints.close()
    export(run, student_params(state, run.frozen), out, Console(highlight=False))


def _evaluate(run: Run, params: Params, folder: Path, name: str, console: Console, preemption: Preemption) -> dict[str, Any]:
    """Results of the suite, kept in evals/NAME.json so that a resumed run does not measure twice; empty without a suite.

    Raises:
        Preempted: it was time to stop; what was measured of this model so far is measured again after a resume.
    """
    suite = run.config.evals.suite
    saved = folder / "evals" / f"{name}.json"
    if not suite:
        return {}
    known = distributed.from_first(f"results of {name}", lambda: json.loads(saved.read_text()) if saved.is_file() else None)
    if known is not None:
        return known
    console.print(f"evaluate {name} model: suite {suite}")

    def look(done: int, total: int) -> None:
        if preemption.due():
            raise Preempted(f"preempted while the {name} model was evaluated; the same command with --resume goes on from there")

    with jax.set_mesh(run.mesh):
        results, transcripts = evaluate(params, run.student.cfg, run.chat, run.config.evals, seed=run.config.seed, progress=look)
    if jax.process_index() == 0:
        write_jsonl(saved.with_suffix(".jsonl"), transcripts)
        rundir.write_json(saved, results)
    return results


def export(run: Run, params: Params, folder: Path, console: Console) -> None:
    """The trained model as a Hugging Face checkpoint, or its adapter in PEFT's layout. A complete one from before is kept."""
    if distributed.from_first(f"export {folder}", folder.exists):
        return
    config, student = run.config, run.student
    dtype = hf.checkpoint_dtype(student.folder) if config.export.dtype == "auto" else config.export.dtype
    if params.layers.lora is not None and not config.export.merge_lora:
        lora.save_adapter(params.layers.lora, student.cfg, config.model.lora, folder, config.model.path)
    else:
        hf.save_params(lora.merge(params), student.cfg, folder, dtype, student.raw, tokenizer_from=student.folder)
    console.print(f"export   {folder} ({dtype})")
