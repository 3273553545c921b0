"""Running, resuming and reporting the runs of `python -m opsa_jax.compare`.

Nothing is trained before every run is known to be well formed.
"""

import contextlib
import csv
import dataclasses
import gc
import hashlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from opsa_jax.analysis import tradeoff
from opsa_jax.analysis.tradeoff import Choice
from opsa_jax.config import RunConfig
from opsa_jax.errors import UserError
from opsa_jax.recipes import config_hash, to_dict
from opsa_jax.stages.compare_plan import Planned, plan

if TYPE_CHECKING:
    from opsa_jax.compare import CompareConfig


def compare(config: "CompareConfig", shared: Sequence[str] = ()) -> list[dict]:
    """Run what is missing, and write tables and plots. Returns the finished rows.

    Args:
        shared: flags of `train` for all arms.

    Raises:
        UserError: before anything is written, bad input; at the end, runs that failed, by name.
    """
    out, choice = Path(config.out), Choice(config.safety, config.capability, config.over_refusal)
    console = Console(highlight=False, soft_wrap=True)
    if config.plot_only:
        rows = read_rows(out)
        report(rows, choice, config.levels, out, console)
        return rows
    plans = plan(config, shared)
    if out.exists() and not config.resume and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists; continue it with --resume, or choose another --out")
    check_suites(plans, choice)
    check_existing(plans)
    out.mkdir(parents=True, exist_ok=True)
    keep_programs()
    rows = run_all(plans, choice, out, config.checkpoints == "drop", console)
    done = [r for r in rows if r["status"] == "done"]
    if done:
        report(done, choice, config.levels, out, console)
    if failed := [r for r in rows if r["status"] == "failed"]:
        reasons = "; ".join(f"{r['run']}: {r['error'].rstrip('.')}" for r in failed)
        raise UserError(f"{len(failed)} of {len(rows)} runs failed: {reasons} (--resume tries them again)")
    return done


def check_suites(plans: Sequence[Planned], choice: Choice) -> None:
    """The chosen metrics are in the suites.

    Raises:
        UserError: no suite, or one without a chosen metric.
    """
    from opsa_jax.evals.suite import load_suite

    for suite in dict.fromkeys(p.config.evals.suite for p in plans):
        if not suite:
            raise UserError("an arm has no --evals.suite; without one there is nothing to compare")
        choice.check({r.extra["metric"] for r in load_suite(suite)}, f"suite {suite}")


def check_existing(plans: Sequence[Planned]) -> None:
    """Runs that are there were made with the settings they have now (one that has not trained yet may change).

    Raises:
        UserError: naming the run and the first setting that differs.
    """
    from opsa_jax.training.rundir import saved_config

    for p in plans:
        if not (p.folder / "metrics.jsonl").exists() and not (p.folder / "results.json").exists():
            continue
        saved = saved_config(p.folder)
        if config_hash(saved) != config_hash(p.config):
            before, now = _flat(to_dict(saved)), _flat(to_dict(p.config))
            name = next(n for n in now if before.get(n) != now[n] and not n.startswith(("out", "resume", "log.")))
            raise UserError(f"{p.folder} was run with {name}={before.get(name)!r}, now {now[name]!r}; remove it, or choose another --out")


