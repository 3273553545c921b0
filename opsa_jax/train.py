"""Train a model by on-policy distillation: `python -m opsa_jax.train [recipe.py] [--section.field value ...]`.

Without a recipe it runs OPSA on the embedded sandbox: a tiny language model of a fictional world learns to refuse forbidden requests.
"""

import json
import sys

from opsa_jax.cli import entry
from opsa_jax.recipes import parse_run, to_dict

DESCRIPTION = """\
Train a model by on-policy distillation. Usage: train [recipe.py] [--section.field value ...] [--print-config]

A recipe is a Python file with get_config() -> RunConfig (see configs/). Without one, OPSA runs on the embedded sandbox.
Every field below can be set on the command line; --print-config shows the resolved run and stops.

Exit codes: 0 done; 2 bad input; 69 another process of the run did not join or died; 75 preempted (SIGTERM or a maintenance notice):
the run is saved, and the same command with --resume goes on; 130 interrupted."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    config, only_print = parse_run(argv, "python -m opsa_jax.train", DESCRIPTION)
    if only_print:
        print(json.dumps(to_dict(config), indent=2))
        return 0
    # jax and the model code are imported only now: --help and mistakes in flags answer at once.
    from opsa_jax.parallel import distributed, supervisor, xla_flags

    xla_flags.set_flags()
    cluster = distributed.find(config.distributed)
    if cluster and not supervisor.is_worker():
        return supervisor.supervise("opsa_jax.train", argv, cluster, config.distributed)
    with distributed.running(config.distributed, cluster):
        from opsa_jax.session import train

        train(config)
    return 0


if __name__ == "__main__":
    raise SystemExit(entry(main))
