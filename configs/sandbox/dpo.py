"""DPO (arXiv 2305.18290) on the embedded sandbox: refusal over compliance for harmful prompts, help over refusal for benign ones.

Prepare:  python -m opsa_jax.answers pairs --out runs/pairs.jsonl
Command:  python -m opsa_jax.train configs/sandbox/dpo.py
Devices:  2 CPU cores, about a minute
"""

from dataclasses import replace

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    base = c.RunConfig()
    return replace(
        base,
        out="runs/sandbox-dpo",
        data=c.DataConfig(sources=tuple(c.SourceConfig(path="runs/pairs.jsonl", where=f"label={x}") for x in ("harmful", "benign"))),
        rollout=c.RolloutConfig(writer="file", samples_per_prompt=2),
        objective=c.ObjectiveConfig(loss="dpo", dpo_beta=0.1),
        optim=replace(base.optim, lr=1e-4),
        train=replace(base.train, update_batch=64),
    )
