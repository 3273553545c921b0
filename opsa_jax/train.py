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
Every field below can be set on the command line; --print-config shows the resolved run and stops."""


def main(argv: list[str] | None = None) -> int:
    config, only_print = parse_run(sys.argv[1:] if argv is None else argv, "python -m opsa_jax.train", DESCRIPTION)
    if only_print:
        print(json.dumps(to_dict(config), indent=2))
        return 0
    # jax and the model code are imported only now: --help and mistakes in flags answer at once.
    from opsa_jax.session import train

    train(config)
    return 0


if __name__ == "__main__":
    raise SystemExit(entry(main))
