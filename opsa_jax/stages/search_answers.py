"""What models say during a context search: greedy replies, sampled once and kept in a file ever after."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsa_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from opsa_jax.data.chat import Chat
    from opsa_jax.data.records import Record
    from opsa_jax.models.config import DecoderConfig
    from opsa_jax.models.params import Params
    from opsa_jax.rollout.engine import Engine, Response
    from opsa_jax.search import SearchConfig


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint."""

    params: "Params"
    cfg: "DecoderConfig"
    chat: "Chat"

    @classmethod
    def load(cls, path: str, config: "SearchConfig", mesh: "Mesh") -> "Model":
        """From a checkpoint, with dtype, thinking and revision of the config (the revision belongs to `config.model` only).

        Raises:
            UserError: no such checkpoint, or no usable tokenizer in it.
        """
        from opsa_jax.config import ModelConfig
        from opsa_jax.data.chat import Chat
        from opsa_jax.models import hf
        from opsa_jax.training.setup import open_checkpoint

        revision = config.revision if path == config.model else "main"
        found = open_checkpoint(ModelConfig(path=path, revision=revision, compute_dtype=config.dtype), path)
        chat = Chat.load(str(found.folder), thinking=config.thinking)
        return cls(hf.load_params(found.folder, found.cfg, found.cfg.compute_dtype, mesh), found.cfg, chat)

    @property
    def opened(self) -> bool:
        """Whether the template's assistant opening ends inside a think block."""
        return self.chat.opening().rstrip().endswith("<think>")

    def engine(self, max_new_tokens: int, batch: int) -> "Engine":
        from opsa_jax.rollout.engine import Engine
        from opsa_jax.rollout.filters import Sampling

        return Engine(self.params, self.cfg, Sampling(temperature=0.0), self.chat.stop_ids, max_new_tokens, batch)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of rendered prompts.

        Raises:
            UserError: ids beyond the embedding, so the tokenizer is of another model.
        """
        prompts = [ids.tolist() for ids in self.chat.encode_texts(texts)]
        largest = max(map(max, prompts))
        if largest >= self.cfg.vocab_size:
            raise UserError(
                f"the tokenizer of {self.chat.path} gives id {largest}, but the model has only {self.cfg.vocab_size} embedding rows; "
                "use the tokenizer that belongs to the checkpoint"
            )
        return prompts


class Answers:
    """Answers of the searched model by context and prompt. A missing one is sampled; its row is on disk before the next is looked at."""

    def __init__(self, config: "SearchConfig", model: Model):
        from opsa_jax.rollout.rows import RowFile

        # What decides an answer besides context and prompt, which are its key.
        names = ("model", "revision", "placement", "thinking", "max_new_tokens")
        settings = {name: getattr(config, name) for name in names} | {"dtype": model.cfg.compute_dtype}
        path = Path(config.out) / "responses.jsonl"
        self._rows = RowFile(path, settings, config.resume)
        self._found = {row["id"]: row for row in _read(path)}
        self._model, self._placement = model, config.placement
        self._engine = model.engine(config.max_new_tokens, config.batch)

    def close(self) -> None:
        self._rows.close()

    def ensure(self, pairs: Sequence[tuple[str, "Record"]], title: str) -> None:
        """Sample what is missing of these (context, prompt) pairs, all in one stream: no slot waits for the end of a candidate."""
        by_key = {_key(context, r.system, r.prompt): (context, r) for context, r in pairs}
        missing = [(key, *pair) for key, pair in by_key.items() if key not in self._found]
        if not missing:
            return
        chat = self._model.chat
        prompts = self._model.encode([chat.render(r.prompt, context, self._placement, r.system) for _, context, r in missing])
        for n, response in _stream(self._engine, prompts, title, len(by_key)):
            key, context, record = missing[n]
            row = {"id": key, "sample": 0, "context": context, "label": record.label, "prompt_id": record.id, "prompt": record.prompt}
            text = chat.decode_response(response.ids.tolist())
            row |= {"response": text, "tokens": len(response.ids), "finished": response.finished}
            self._rows.append(row)
            self._found[key] = row

    def get(self, context: str, record: "Record") -> dict[str, Any]:
        """The row of an answer that was ensured."""
        return self._found[_key(context, record.system, record.prompt)]


def ask(requests: Sequence[str], config: "SearchConfig", searched: Model, mesh: "Mesh") -> list[str]:
    """Answer parts of the proposer's replies, in order; finished replies are kept in OUT/proposals.jsonl.

    The proposer is loaded for this call alone, unless it is the searched model.
    """
    from opsa_jax.evals.scorers import strip_thinking
    from opsa_jax.rollout.rows import RowFile

    path = Path(config.out) / "proposals.jsonl"
    rows = RowFile(path, {"proposer_tokens": config.proposer_tokens, "dtype": config.dtype, "thinking": config.thinking}, resume=True)
    try:
        found = {row["id"]: row for row in _read(path)}
        keys = [_key(config.proposer, text) for text in requests]
        missing = [(key, text) for key, text in zip(keys, requests, strict=True) if key not in found]
        if missing:
            model = searched if config.proposer == config.model else Model.load(config.proposer, config, mesh)
            prompts = model.encode([model.chat.render(text) for _, text in missing])
            engine = model.engine(config.proposer_tokens, config.batch)
            for n, response in _stream(engine, prompts, "proposer", len(requests)):
                reply = model.chat.decode_response(response.ids.tolist())
                answer, _ = strip_thinking(reply, model.opened)
                row = {"id": missing[n][0], "sample": 0, "proposer": config.proposer, "request": missing[n][1], "reply": reply}
                rows.append(row | {"answer": answer})
                found[missing[n][0]] = row | {"answer": answer}
        return [found[key]["answer"] for key in keys]
    finally:
        rows.close()


def _stream(engine: "Engine", prompts: list[list[int]], title: str, total: int) -> Iterator[tuple[int, "Response"]]:
    """The engine's responses as they end, under a progress bar that starts at what was there before."""
    import jax
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    keys_N = jax.random.split(jax.random.key(0), len(prompts))  # greedy: never used
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, completed=total - len(prompts))
        for found in engine.stream(prompts, keys_N):
            yield found
            progress.update(task, advance=1, description=f"{title}, {engine.stats.tokens_per_second:.0f} tokens/s")


def _key(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:24]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
