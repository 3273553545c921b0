"""COPSD stage 2 (arXiv 2606.03089) on the embedded sandbox: distillation from the calibrated teacher under a constitution.

Prepare:  configs/sandbox/copsd_teacher.py
Command:  python -m opsa_jax.train configs/sandbox/copsd.py
Devices:  2 CPU cores, about four minutes
Variants: --objective.policy.advantage token (released code), outcome (hybrid with a refusal reward); the exact form is
          --objective.loss divergence --objective.divergence reverse --rollout.samples-per-prompt 1.
"""

from dataclasses import replace

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    base = c.RunConfig()
    return replace(
        base,
        out="runs/sandbox-copsd",
        teacher=c.TeacherConfig(
            weights="checkpoint", path="runs/sandbox-copsd-teacher/hf", constitution="@sandbox", constitution_share=0.85
        ),
        rollout=replace(base.rollout, samples_per_prompt=8),
        objective=c.ObjectiveConfig(
            loss="policy", divergence="reverse", policy=c.PolicyConfig(advantage="return", clip=0.2, reference_kl=0.005)
        ),
        train=replace(base.train, prompts_per_rollout=16, update_batch=64),
    )
