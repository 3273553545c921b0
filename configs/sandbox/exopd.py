"""ExOPD (the G-OPD line) on the embedded sandbox: the teacher's gain over the initial student, times 1.25, as the reward.

Command:  python -m opsa_jax.train configs/sandbox/exopd.py
Devices:  2 CPU cores, about two minutes
"""

from dataclasses import replace

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    base = c.RunConfig()
    objective = c.ObjectiveConfig(loss="policy", policy=c.PolicyConfig(advantage="exopd", exopd_lambda=1.25, clip=0.2))
    return replace(base, out="runs/sandbox-exopd", objective=objective)