def _flat(d: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in d.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def keep_programs() -> None:
    """Runs that differ in their data only share compiled programs, also over processes; a cache that the user has set is left alone."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opsa_jax" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def run_all(plans: Sequence[Planned], choice: Choice, out: Path, drop: bool, console: Console) -> list[dict]:
    """One after another; `results.jsonl` is written after each. Returns rows with status done or failed."""
    rows: list[dict] = []
    for number, p in enumerate(plans, 1):
        start, before = time.monotonic(), (p.folder / "results.json").is_file()
        error = None if before else run_one(p, out)
        rows.append(row_of(p, error))
        if drop and error is None:
            shutil.rmtree(p.folder / "checkpoints", ignore_errors=True)
        write_lines(out / "results.jsonl", rows)
        what = f"failed: {error}" if error else _short(rows[-1], choice)
        spent = "done before" if before else f"{time.monotonic() - start:.0f} s"
        console.print(f"[{number}/{len(plans)}] {p.name}  {what}  {spent}", markup=False)
        gc.collect()
    return rows


def _short(row: dict, choice: Choice) -> str:
    v = tradeoff.values_of(row, choice)
    change, over = v["capability_delta"], v["over_refusal"]
    return f"safety {v['safety']:.3f}  capability {v['capability']:.3f} ({change:+.3f})  over-refusal {over:.3f}"


def run_one(p: Planned, out: Path) -> str | None:
    """Train and evaluate, from where the run was stopped. What it prints goes to log.txt. Returns the reason if it failed."""
    from opsa_jax import session
    from opsa_jax.training import rundir

    # Not trained yet: its settings may have changed since, so it begins anew.
    if not (p.folder / "metrics.jsonl").exists():
        shutil.rmtree(p.folder, ignore_errors=True)
    if not (p.folder / "config.json").exists():
        rundir.create(p.config)
    base = out / "bases" / f"{base_key(p.config)}.json"
    evals = p.folder / "evals" / "base.json"
    if base.is_file() and not evals.is_file():
        copy_evaluation(base, evals)
    try:
        with (p.folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
            try:
                session.train(p.config)
            except UserError as e:
                return " ".join(str(e).split())
            except Exception as e:
                # A long comparison does not stop for one run, whatever it died of; the log has the rest.
                traceback.print_exc(file=log)
                return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]} ({p.folder / 'log.txt'})"
    finally:
        if evals.is_file() and not base.is_file():
            copy_evaluation(evals, base)
    return None


def base_key(config: RunConfig) -> str:
    """What the base model's evaluation depends on: model, suite and sampling; the seed only where sampling is random."""
    model = {k: v for k, v in to_dict(config)["model"].items() if k not in ("lora", "remat", "scan_unroll", "attention")}
    parts = [model, config.model.lora.rank > 0, to_dict(config)["evals"], config.seed if config.evals.temperature > 0 else None]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def copy_evaluation(source: Path, target: Path) -> None:
    """results (.json) and responses (.jsonl); the results last and in one go, since their presence says that all is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.with_suffix(".jsonl").is_file():
        shutil.copyfile(source.with_suffix(".jsonl"), target.with_suffix(".jsonl"))
    temporary = target.with_suffix(".tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def row_of(p: Planned, error: str | None) -> dict:
    row = {"arm": p.arm, "base": p.base, "steps": p.steps, "seed": p.seed, "run": p.name, "config_hash": config_hash(p.config)}
    if error is not None:
        return row | {"status": "failed", "error": error}
    results = json.loads((p.folder / "results.json").read_text())
    return row | {"status": "done", "metrics": results["trained"], "base_metrics": results["base"]}


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    temporary.replace(path)


def read_rows(out: Path) -> list[dict]:
    """Finished rows of a comparison.

    Raises:
        UserError: there are none.
    """
    file = out / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    if not (rows := [r for r in rows if r["status"] == "done"]):
        raise UserError(f"--plot-only: {file} has no finished runs; run the comparison first, or name its folder with --out")
    return rows


def report(rows: Sequence[dict], choice: Choice, levels: Sequence[float], out: Path, console: Console) -> None:
    """table.json, summary.md, summary.csv, matched.md where arms have several lengths, and the plots.

    Raises:
        UserError: a chosen metric that the results do not have.
    """
    from opsa_jax.analysis.tradeoff_plot import plot_tradeoff
    from opsa_jax.training.rundir import write_json

    for row in rows:
        choice.check(row["metrics"], row["run"])
    summary = tradeoff.summarise(rows, choice)
    several = len({r["steps"] for r in rows}) > 1
    matched = tradeoff.match(rows, choice, levels) if several else []
    pairs = tradeoff.paired(rows, choice)
    tables = {"summary": summary, "paired": pairs, "matched": matched}
    write_json(out / "table.json", {"choice": dataclasses.asdict(choice), **tables, "runs": list(rows)})
    columns, counts = tradeoff.summary_columns(summary, choice.safety), tradeoff.pooled_columns(summary)
    differences = (
        "\nDifferences between arms, run by run (same base, seed and steps), averaged over steps; 95 % t interval over bases and seeds,\n"
        f"not corrected for the number of pairs.\n\n{tradeoff.markdown(*tradeoff.paired_columns(pairs))}"
    )
    (out / "summary.md").write_text(
        f"Safety is 1 - the mean of {', '.join(choice.safety)}. Mean over runs (seeds and bases) with the 95 % t interval over runs;\n"
        "it has no width where all runs agree, and then the counts below say how much that is worth.\n\n"
        f"{tradeoff.markdown(*columns)}\nCounts of all runs added up, with Wilson's 95 % interval.\n\n{tradeoff.markdown(*counts)}"
        + (differences if pairs else "")
    )
    with (out / "summary.csv").open("w", newline="") as f:
        lines = tradeoff.csv_rows(summary)
        writer = csv.DictWriter(f, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    console.print(tradeoff.rich_table("mean over runs and 95 % interval", *tradeoff.summary_columns(summary)))
    if matched:
        columns = tradeoff.match_columns(matched)
        (out / "matched.md").write_text(
            "Arms where they first reach a safety level, interpolated between runs of different length (0 steps is the base model);\n"
            "mean and 95 % t interval over the sequences that reach it.\n\n" + tradeoff.markdown(*columns)
        )
        console.print(tradeoff.rich_table("at equal safety", *columns))
    console.print(f"plot     {plot_tradeoff(rows, choice, out)}")
