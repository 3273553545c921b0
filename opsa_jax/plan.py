"""Does a run fit, and what bounds it? `python -m opsa_jax.plan [recipe.py] --topology v5e:16x16`, before anyone pays for the machine."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Literal

from opsa_jax.cli import entry, parse
from opsa_jax.config import RunConfig
from opsa_jax.errors import UserError

DESCRIPTION = """\
Compile a run ahead of time for devices that need not be here, and say whether it fits. Usage: plan [recipe.py] --topology NAME [...]

TPU slices are compiled for by TPU's own compiler (pip install 'opsa_jax[tpu]'; any Linux machine), from shapes alone: no weights, no
data. The model is --model.path: a preset (qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen3-8b, qwen3-30b-a3b,
qwen3-30b-a3b-2507, r1-distill-qwen-1.5b, r1-distill-llama-8b, qwen2.5-7b, llama-3-8b, llama-3.2-3b), a hub name, or a folder with
config.json. Exit code 0: it fits; 1: it does not; 2: bad input."""


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """A run, as for `train`, and what to compile it for."""

    topology: str = ""
    """v5e:4x4, v5p:2x2x1, v6e:8x8 and the like; cpu:8 for that many CPU devices; gpu for those of this machine."""
    json: bool = False
    """Print one JSON object instead of tables."""
    programs: tuple[Literal["rollout", "score", "update"], ...] = ()
    """Programs to compile; empty is all that the run has."""
    search: bool = False
    """Try meshes, remat policies and micro-batches instead of those of the run, and rank the ones that fit."""
    search_limit: int = 6
    """Candidates to find that fit, the most promising first; at most four times as many are compiled."""


def main(argv: list[str] | None = None) -> int:
    from opsa_jax.recipes import take_recipe, validate

    argv = list(sys.argv[1:] if argv is None else argv)
    base = take_recipe(argv)
    config = parse(PlanConfig, PlanConfig(**vars(base)), argv, "python -m opsa_jax.plan", DESCRIPTION)
    validate(config)
    if not config.topology:
        raise UserError("--topology is missing: a TPU slice such as v5e:4x4, v5p:2x2x1 or v6e:8x8, cpu:8, or gpu")
    if config.search_limit < 1:
        raise UserError(f"--search-limit {config.search_limit}: must be at least 1")
    return run(config)


def run(config: PlanConfig) -> int:
    """Compile, show, and return 0 where the run fits and 1 where it does not.

    Raises:
        UserError: unknown topology, libtpu missing, a mesh that does not divide, prompts without a room.
    """
    from opsa_jax.parallel import xla_flags
    from opsa_jax.parallel.topology import get_topology

    xla_flags.set_flags()
    topology = get_topology(config.topology)  # before anything starts jax
    from rich.console import Console

    from opsa_jax.planning.planner import make_plan
    from opsa_jax.planning.report import show, verdict
    from opsa_jax.planning.search import search

    console, progress = (Console(highlight=False, stderr=stderr, soft_wrap=True, width=160) for stderr in (False, True))
    if config.search:
        plans = search(config, topology, config.search_limit, progress.print)
    else:
        plans = [make_plan(config, topology, config.programs, progress.print)]
    best = plans[0]
    if config.json:
        ranked = {"ranking": [_choice(p) for p in plans]} if config.search else {}
        print(json.dumps(best.to_json() | ranked))
        return 0 if best.fits else 1
    show(best, console)
    if config.search:
        console.print("\nranking   (mesh data,fsdp,tensor; micro-batch; remat)")
        for plan in plans:
            choice = _choice(plan)
            at_least = "" if choice["step_seconds_at_least"] is None else f", step >= {choice['step_seconds_at_least']:.2f} s"
            console.print(f"  {choice['mesh']}  micro {choice['micro_batch']}  {choice['remat']:4s}  {verdict(plan)}{at_least}")
    return 0 if best.fits else 1


def _choice(plan) -> dict:
    c = plan.shapes.config
    return {
        "mesh": ",".join(map(str, dataclasses.astuple(c.mesh))),
        "micro_batch": c.train.micro_batch or c.train.update_batch,
        "remat": c.model.remat,
        "fits": plan.fits,
        "hbm_peak_bytes": plan.peak,
        "step_seconds_at_least": plan.step_seconds,
    }


if __name__ == "__main__":
    raise SystemExit(entry(main))
