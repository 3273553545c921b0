"""Who supervises a run and what they see: teachers, contexts, steering, token set; and what identifies each of them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from opsa_jax.config import RunConfig
from opsa_jax.data.chat import Chat, check_same_tokens
from opsa_jax.data.records import Record
from opsa_jax.errors import UserError, did_you_mean
from opsa_jax.models.config import DecoderConfig
from opsa_jax.objectives.objective import needs_teacher
from opsa_jax.teachers.constitution import load_constitution
from opsa_jax.teachers.contexts import resolve_context
from opsa_jax.teachers.safety_tokens import load_tokens
from opsa_jax.teachers.steering import load_steering


def teacher_paths(config: RunConfig) -> tuple[str, ...]:
    """Checkpoints to load as teachers, in the order of their routes; none where the teacher is made of the student, or none is needed."""
    if not needs_teacher(config.objective) and config.rollout.writer != "teacher":
        return ()
    if config.teacher.routes:
        return tuple(r.partition("=")[2] for r in config.teacher.routes)
    return (config.teacher.path,) if config.teacher.weights == "checkpoint" else ()


def route_of(config: RunConfig) -> Callable[[Record], int]:
    """Record -> index of its teacher.

    Raises:
        UserError: (from the function) a record that names no teacher of the run.
    """
    names = [r.partition("=")[0] for r in config.teacher.routes]
    if not names:
        return lambda record: 0

    def route(record: Record) -> int:
        if record.teacher not in names:
            what = f"teacher {record.teacher!r}" if record.teacher else "no teacher"
            hint = did_you_mean(record.teacher, names) if record.teacher else ""
            raise UserError(
                f"record {record.id!r} of {record.source}, line {record.line}, names {what}; --teacher.routes has {', '.join(names)}{hint}"
            )
        return names.index(record.teacher)

    return route


def check_routes(chat: Chat, paths: tuple[str, ...], load: Callable[[str], Chat]) -> None:
    """All teachers must share the student's tokenizer.

    Raises:
        UserError: one does not.
    """
    for path in paths:
        check_same_tokens(chat, load(path))


@dataclass(frozen=True)
class Contexts:
    """What the teacher sees besides the prompt."""

    of: Callable[[Record], str]
    identity: dict[str, str]
    """Name -> hash of the text, for the checkpoint."""


def load_contexts(config: RunConfig) -> Contexts:
    """Contexts by label (OPSA), or a constitution by category (COPSD).

    Raises:
        UserError: an unknown name, an unreadable or empty file; (from `of`) a category without a text.
    """
    teacher = config.teacher
    if teacher.constitution:
        constitution, masked = load_constitution(teacher.constitution), 1 - teacher.constitution_share
        identity = {"constitution": digest(repr(constitution).encode()), "share": str(teacher.constitution_share)}

        def of(record: Record) -> str:
            return constitution.texts([record], teacher.constitution_benign, masked=masked)[0]

        return Contexts(of, identity)
    texts = {"harmful": resolve_context(teacher.context_harmful), "benign": resolve_context(teacher.context_benign)}
    return Contexts(lambda record: texts[record.label], {label: digest(text.encode()) for label, text in texts.items()})


@dataclass(frozen=True)
class Artifacts:
    """Files made by the preparation stages."""

    steer_LD: jnp.ndarray | None
    tokens_K: jnp.ndarray | None
    identity: dict[str, Any]


def load_artifacts(config: RunConfig, cfg: DecoderConfig) -> Artifacts:
    """The direction and the token set that the config names.

    Raises:
        UserError: missing, empty or foreign files.
    """
    identity, steer_LD, tokens_K = {}, None, None
    if config.teacher.steering:
        steer_LD = load_steering(config.teacher.steering, cfg, config.teacher.steering_coefficient)
        coefficient = config.teacher.steering_coefficient
        identity["steering"] = {"file": config.teacher.steering, "hash": file_digest(config.teacher.steering), "coefficient": coefficient}
    if config.objective.support == "tokens":
        tokens_K = jnp.asarray(load_tokens(config.objective.tokens, cfg.vocab_size), jnp.int32)
        identity["tokens"] = {"file": config.objective.tokens, "hash": file_digest(config.objective.tokens), "count": int(tokens_K.size)}
    return Artifacts(steer_LD, tokens_K, identity)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def file_digest(path: str) -> str:
    return digest(Path(path).read_bytes())
