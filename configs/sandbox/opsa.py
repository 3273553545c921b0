"""OPSA (arXiv 2605.15239) on the embedded sandbox; the same run as `python -m opsa_jax.train` without a recipe.

Command:  python -m opsa_jax.train configs/sandbox/opsa.py
Devices:  2 CPU cores, about two minutes (training and both evaluations)
Data:     embedded: 16 harmful and 16 benign prompts per update, labels only
Expected: attack success rate on seen categories from about 0.9 to 0, capability and over-refusal unchanged (BUILD_NOTES.md has the runs)
"""

from opsa_jax.config import RunConfig


def get_config() -> RunConfig:
    return RunConfig()
