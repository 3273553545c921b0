"""Off-policy self-distillation (ThinkSafe, arXiv 2601.23143) on the embedded sandbox: SFT on the model's own filtered answers.

Prepare:  python -m opsa_jax.answers self --out runs/self.jsonl
Command:  python -m opsa_jax.train configs/sandbox/offpolicy_self.py
Devices:  2 CPU cores, under a minute
"""

from dataclasses import replace

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    base = c.RunConfig()
    return replace(
        base,
        out="runs/sandbox-offpolicy-self",
        data=c.DataConfig(sources=tuple(c.SourceConfig(path="runs/self.jsonl", where=f"label={x}") for x in ("harmful", "benign"))),
        rollout=c.RolloutConfig(writer="file"),
        objective=c.ObjectiveConfig(loss="nll"),
    )
