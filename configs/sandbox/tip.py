"""TIP (arXiv 2604.14084) on the embedded sandbox: reverse KL on the half of the tokens where student entropy or divergence is highest.

Command:  python -m opsa_jax.train configs/sandbox/tip.py
Devices:  2 CPU cores, about two minutes
"""

from dataclasses import replace

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    base = c.RunConfig()
    objective = c.ObjectiveConfig(divergence="reverse", weights=c.WeightConfig(kind="tip", keep=0.5))
    return replace(base, out="runs/sandbox-tip", objective=objective)
