"""Run recipes side by side and draw the safety trade-off: `python -m opsa_jax.compare RECIPE ... --seeds 0 1 2`."""

import sys
from dataclasses import dataclass
from typing import Literal

import tyro

from opsa_jax.cli import entry, parse

DESCRIPTION = """\
Train several recipes (arms) over seeds, base models and lengths, and compare them: safety against capability and over-refusal.

  python -m opsa_jax.compare configs/sandbox/opsa.py \\
      weak=configs/sandbox/opsa.py,--teacher.context-harmful,@sandbox-weak --seeds 0 1 2 --out runs/contexts
  python -m opsa_jax.compare --arms arms.json --bases a=runs/base-a b=runs/base-b --steps 5 10 20 --resume -- --optim.lr 1e-4

An arm is [NAME=]RECIPE.py[,--flag,value ...]; a comma before -- begins the next flag. Arms stand before the flags of compare.
Flags after a lone -- go to all arms; an arm's own flags come after them and win. In both, {base} is the path of the base model,
{base_name} its name, {seed} the seed and {out} the value of --out, so that prepared files can be named by base.
--arms FILE is JSON: {"arms": {"weak": {"recipe": "configs/sandbox/opsa.py", "overrides": ["--teacher.context-harmful", "@sandbox-weak"]}}},
optionally with "overrides" for all arms. Paths are relative to the working directory.

Writes OUT/runs/ARM/BASE/stepsN-seedS (run directories; log.txt is what the run printed), results.jsonl (a run per line), table.json,
summary.md (means, counts, and the differences of every two arms on the same base, seed and steps), summary.csv, tradeoff.png and .svg,
and with several --steps matched.md: arms at equal safety. A run that fails is reported, the others go on, and the exit code is 2. After
a kill or Ctrl-C the same command with --resume continues."""


@dataclass(frozen=True)
class CompareConfig:
    recipes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Arms: [NAME=]RECIPE.py[,--flag,value ...]; the name is that of the file where none is given."""
    arms: str = ""
    """JSON file with more arms."""
    out: str = "runs/compare"
    """Output folder; it must not exist, unless --resume continues it."""
    resume: bool = False
    """Continue in the output folder: finished runs are kept, unfinished and failed ones go on. Arms, seeds, bases and
    steps may be added; the tables show the runs that the command names."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every arm."""
    bases: tuple[str, ...] = ()
    """Base models that every arm starts from, [NAME=]PATH; empty takes each recipe's own --model.path."""
    steps: tuple[int, ...] = ()
    """Lengths (--train.steps), each a run with its own schedule; empty takes each recipe's own."""
    safety: tuple[str, ...] = ("asr_seen", "asr_heldout", "asr_jailbreak")
    """Attack metrics of the suite; safety is 1 - their mean."""
    capability: str = "capability"
    """Metric of the capability axis."""
    over_refusal: str = "over_refusal"
    """Metric of the over-refusal axis."""
    levels: tuple[float, ...] = (0.8, 0.9, 0.95)
    """Safety levels of matched.md."""
    export: bool = False
    """Also write the Hugging Face checkpoint of every run."""
    checkpoints: Literal["keep", "drop"] = "keep"
    """drop removes the checkpoints of a run once its results are written."""
    plot_only: bool = False
    """Run nothing; draw and tabulate OUT/results.jsonl again (with other --safety, --levels)."""


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    shared: list[str] = []
    if "--" in argv:
        cut = argv.index("--")
        argv, shared = argv[:cut], argv[cut + 1 :]
    config = parse(CompareConfig, None, argv, "python -m opsa_jax.compare", DESCRIPTION)
    from opsa_jax.stages.compare import compare

    compare(config, shared)
    return 0


if __name__ == "__main__":
    raise SystemExit(entry(main))
