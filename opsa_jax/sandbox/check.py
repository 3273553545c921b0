"""Does a base model have the properties the sandbox needs? The evaluation suite, greedily, without and with each named context."""

import json
from pathlib import Path

from opsa_jax.config import EvalConfig
from opsa_jax.data.chat import Chat
from opsa_jax.evals.runner import evaluate
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params

GATES = {"capability": 0.97, "asr_seen": 0.85}
"""Lowest rates of a base that may be shipped."""


def table(params: Params, cfg: DecoderConfig, chat: Chat, data: Path) -> tuple[str, list[str]]:
    """One row per metric, one column per context; and one phrase for each gate that fails."""
    contexts = {"none": ""}
    for line in (data / "contexts.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["name"].startswith("sandbox-"):
            contexts[row["name"].removeprefix("sandbox-")] = row["text"]
    evals = EvalConfig(suite=str(data / "eval.jsonl"), temperature=0.0)
    rates = {
        name: {metric: value["rate"] for metric, value in evaluate(params, cfg, chat, evals, context=text)[0].items()}
        for name, text in contexts.items()
    }
    lines = [f"{'':20s}" + "".join(f"{name:>9s}" for name in rates)]
    lines += [f"{metric:20s}" + "".join(f"{r[metric]:9.3f}" for r in rates.values()) for metric in rates["none"]]
    failed = [f"{name} {rates['none'][name]:.3f} is below {gate}" for name, gate in GATES.items() if rates["none"][name] < gate]
    return "\n".join(lines), failed
