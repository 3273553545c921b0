"""On-policy distillation from another checkpoint without a context, on the embedded sandbox.

Prepare:  python -m opsa_jax.train                            (the teacher: runs/sandbox-opsa/hf)
Command:  python -m opsa_jax.train configs/sandbox/external_opd.py
Devices:  2 CPU cores, about two minutes
"""

from dataclasses import replace

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    base = c.RunConfig()
    teacher = c.TeacherConfig(weights="checkpoint", path="runs/sandbox-opsa/hf", context_harmful="", context_benign="")
    return replace(base, out="runs/sandbox-external-opd", teacher=teacher)
