"""REOPOLD (arXiv 2603.11137) on the embedded sandbox: rewards with a floor; in the second half only tokens of high student entropy.

Command:  python -m opsa_jax.train configs/sandbox/reopold.py
Devices:  2 CPU cores, about two minutes
"""

from dataclasses import replace

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    base = c.RunConfig()
    objective = c.ObjectiveConfig(
        loss="policy",
        weights=c.WeightConfig(kind="entropy", keep=0.5, after=0.5),
        policy=c.PolicyConfig(advantage="floor", floor_lambda=0.2, clip=0.2),
    )
    return replace(base, out="runs/sandbox-reopold", objective=objective)
