"""The OPSA loss on responses that the teacher writes, on the embedded sandbox: separates on-policy from the loss.

Command:  python -m opsa_jax.train configs/sandbox/offpolicy_kl.py
Devices:  2 CPU cores, about two minutes
Variant:  fixed answers instead: --rollout.writer file --data.sources.0.path runs/self.jsonl --data.sources.1.path runs/self.jsonl
"""

from dataclasses import replace

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    base = c.RunConfig()
    return replace(base, out="runs/sandbox-offpolicy-kl", rollout=replace(base.rollout, writer="teacher"))
