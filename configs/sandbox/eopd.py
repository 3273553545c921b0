"""EOPD (arXiv 2603.07079) on the embedded sandbox: reverse-KL policy gradient on all tokens, and forward KL on the teacher's top k where
its entropy is at least 0.8 nats.

Command:  python -m opsa_jax.train configs/sandbox/eopd.py
Devices:  2 CPU cores, about two minutes
"""

from dataclasses import replace

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    base = c.RunConfig()
    return replace(
        base,
        out="runs/sandbox-eopd",
        objective=c.ObjectiveConfig(
            loss="policy",
            divergence="forward",
            support="teacher_topk",
            k=16,
            entropy_floor=0.8,
            policy=c.PolicyConfig(advantage="teacher", clip=0.2, divergence=1.0),
        ),
    )
