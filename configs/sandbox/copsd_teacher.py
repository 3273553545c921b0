"""COPSD stage 1 (arXiv 2606.03089) on the embedded sandbox: Cross-SFT of a copy of the base, constitution always in the input.

Prepare:  python -m opsa_jax.answers cross --out runs/cross.jsonl
Command:  python -m opsa_jax.train configs/sandbox/copsd_teacher.py          (then configs/sandbox/copsd.py)
Devices:  2 CPU cores, about a minute
"""

from dataclasses import replace

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    base = c.RunConfig()
    return replace(
        base,
        out="runs/sandbox-copsd-teacher",
        data=c.DataConfig(sources=(c.SourceConfig(path="runs/cross.jsonl"),), long_prompts="skip"),
        rollout=c.RolloutConfig(writer="file"),
        objective=c.ObjectiveConfig(loss="nll"),
        optim=replace(base.optim, lr=1e-4),
        train=replace(base.train, steps=0, epochs=2),
    )
