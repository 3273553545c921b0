"""Outcome rewards: a number per finished response, from its text (COPSD's hybrid advantage, arXiv 2606.03089)."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from opsa_jax.config import RunConfig
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError
from opsa_jax.evals.scorers import refused

Reward = Callable[[Record, str], float]


def load_reward(config: RunConfig) -> Reward:
    """The configured reward function (record, decoded response) -> float.

    Raises:
        UserError: no such file or function.
    """
    name = config.objective.policy.reward
    if name == "refusal":
        phrases = config.evals.refusal_phrases
        return lambda record, response: 1.0 if refused(response, phrases) == (record.label == "harmful") else -1.0
    file, _, function = name.rpartition(":")
    if not file or not Path(file).is_file():
        raise UserError(f"--objective.policy.reward {name!r}: must be refusal, or FILE.py:FUNCTION with an existing file")
    spec = importlib.util.spec_from_file_location("reward", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise UserError(f"--objective.policy.reward {name!r}: {file} has no function {function!r}")
    return getattr(module, function)
