"""Models that write for an attack: a checkpoint run here, or an endpoint. Both take `Ask`s and give `Reply`s, and keep them on disk."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from opsa_jax.data.chat import Chat
from opsa_jax.evals.endpoint import Ask, Reply
from opsa_jax.evals.scorers import strip_thinking
from opsa_jax.models.config import DecoderConfig
from opsa_jax.models.params import Params
from opsa_jax.rollout.engine import Engine
from opsa_jax.rollout.filters import Sampling
from opsa_jax.rollout.rows import RowFile
from opsa_jax.rollout.sampler import id_numbers, row_keys


class Writer(Protocol):
    """`evals.endpoint.Endpoint` is one."""

    def ask(self, asks: Sequence[Ask]) -> list[Reply]: ...


class EngineWriter:
    """A checkpoint as a writer. The messages of an ask are a user's text, or a system message and a user's text.

    Args:
        cache: file of finished replies (rows.RowFile), continued where it exists; None keeps none.
        name: what identifies the checkpoint, for the file.
    """

    def __init__(
        self, params: Params, cfg: DecoderConfig, chat: Chat, max_new_tokens: int = 512, temperature: float = 1.0, batch: int = 32,
        seed: int = 0, cache: Path | None = None, name: str = "",
    ):  # fmt: skip
        self._chat, self._seed = chat, seed
        self._engine = Engine(params, cfg, Sampling(temperature=temperature), chat.stop_ids, max_new_tokens, batch)
        self._rows, self._known = None, {}
        if cache is not None:
            settings = {"attacker": name, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
            self._rows = RowFile(cache, settings, resume=True)
            found = map(json.loads, cache.read_text(encoding="utf-8").splitlines())
            self._known = {(r["id"], r["sample"]): Reply(r["text"], r["finished"]) for r in found}

    def ask(self, asks: Sequence[Ask]) -> list[Reply]:
        keys = [(_key(a), a.sample) for a in asks]
        missing = {k: a for k, a in zip(keys, asks, strict=True) if k not in self._known}
        names, prompts = list(missing), [self._prompt(a) for a in missing.values()]
        if names:
            numbers_N = id_numbers(key for key, _ in names)
            keys_N = row_keys(jax.random.key(self._seed), "attacker", 0, numbers_N, np.array([s for _, s in names], np.int32))
            opened = self._chat.opening().rstrip().endswith("<think>")
            for i, response in self._engine.stream(prompts, keys_N):
                # What the writer thinks is none of the attack's business.
                text = strip_thinking(self._chat.decode_response(response.ids.tolist()), opened)[0]
                self._keep(names[i], Reply(text, response.finished))
        return [self._known[k] for k in keys]

    def _prompt(self, ask: Ask) -> list[int]:
        texts = {m["role"]: m["content"] for m in ask.messages}
        return self._chat.encode(texts["user"], system=texts.get("system", ""))

    def _keep(self, name: tuple[str, int], reply: Reply) -> None:
        self._known[name] = reply
        if self._rows is not None:
            self._rows.append({"id": name[0], "sample": name[1], "text": reply.text, "finished": reply.finished})


def _key(ask: Ask) -> str:
    return hashlib.sha256(json.dumps([dict(m) for m in ask.messages]).encode()).hexdigest()[:24]
