"""SafeSteer (arXiv 2606.02530) on the embedded sandbox: a steered teacher, divergence on 50 safety tokens, harmful prompts only.

Prepare:  python -m opsa_jax.steer --out runs/steer            (direction.safetensors and tokens.json; under a minute)
Command:  python -m opsa_jax.train configs/sandbox/safesteer.py
Devices:  2 CPU cores, about a minute
Expected: docs/science.md. The published partial sum (--objective.subset raw) raises ASR here, since its least point is q / e; the
          generalised sum on the same tokens brings it down. Without benign prompts look-alikes are refused as well; with the default
          prompts (--data.sources.0.where '' trains on both labels) less so.
"""

from dataclasses import replace

from opsa_jax import config as c


def get_config() -> c.RunConfig:
    base = c.RunConfig()
    return replace(
        base,
        out="runs/sandbox-safesteer",
        teacher=c.TeacherConfig(
            context_harmful="", context_benign="", steering="runs/steer/direction.safetensors", steering_coefficient=1.5
        ),
        data=c.DataConfig(sources=(c.SourceConfig(where="label=harmful"),)),
        objective=c.ObjectiveConfig(
            divergence="reverse", support="tokens", tokens="runs/steer/tokens.json", subset="generalised", reduction="sequence_mean"
        ),
    )
