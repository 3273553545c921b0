"""SFT on external answers, on the embedded sandbox: another voice, no thinking (the "external demonstrations" of the papers).

Command:  python -m opsa_jax.train configs/sandbox/sft.py
Devices:  2 CPU cores, under a minute
Expected: docs/science.md: safe, and dear: facts forgotten, answers shortened, look-alikes refused.
"""

from dataclasses import replace

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    base = c.RunConfig()
    return replace(
        base,
        out="runs/sandbox-sft",
        data=c.DataConfig(
            sources=tuple(c.SourceConfig(path="sandbox:external.jsonl", where=f"label={label}") for label in ("harmful", "benign"))
        ),
        rollout=c.RolloutConfig(writer="file"),
        objective=c.ObjectiveConfig(loss="nll"),
    )
