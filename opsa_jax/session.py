"""A whole training run: prepare, evaluate the base, train, export, evaluate the result, show the difference."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from opsa_jax.analysis.plots import plot_run
from opsa_jax.config import RunConfig
from opsa_jax.data.loaders import write_jsonl
from opsa_jax.errors import UserError
from opsa_jax.evals.runner import evaluate, results_table
from opsa_jax.models import hf, lora
from opsa_jax.models.params import Params
from opsa_jax.training import rundir
from opsa_jax.training.checkpoint import Checkpoints
from opsa_jax.training.loop import run_updates
from opsa_jax.training.setup import Run, prepare
from opsa_jax.training.state import student_params


def train(config: RunConfig) -> Path:
    """Run `config` from start to end, or from its last checkpoint with `resume`. Returns the run directory.

    Files: config.json (resolved config, hash, versions, command), metrics.jsonl, checkpoints/, results.json, evals/ (every scored
    response), plot.png and plot.svg, hf/ (the trained model in Hugging Face format).

    Raises:
        UserError: bad input, before anything is written.
    """
    console = Console(highlight=False, soft_wrap=True)
    resuming = rundir.check(config)
    run, state = prepare(config, console.print)
    folder = Path(config.out) if resuming else rundir.create(config)
    checkpoints = Checkpoints(folder / "checkpoints", config.train.keep)
    before = _evaluate(run, student_params(state, run.frozen), folder, "base", console)
    if checkpoints.latest is not None:
        state, place = checkpoints.restore(state)
        run.prompts.stream.restore(place["stream"])
        console.print(f"resume   from update {int(state.step)} of {run.total_updates}")
    state = run_updates(run, state, folder, checkpoints)
    checkpoints.close()
    params = student_params(state, run.frozen)
    if config.export.enabled:
        export(run, params, folder / "hf", console)
    after = _evaluate(run, params, folder, "trained", console)
    if before:
        rundir.write_json(folder / "results.json", {"base": before, "trained": after})
        console.print(results_table({"base": before, "trained": after}))
    console.print(f"plot     {plot_run(folder)}")
    return folder


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
    checkpoints = Checkpoints(folder / "checkpoints", config.train.keep)
    state, _ = checkpoints.restore(state)
    checkpoints.close()
    export(run, student_params(state, run.frozen), out, Console(highlight=False))


def _evaluate(run: Run, params: Params, folder: Path, name: str, console: Console) -> dict[str, Any]:
    """Results of the suite, kept in evals/NAME.json so that a resumed run does not measure twice; empty without a suite."""
    suite = run.config.evals.suite
    saved = folder / "evals" / f"{name}.json"
    if not suite:
        return {}
    if saved.is_file():
        return json.loads(saved.read_text())
    console.print(f"evaluate {name} model: suite {suite}")
    with jax.set_mesh(run.mesh):
        results, transcripts = evaluate(params, run.student.cfg, run.chat, run.config.evals, seed=run.config.seed)
    write_jsonl(saved.with_suffix(".jsonl"), transcripts)
    rundir.write_json(saved, results)
    return results


def export(run: Run, params: Params, folder: Path, console: Console) -> None:
    """The trained model as a Hugging Face checkpoint, or its adapter in PEFT's layout. A complete one from before is kept."""
    if folder.exists():
        return
    config, student = run.config, run.student
    dtype = hf.checkpoint_dtype(student.folder) if config.export.dtype == "auto" else config.export.dtype
    if params.layers.lora is not None and not config.export.merge_lora:
        lora.save_adapter(params.layers.lora, student.cfg, config.model.lora, folder, config.model.path)
    else:
        hf.save_params(lora.merge(params), student.cfg, folder, dtype, student.raw, tokenizer_from=student.folder)
    console.print(f"export   {folder} ({dtype})")
