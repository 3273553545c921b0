"""FiRe-OPD (arXiv 2606.02684) on the embedded sandbox: trajectories filtered, tokens reweighted, sampled policy gradient.

Command:  python -m opsa_jax.train configs/sandbox/fire.py
Devices:  2 CPU cores, about two minutes
Teacher:  the frozen base under its contexts; any checkpoint with --teacher.weights checkpoint --teacher.path DIR, several with
          --teacher.routes NAME=DIR ... and a teacher field in the records.
Variants: --objective.loss divergence --objective.divergence reverse is the exact form; --objective.filter.kind none and
          --objective.weights.kind uniform leave a part out (filter none is also what the published code does).
"""

from dataclasses import replace

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    base = c.RunConfig()
    return replace(
        base,
        out="runs/sandbox-fire",
        objective=c.ObjectiveConfig(
            loss="policy",
            divergence="reverse",
            reduction="sequence_mean",
            weights=c.WeightConfig(kind="fire"),
            filter=c.FilterConfig(kind="teacher_logp", quantile=0.2),
            policy=c.PolicyConfig(advantage="teacher", clip=0.2),
        ),
    )
